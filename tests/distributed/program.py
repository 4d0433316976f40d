"""What each process of the tests on many processes does: every case with the others, and the same case alone."""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim import NAMO, MVNGrad, processes
from lightning_optim.diagnostics.what_if import VirtualOptimizer, gradients_of
from lightning_optim.engine import gradients, storage
from lightning_optim.engine.optimizer import RuleOptimizer
from lightning_optim.engine.rule import RULES
from lightning_optim.engine.two_rules import MatrixOptimizer
from lightning_optim.registry import OPTIMIZERS
from tests.optimizers.rows import CONFIGURATIONS, OURS, assume_losses

#: Shape, number of blocks, whether they are transposed, how they are split. What shards awkwardly:
SHAPES: dict[str, tuple[Any, ...]] = {
    "qkv": ((18, 6), 3, False),  # two shards of nine rows, or four of five, cut matrices
    "gates": ((8, 5), 4, False),  # no matrix is cut by two or four
    "up": ((9, 6), 1, False),  # tall, and not divisible
    "down": ((6, 9), 1, False),
    "row": ((1, 6), 1, False),  # all shards but one are empty
    "experts": ((5, 4, 3), 5, False),
    "grouped queries": ((13, 4), 1, False, (7, 3, 3)),  # shards begin and end within matrices
    "latent": ((15, 4), 3, False, (3, 2)),  # heads of keys and values in turn
    "gate and up": ((3, 8, 5), 6, False),  # two matrices in each of three experts
    "experts of columns": ((3, 4, 9), 3, True, (5, 4)),
    "conv": ((3, 4, 2, 2), 1, False),
    "grouped": ((4, 2, 3, 3), 2, False),
    "transposed": ((5, 3, 2, 2), 1, True),
    "columns": ((4, 6), 1, False),  # cut along its second axis
    "bias": ((7,), 0, False),
    "short": ((1,), 0, False),
    "replicated": ((5, 4), 1, False),  # a DTensor of which all have everything
    "plain": ((3,), 0, False),  # no DTensor
}
#: What four processes can share evenly.
EVEN: dict[str, tuple[Any, ...]] = {
    "even tall": ((16, 8), 1, False),
    "even wide": ((8, 32), 1, False),
    "even experts": ((4, 4, 8), 4, False),
    "even bias": ((8,), 0, False),
}
#: How tensor and expert parallelism place parameters before FSDP2 does; others are cut into rows. FSDP2 then cuts rows,
#: and columns of ``BY_COLUMNS``.
TENSOR_PARALLEL: dict[str, Any] = {
    "gates": Shard(1),
    "down": Shard(1),
    "gate and up": Shard(1),
    "conv": Shard(1),
    "columns": Shard(1),
    "short": Replicate(),
}
BY_COLUMNS = ("columns", "experts of columns")
STEPS = 5
#: In one step one shard of one gradient is not finite, in the last one is too large to be squared.
NOT_FINITE, HUGE = 3, STEPS


def placed(name: str, x: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A tensor as FSDP2 would have it; HSDP with two dimensions of the mesh."""
    if mesh is None or name == "plain":
        return x.clone()
    if mesh.mesh_dim_names and name != "replicated":
        return placed_after_tensor_parallelism(name, x, mesh)
    how = Replicate() if name == "replicated" else Shard(1 if name == "columns" else 0)
    return distribute_tensor(x.clone(), mesh, [*[Replicate()] * (mesh.ndim - 1), how], src_data_rank=None)


def placed_after_tensor_parallelism(name: str, x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor as FSDP2 would have it: it cuts what tensor parallelism, the last dimension of the mesh, left of it."""
    axis, how = int(name in BY_COLUMNS), TENSOR_PARALLEL.get(name, Shard(0))
    part = distribute_tensor(x.clone(), mesh[mesh.mesh_dim_names[-1]], [how], src_data_rank=None).to_local()
    parts = [*part.chunk(mesh.size(-2), axis), *[part.narrow(axis, 0, 0)] * mesh.size(-2)]
    again = how == Shard(axis) and mesh.size(-1) > 1
    first = _StridedShard(axis, split_factor=mesh.size(-1)) if again else Shard(axis)
    placements = [*[Replicate()] * (mesh.ndim - 2), first, how]
    own = parts[mesh.get_local_rank(mesh.ndim - 2)].clone()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def here(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """What this process has of ``like``, and the same part of ``x``."""
    if not isinstance(like, DTensor):
        return x, like
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).to_local(), like.to_local()


def start(dtype: torch.dtype, mesh: DeviceMesh | None = None, shapes: Any = SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, (shape, *_) in shapes.items()
    }
    return {name: nn.Parameter(placed(name, x.to(dtype), mesh)) for name, x in values.items()}


def build(name: str, parameters: dict[str, nn.Parameter], **arguments: Any) -> RuleOptimizer:
    cls: Any = OPTIMIZERS[name].cls
    if not issubclass(cls, MatrixOptimizer):
        return cls(list(parameters.values()), **arguments)
    groups: dict[Any, dict[str, Any]] = {}
    for key, p in parameters.items():
        _, blocks, transposed, *split = (SHAPES | EVEN)[key]
        settings: dict[str, Any] = {"role": "fallback"}
        if blocks:
            settings = {"role": "matrix", "blocks": blocks, "transposed": transposed} | (
                {"split": split[0]} if split else {}
            )
        groups.setdefault((blocks, transposed, *split), {"params": [], **settings})["params"].append(p)
    return cls(list(groups.values()), **arguments)


def set_gradients(parameters: dict[str, nn.Parameter], t: int, mesh: DeviceMesh | None = None) -> None:
    """The same whatever the mesh."""
    generator = torch.Generator().manual_seed(1000 + t)
    for name, p in parameters.items():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).add_(0.5)
        if name == "up" and t == NOT_FINITE and (mesh is None or mesh.ndim == 1 or mesh.get_local_rank(0) == 1):
            g[-1, 0] = torch.nan  # under HSDP of one replica
        g = g.to(p.dtype)
        if name in ("up", "bias") and t == HUGE:
            g[-1] *= torch.finfo(torch.promote_types(p.dtype, torch.float32)).max / 1e3
        p.grad = placed(name, g, mesh)


def run(
    name: str,
    arguments: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    mesh: DeviceMesh | None = None,
    group: Any = None,
    without: Callable[[str, int], bool] = lambda name, t: False,
    shapes: Any = SHAPES,
) -> dict[str, Any]:
    """Run an optimizer with the other processes and alone: how far are parameters and state from one another?"""
    parameters, others = start(dtype, mesh, shapes), start(dtype, shapes=shapes)
    optimizer, alone = build(name, parameters, **arguments), build(name, others, **arguments)
    optimizer.process_group = group
    seen: list[dict[Any, Tensor]] = [{}, {}]
    optimizer.observer, alone.observer = (observer(x, y) for x, y in zip(seen, (parameters, others)))
    worst = 0.0
    for t in range(1, STEPS + 1):
        set_gradients(parameters, t, mesh)
        set_gradients(others, t)
        for key in [key for key in parameters if without(key, t)]:
            parameters[key].grad = others[key].grad = None
        if t == HUGE:
            optimizer.observer = alone.observer = None
        optimizer.step()
        alone.step()
        # What the last gradient is in leaves the rest below the resolution.
        worst = max(worst, compare(optimizer, parameters, alone, others)) if t >= STEPS - 1 else worst
    optimizer.settle()
    reports = {key: difference(expected, seen[0][key]) for key, expected in seen[1].items() if key in seen[0]}
    return {
        "difference": worst,
        "skipped": optimizer.skipped_steps,
        "same": same_everywhere(list(parameters.values())) if mesh is None else None,
        "reports": reports,
        "missing": seen[1].keys() - seen[0].keys(),
    }


def observer(seen: dict[Any, Tensor], parameters: dict[str, nn.Parameter]) -> Callable[[Tensor, str, Tensor], None]:
    names = {p: name for name, p in parameters.items()}
    step: Counter[tuple[str, str]] = Counter()

    def observe(p: Tensor, name: str, value: Tensor) -> None:
        key = (names[p], name)
        step[key] += 1
        seen[(*key, step[key])] = value.clone()

    return observe


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference of what this process has, relative to the largest element of the whole."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    largest = expected.abs().double().max().clamp(min=1e-30)
    a, b = here(expected, found)
    assert a.isfinite().all()
    assert b.isfinite().all()
    return ((a.double() - b.double()).abs().amax() / largest).item() if a.numel() else 0.0


def saved_state(optimizer: RuleOptimizer) -> dict[Tensor, dict[str, Tensor]]:
    """State by parameters, as it stands in a checkpoint."""
    state = optimizer.state_dict()["state"]
    return {p: state[i] for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}


@torch.no_grad()
def compare(optimizer: RuleOptimizer, parameters: dict[str, nn.Parameter], alone: RuleOptimizer, others: Any) -> float:
    differences = []
    states, alone_states = saved_state(optimizer), saved_state(alone)
    for name, p in parameters.items():
        differences.append(difference(others[name].detach(), p.detach()))
        state, expected = states[p], alone_states[others[name]]
        assert state.keys() == expected.keys(), (name, state.keys(), expected.keys())
        differences += [difference(x, state[key]) for key, x in expected.items()]
    return max(differences)


def same_everywhere(tensors: list[Tensor]) -> bool:
    """Whether all processes hold the same bits."""
    flat = torch.cat([x.detach().double().view(-1) for x in tensors])
    all_of_them = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, flat)
    return all(torch.equal(x, flat) for x in all_of_them)


# --- cases ----------------------------------------------------------------------------------------------------------


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in OURS:
        for i, arguments in enumerate(CONFIGURATIONS[name]):
            if i == 0 or "fallback" in arguments or RULES[name].own_decay:
                yield name, arguments


def each(**settings: Any) -> dict[str, Any]:
    return {f"{name} {arguments}": run(name, arguments, **settings) for name, arguments in configurations()}


def few(extra: Any = {}, **settings: Any) -> dict[str, Any]:  # noqa: B006
    """One optimizer of each kind."""
    return {
        name: run(name, CONFIGURATIONS[name][0] | extra, **settings) for name in ("NAMO", "SOAP", "HVAdam", "MVNGrad")
    }


def low_state(mesh: DeviceMesh) -> dict[str, Any]:
    """State in low precision, also of these small parameters; blocks of a row cannot be cut."""
    found = {}
    cut = {"columns"} if mesh.ndim == 1 else {*TENSOR_PARALLEL, *BY_COLUMNS}
    rows = {name: x for name, x in SHAPES.items() if name not in cut}
    with mock.patch.multiple(storage, LEAST=1, SHORTEST_ROW=1):
        for state_dtype in ("bfloat16", "8bit"):
            ways = {"fsdp2": {"mesh": mesh}, "ddp": {"group": dist.group.WORLD}}
            for how, settings in list(ways.items())[: 2 if mesh.ndim == 1 else 1]:
                extra = {"state_dtype": state_dtype}
                runs = few(extra, dtype=torch.float32, shapes=rows, **settings)
                found |= {f"{how} {state_dtype} {name}": result for name, result in runs.items()}
        try:
            MVNGrad([start(torch.float32, mesh)["columns"]], state_dtype="8bit")
        except ValueError as error:
            found["refused"] = str(error)
        for name in ("NAMO", "SOAP", "MVNGrad"):
            found[f"checkpoint {name}"] = goes_on_after_a_checkpoint(
                name, mesh, torch.float32, rows, state_dtype="8bit"
            )
    return found


def decay() -> dict[str, Any]:
    """The forms of weight decay that need the parameter, or the direction of its step."""
    return {
        f"{name} {form}": run(name, CONFIGURATIONS[name][0] | {"weight_decay": 0.5, "decay": form}, mesh=line())
        for form in ("coupled", "cautious")
        for name in ("NAMO", "SOAP", "HVAdam", "MVNGrad")
    }


def switches() -> dict[str, Any]:
    """Steps that depend on sums over whole matrices."""
    forms: list[dict[str, Any]] = [
        {"cautious": True},
        {"norm_control": "hyperball"},
        {"cautious": True, "norm_control": "radial", "weight_decay": 0.5, "decay": "cautious"},
    ]
    return {
        f"{name} {i} {kind}": run(name, CONFIGURATIONS[name][0] | form, **where)
        for i, form in enumerate(forms)
        for name in ("Muon", "NAMO", "SOAP", "HVAdam", "MVNGrad")
        for kind, where in (("fsdp2", {"mesh": line()}), ("ddp", {"group": dist.group.WORLD}))
    }


def unused() -> dict[str, Any]:
    """One parameter gets a gradient only later, one only in the beginning."""
    return few(mesh=line(), without=lambda name, t: name == ("up" if t < 3 else "qkv"))


def on_accelerators() -> dict[str, Any]:
    """The verdict as it is on accelerators, where the host does not wait for it."""
    known, gradients._known_on_host = gradients._known_on_host, lambda grads: False
    try:
        return few(mesh=line())
    finally:
        gradients._known_on_host = known


def bytes_sent() -> dict[str, Any]:
    """What one step sends, by operation and optimizer."""
    results = {}
    parameters = start(torch.float32, line(), EVEN)
    set_gradients(parameters, 1, line())
    for name in ("Muon", "NAMO", "NAMOD", "SOAP", "DeVA", "MVNGrad", "HVAdam"):
        optimizer = build(name, parameters)
        optimizer.step()
        before = processes.bytes_sent.copy()
        optimizer.step()
        results[name] = processes.bytes_sent - before
    for name in ("Muon", "NAMO"):
        columns = start(torch.float32, line(), {"columns": SHAPES["columns"]})
        optimizer = build(name, columns)
        set_gradients(columns, 1, line())
        before = processes.bytes_sent.copy()
        optimizer.step()
        results[f"{name}, columns"] = processes.bytes_sent - before
    optimizer = build("SOAP", parameters)
    optimizer.step()
    before = processes.bytes_sent.copy()
    saved = optimizer.state_dict()
    results["SOAP's checkpoint"] = processes.bytes_sent - before
    optimizer.load_state_dict(saved)
    before = processes.bytes_sent.copy()
    optimizer.step()
    results["SOAP after loading"] = processes.bytes_sent - before
    parameters = start(torch.float32, None, EVEN)
    optimizer = build("NAMO", parameters)
    optimizer.process_group = dist.group.WORLD
    set_gradients(parameters, 1)
    before = processes.bytes_sent.copy()
    optimizer.step()
    results["DDP"] = processes.bytes_sent - before
    return results


def leaked() -> dict[str, Any]:
    """How many objects of DTensor there are after some steps and after 1,000 more."""
    parameters = {key: p for key, p in start(torch.float32, line()).items() if key in ("qkv", "bias")}
    optimizer = build("NAMO", parameters)
    counts = []
    for steps in (10, 1000):
        for t in range(steps):
            if t % 100 == 0:
                set_gradients(parameters, 1, line())
            optimizer.step()
        gc.collect()
        counts.append(sum(isinstance(x, (DTensor, DTensorSpec)) for x in gc.get_objects()))
    return {"counts": counts}


def checkpoint(mesh: DeviceMesh) -> dict[str, Any]:
    """Going on after torch.distributed.checkpoint's own way through a flattened state against going on."""
    return {name: goes_on_after_a_checkpoint(name, mesh) for name in ("NAMO", "SOAP", "HVAdam")}


def goes_on_after_a_checkpoint(
    name: str, mesh: DeviceMesh, dtype: torch.dtype = torch.float64, shapes: Any = SHAPES, **arguments: Any
) -> bool:
    model, copy = (nn.ParameterDict(start(dtype, mesh, shapes)) for _ in range(2))
    arguments = CONFIGURATIONS[name][0] | arguments
    optimizer, resumed = (build(name, dict(m.items()), **arguments) for m in (model, copy))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for t in (1, 2):
        set_gradients(dict(model.items()), t, mesh)
        optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    for m in (model, copy):
        m.zero_grad()
    with torch.no_grad():
        for p, q in zip(model.values(), copy.values()):
            q.copy_(p)
    set_optimizer_state_dict(copy, resumed, saved, options=options)
    for m, o in ((model, optimizer), (copy, resumed)):
        set_gradients(dict(m.items()), 4, mesh)
        o.step()
    mine = [[processes.local(p.detach()) for p in m.values()] for m in (model, copy)]
    return all(torch.equal(p, q) for p, q in zip(*mine))


def whole_state(mesh: DeviceMesh) -> dict[str, Any]:
    """Going on sharded with the state of a single process against going on alone."""
    results: dict[str, Any] = {}
    for name in ("NAMO", "SOAP", "HVAdam", "MVNGrad"):
        parameters, others = start(torch.bfloat16, mesh), start(torch.bfloat16)
        optimizer, alone = (build(name, ps, **CONFIGURATIONS[name][0], rounding="split") for ps in (parameters, others))
        set_gradients(others, 1)
        alone.step()
        with torch.no_grad():
            for key, p in parameters.items():
                p.copy_(placed(key, others[key].detach(), mesh))
        optimizer.load_state_dict(alone.state_dict())
        set_gradients(parameters, 2, mesh)
        set_gradients(others, 2)
        optimizer.step()
        alone.step()
        results[name] = compare(optimizer, parameters, alone, others)
    p = parameters["columns"]
    state = optimizer.state[p]
    state["m"] = state["m"].redistribute(mesh, [Shard(0)] * mesh.ndim)
    try:
        optimizer.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        results["refused"] = str(error)
    return results


def lives_of_state(mesh: DeviceMesh) -> dict[str, Any]:
    """State that one rank owns: everything that happens to optimizers, compared with a single process."""
    results: dict[str, Any] = {}
    for name in ("NAMO", "SOAP", "DeVA"):
        parameters, others = start(torch.float64, mesh), start(torch.float64)
        later = ("conv", "transposed")
        optimizer, alone = (
            build(name, {key: p for key, p in ps.items() if key not in later}, **CONFIGURATIONS[name][0])
            for ps in (parameters, others)
        )

        def step(t: int) -> None:
            set_gradients(parameters, t, mesh)  # noqa: B023
            set_gradients(others, t)  # noqa: B023
            optimizer.step()  # noqa: B023
            alone.step()  # noqa: B023

        step(NOT_FINITE)
        step(1)
        for o, ps in ((optimizer, parameters), (alone, others)):
            for key in later:
                _, blocks, transposed = SHAPES[key]
                o.add_param_group({"params": [ps[key]], "role": "matrix", "blocks": blocks, "transposed": transposed})
        step(2)
        optimizer.load_state_dict(optimizer.state_dict())
        after_loading = compare(optimizer, parameters, alone, others)
        step(4)
        tried = VirtualOptimizer(optimizer).step(gradients_of(optimizer))
        before = {p: p.detach().clone() for p in parameters.values()}
        step(4)
        results[name] = {
            "same": max(after_loading, compare(optimizer, parameters, alone, others)),
            "tried": all(
                torch.equal(processes.local(p.detach() - before[p]), processes.local(x)) for p, x in tried.items()
            ),
            "elements": {
                key: [x.numel() for n, x in optimizer.state[p].items() if n != "step"]
                for key, p in parameters.items()
                if processes.sharding_of(p) is not None and (name != "NAMO" or key in ("transposed", "columns"))
            },
            "whole": {key: [x.numel() for n, x in alone.state[p].items() if n != "step"] for key, p in others.items()},
            "placed": {n: str(processes.placements(x)) for n, x in saved_state(optimizer)[parameters["up"]].items()},
        }
        for ps in (parameters, others):
            nn.ParameterDict(ps).float()
        step(1)
        results[name]["cast"] = compare(optimizer, parameters, alone, others)
    group = next(g for g in optimizer.param_groups if g.get("transposed") and "split" not in g)
    group["transposed"] = False
    try:
        optimizer.step()
    except ValueError as error:
        results["refused"] = str(error)
    return results


def refused() -> dict[str, str]:
    """What is said of placements that a rule does not take."""
    square = init_device_mesh("cpu", (2, 2))
    pieces = torch.ones(2, 8)  # rows 0, 2 and 1, 3, which no number of ranks to the right have cut
    pieces = nn.Parameter(
        DTensor.from_local(pieces, square, [_StridedShard(0, split_factor=2), Replicate()], shape=(4, 8), stride=(8, 1))
    )
    summand = nn.Parameter(DTensor.from_local(torch.ones(4, 4), square, [Replicate(), Partial()]))
    messages = {}
    for what, cls, p in (("pieces", NAMO, pieces), ("summand", MVNGrad, summand)):
        try:
            cls([{"params": [p], "role": "matrix"}])
        except ValueError as error:
            messages[what] = str(error)
    optimizer = MVNGrad([pieces])
    pieces.grad = torch.ones_like(pieces)
    optimizer.step()
    messages["element-wise"] = str(tuple(pieces.shape))
    return messages


def losses() -> dict[str, Any]:
    """ELRA on processes whose losses differ, the third so large on average that a step is taken back."""
    found = {}
    for how, mesh, group in (("ddp", None, dist.group.WORLD), ("fsdp2", line(), None)):
        for form in ("p2min", "c2min"):
            parameters, others = start(torch.float64, mesh), start(torch.float64)
            optimizer, alone = (build("ELRA", ps, lr=0.01, form=form) for ps in (parameters, others))
            optimizer.process_group = group
            for t, mean in enumerate((3.0, 2.0, 500.0, 1.5, 1.0), 10):
                set_gradients(parameters, t, mesh)
                set_gradients(others, t)
                own = torch.tensor(mean * (1.9, 0.1)[dist.get_rank()], dtype=torch.float64)
                optimizer.step(lambda: own)  # noqa: B023
                alone.step(lambda: torch.tensor(mean, dtype=torch.float64))  # noqa: B023
            retraces = float(optimizer.state[parameters["plain"]]["retraces"])
            found[f"{how} {form}"] = compare(optimizer, parameters, alone, others), retraces
    return found


@cache
def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@cache
def square() -> DeviceMesh:
    """A dimension for FSDP2 and one for tensor parallelism."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


CASES: dict[int, dict[str, Callable[[], Any]]] = {
    2: {
        "fsdp2": lambda: each(mesh=line()),
        "fsdp2 bf16": lambda: few(mesh=line(), dtype=torch.bfloat16),
        "fsdp2 stochastic": lambda: few(mesh=line(), dtype=torch.bfloat16, extra={"rounding": "stochastic"}),
        "fsdp2 split": lambda: few(mesh=line(), dtype=torch.bfloat16, extra={"rounding": "split"}),
        "ddp": lambda: each(group=dist.group.WORLD),
        "ddp float32": lambda: each(group=dist.group.WORLD, dtype=torch.float32),
        "decay": decay,
        "switches": switches,
        "on accelerators": on_accelerators,
        "unused": unused,
        "checkpoint": lambda: checkpoint(line()),
        "whole state": lambda: whole_state(line()),
        "lives of state": lambda: lives_of_state(line()),
        "losses": losses,
        "low state": lambda: low_state(line()),
        "bytes": bytes_sent,
    },
    4: {
        "fsdp2": lambda: each(mesh=line()),
        "hsdp": lambda: each(mesh=init_device_mesh("cpu", (2, 2))),
        "tensor parallel": lambda: each(mesh=square()),
        "replicas of tensor parallel": lambda: few(
            mesh=init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicas", "data", "tensor"))
        ),
        "tensor parallel checkpoint": lambda: checkpoint(square()),
        "tensor parallel whole state": lambda: whole_state(square()),
        "tensor parallel lives of state": lambda: lives_of_state(square()),
        "tensor parallel low state": lambda: low_state(square()),
        "tensor parallel split": lambda: few(mesh=square(), dtype=torch.bfloat16, extra={"rounding": "split"}),
        "switches": switches,
        "bytes": bytes_sent,
        "refused": refused,
        "leaked": leaked,
    },
}


def main(out: Path, only: list[str]) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, case in CASES[dist.get_world_size()].items():
        if not only or name in only:
            begin = time.perf_counter()
            results[name] = case()
            if dist.get_rank() == 0:
                print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    torch.save(results, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    assume_losses(setattr)
    main(Path(sys.argv[1]), sys.argv[2:])
