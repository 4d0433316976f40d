"""Rules compiled to one kernel each, whatever the model.

A rule's function is traced once, on vectors of symbolic length and with its hyperparameters as 0-d tensors, and
handed to Inductor. Dynamo (``torch.compile``'s front end) is left out on purpose: a traced function has no guards, so
that nothing can ever recompile it, and a call costs 4 microseconds instead of 60. What :func:`torch.compile` would
specialise on, dtypes, device and switches (booleans, strings, ``None``), is the key under which a kernel is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .call import call

Runner = Callable[[Tensor, "Tensor | None", "float | Tensor", Mapping[str, Tensor]], Any]

#: Length of the vectors a kernel is traced on: long enough for Inductor to share the loop among threads.
_EXAMPLE = 2**16

_kernels: dict[Any, Callable[[list[Tensor]], Any]] = {}


def compilations() -> int:
    """How many kernels this process has compiled."""
    return len(_kernels)


def is_number(x: Any) -> bool:
    """Whether a scalar of a rule is a number, which a kernel does not depend on, rather than a switch."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def runner(
    function: Callable[..., Any],
    p: Tensor,
    g: Tensor | None,
    gain: float | Tensor,
    finite: Tensor | None,
    state: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> Runner:
    """:func:`.call.call` of ``function`` with these scalars on vectors of the same kinds as those given, compiled.

    Compiles now if it has to; nothing is updated.

    Returns:
        ``run(p, g, gain, state)``.
    """
    numbers = {name: x for name, x in scalars.items() if is_number(x)}
    tensors = {name: x for name, x in scalars.items() if isinstance(x, Tensor)}
    switches = {name: x for name, x in scalars.items() if name not in numbers and name not in tensors}
    fixed = [*_as_tensors(tuple(numbers.values())), *tensors.values()]
    if finite is not None:
        fixed.append(finite)
    key = (
        function,
        p.dtype,
        None if g is None else g.dtype,
        isinstance(gain, Tensor),
        finite is not None,
        tuple((name, x.dtype) for name, x in state.items()),
        tuple(numbers),
        tuple((name, x.dtype) for name, x in tensors.items()),
        tuple(switches.items()),
        p.device,
        torch.get_num_threads(),
    )
    kernel = _kernels.get(key)
    if kernel is None:
        names = [*numbers, *tensors]

        def flat(*args: Tensor) -> Any:
            rest = iter(args)
            vectors = [next(rest) for _ in range(1 + len(state))]
            gradient = () if g is None else (next(rest), next(rest))
            given = {name: next(rest) for name in names}
            verdict = next(rest, None)
            result = call(
                function, vectors[0], *(gradient or (None, 1.0)), verdict, dict(zip(state, vectors[1:])),
                given | switches,
            )  # fmt: skip
            return result or ()

        example = [torch.zeros(_EXAMPLE, dtype=x.dtype, device=x.device) for x in (p, *state.values())]
        if g is not None:
            example += [torch.zeros(_EXAMPLE, dtype=g.dtype, device=g.device), _gain(gain)]
        kernel = _kernels[key] = _compile(flat, [*example, *fixed])

    def run(p: Tensor, g: Tensor | None, gain: float | Tensor, state: Mapping[str, Tensor]) -> Any:
        gradient = [] if g is None else [g, _gain(gain)]
        return kernel([p, *state.values(), *gradient, *fixed])

    return run


def _compile(function: Callable[..., Any], example: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    # Imported here because they take seconds, which nobody should pay who does not compile.
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(
        torch.func.functionalize(function), tracing_mode="symbolic", decomposition_table=select_decomp_table()
    )
    graph = trace(*example)
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    # Part of Inductor's own cache key, so that a process with other threads does not find this process's kernel.
    with config.patch({"cpp.threads": torch.get_num_threads()}):
        return compile_fx_inner(graph, inputs)


@lru_cache(maxsize=64)
def _as_tensors(numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
    return torch.tensor(numbers, dtype=torch.float64).unbind()


def _gain(gain: float | Tensor) -> Tensor:
    return gain if isinstance(gain, Tensor) else _as_tensors((gain,))[0]
