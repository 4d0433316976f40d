"""Do numbers stay the same? Every optimizer, backend, precision and rounding, 20 steps, before and after a change.

    python -m tests.freeze --out before.pt        # on the commit before the change
    python -m tests.freeze --against before.pt    # on the one after it, on the same machine

Parameters and optimizer state are compared bit for bit. Bits depend on the machine and on torch's version, so the files
are not kept. The configurations are those of :mod:`tests.optimizers.rows`; names that one side lacks are left out.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engine.rule import RULES
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS
from tests.optimizers.rows import CONFIGURATIONS, assume_losses, build, network, run

STEPS = 20
#: (dtype, rounding) of the parameters.
PRECISIONS = [
    (torch.float32, "nearest"),
    (torch.float64, "nearest"),
    *((torch.bfloat16, rounding) for rounding in ("nearest", "stochastic", "kahan", "split")),
    *((torch.float16, rounding) for rounding in ("nearest", "stochastic", "kahan")),
]


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of cases, and the arguments of :func:`trajectory`.

    Every configuration runs plain and chunked at every precision. Compiling takes seconds, so the compiled backend runs
    every configuration in float32, and the default one at every precision.
    """
    for name, configurations in CONFIGURATIONS.items():
        for arguments in configurations:
            for backend in ("plain", "chunked", "compiled"):
                for dtype, rounding in PRECISIONS:
                    if backend == "compiled" and arguments is not configurations[0] and dtype != torch.float32:
                        continue
                    label = f"{name} {arguments} {backend} {dtype} {rounding}"
                    yield label, dict(name=name, arguments=arguments, backend=backend, dtype=dtype, rounding=rounding)


def fallback_arguments(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a matrix optimizer's fallback, given: a rule's own defaults, whatever a fallback's are."""
    cls: Any = OPTIMIZERS[name].cls
    if not issubclass(cls, MatrixOptimizer):
        return {}
    own = RULES[arguments.get("fallback", cls.arguments["fallback"].default)].hyperparameters()
    return {f"fallback_{key}": own[key] for key in ("lr", "betas", "eps", "weight_decay") if key in own}


def trajectory(
    name: str, arguments: dict[str, Any], backend: str, dtype: torch.dtype, rounding: str
) -> dict[str, Tensor]:
    """Parameters and state after :data:`STEPS` steps."""
    params = list(network(dtype).parameters())
    optimizer = build(
        name, params, backend=backend, rounding=rounding, **fallback_arguments(name, arguments), **arguments
    )
    run(optimizer, params, range(1, STEPS + 1))
    found = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"parameter {i} {key}": x.clone() for key, x in optimizer.state[p].items()}
    return found


def differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal, with how far apart they are."""
    lines = [f"{key}: only on one side" for key in sorted(before.keys() ^ after.keys())]
    for key in before.keys() & after.keys():
        x, y = before[key], after[key]
        if key.endswith(" step"):
            x, y = x.long(), y.long()  # Counts were float32 once.
        if x.dtype != y.dtype or x.shape != y.shape:
            lines.append(f"{key}: {x.dtype} {tuple(x.shape)} became {y.dtype} {tuple(y.shape)}")
        elif not torch.equal(x, y):
            distance = (x.double() - y.double()).norm() / x.double().norm()
            lines.append(f"{key}: {float(distance):.1e} apart")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the trajectories here")
    parser.add_argument("--against", type=Path, help="compare with those of this file")
    parser.add_argument("--only", default="", help="cases whose label contains this")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    assume_losses(setattr)  # ELRA refuses a step without a loss.
    stored = torch.load(args.against) if args.against else {}
    found, unequal, compared = {}, 0, 0
    for label, arguments in cases():
        if args.only not in label:
            continue
        found[label] = trajectory(**arguments)
        if label in stored:
            compared += 1
            lines = differences(stored[label], found[label])
            unequal += bool(lines)
            if lines:
                print(label, *lines, sep="\n    ", flush=True)
    if args.out:
        torch.save(found, args.out)
    print(f"{len(found)} cases run, {compared} compared, {compared - unequal} equal, {unequal} not")
    raise SystemExit(unequal > 0)


if __name__ == "__main__":
    main()
