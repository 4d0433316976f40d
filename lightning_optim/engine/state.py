"""The tensors of a step: precision and state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import devices, processes
from . import storage
from .arithmetic import largest_gradient
from .layout import Part, joint_shape, parts_of, state_of_part
from .rounding import RESIDUAL
from .rule import LIKE_PARAMETER, GroupRule, MatrixRule, Rule, Shape, buffers_of, hyperparameters_of

State = MutableMapping[str, Any]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """State and arithmetic are float32, or float64 for float64 parameters.

    >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def real_view(x: Tensor) -> Tensor:
    """A complex tensor as a real one, with a last axis of real and imaginary parts; a real tensor itself."""
    return torch.view_as_real(x) if x.is_complex() else x


def state_shapes(rule: type[Rule], p: Tensor, group: Mapping[str, Any]) -> dict[str, Shape | None]:
    """The rule's state tensors for a parameter, ``None`` for the parameter's own shape."""
    h = hyperparameters_of(rule, group)
    if not issubclass(rule, MatrixRule):
        return buffers_of(rule, tuple(p.shape), h)
    return {
        name: LIKE_PARAMETER if shapes is LIKE_PARAMETER else joint_shape(shapes)
        for name, shapes in _shapes_by_part(rule, p, group, h).items()
    }


def _shapes_by_part(
    rule: type[Rule], p: Tensor, group: Mapping[str, Any], h: Any
) -> dict[str, list[tuple[Part, Shape]] | None]:
    """For each state tensor, its shape for one matrix of each part that has it; ``None``: the parameter's own."""
    found: dict[str, list[tuple[Part, Shape]] | None] = {}
    for part in parts_of(p.shape, group):
        for name, shape in buffers_of(rule, part.shape, h).items():
            if shape is LIKE_PARAMETER:
                found[name] = LIKE_PARAMETER
            else:
                of_parts = found.setdefault(name, [])
                assert of_parts is not None
                of_parts.append((part, shape))
    return found


def states_of_parts(
    rule: type[Rule], p: Tensor, group: Mapping[str, Any], state: State
) -> Iterator[tuple[Part, State, State]]:
    """For each part of a parameter, its state tensors: those of the parameter's shape, and the others.

    The first are of the whole parameter or this rank's shard, and include the scales of their rows; the others are
    views ``(blocks, *shape)``.
    """
    by_part = _shapes_by_part(rule, p, group, hyperparameters_of(rule, group))
    like = {name: state[name] for name, shapes in by_part.items() if shapes is LIKE_PARAMETER}
    others_like = (RESIDUAL, *(storage.scale_name(name) for name in like))
    like |= {name: state[name] for name in others_like if name in state}
    for part in parts_of(p.shape, group):
        others = {
            name: state_of_part(state[name], shapes, part)
            for name, shapes in by_part.items()
            if shapes is not LIKE_PARAMETER and part in (other for other, _ in shapes)
        }
        yield part, like, others


def new_state(rule: type[Rule], p: Tensor, group: Mapping[str, Any], owner: int | None = None) -> State:
    """Zero state for one parameter: its step count, the rule's host scalars and the rule's tensors.

    These are with the owner, if there is one, and otherwise cut as the parameter is.

    State of a complex parameter is that of its real view: real, with a last axis of two more than the parameter.

    Counts and host scalars are on the CPU whatever the device, since the host computes with them, and have the same
    precision whatever torch's default, which Lightning lowers in training steps that step by hand at 16-true.
    """
    p = real_view(p)
    dtype = compute_dtype(p.dtype)
    state: State = {"step": torch.tensor(0, dtype=torch.int64, device="cpu")}
    for name in rule.host_state:
        state[name] = torch.tensor(0.0, dtype=torch.float64, device="cpu")
    for name, shape in state_shapes(rule, p, group).items():
        if owner is not None:
            state[name] = processes.zeros_on_rank(p, tuple(p.shape) if shape is None else shape, dtype, owner)
        elif shape is LIKE_PARAMETER:
            state[name] = processes.zeros_like(p, dtype)
        else:
            state[name] = processes.zeros_of_shape(p, shape, dtype, replicated=runs_on_rows(rule, p, group))
    if issubclass(rule, GroupRule):
        for name, value in rule.group_state.items():
            state[name] = torch.full((), value, dtype=devices.widest(p.device), device=p.device)
    return state


def has_begun(state: Mapping[str, Any] | None) -> TypeGuard[State]:
    """Whether a parameter has state of its rule; a wrapper may have put something of its own there before."""
    return state is not None and "step" in state


def tensor_names(rule: type[Rule], p: Tensor, group: Mapping[str, Any], state: State) -> list[str]:
    """Names of the state tensors that a step works on: the rule's and the residual, not what wrappers keep there."""
    return [*state_shapes(rule, p, group), *([RESIDUAL] if RESIDUAL in state else [])]


def convert_storage(
    rule: type[Rule], p: Tensor, state: State, group: Mapping[str, Any], state_dtype: str
) -> dict[str, int]:
    """Convert the state of a parameter to the dtypes in which it should be stored, rounded to nearest.

    Returns:
        The state tensors that are in low precision now, and what is added to their random bits.
    """
    names = storage.may_be_low(rule, group)
    if state_dtype == "float32" and not any(storage.is_low(state.get(name)) for name in names):
        return {}
    p = real_view(p)
    dtype = compute_dtype(p.dtype)
    wanted = {} if dtype == torch.float64 else storage.stored_dtypes(rule, p.shape, group, state_dtype)
    for name in names:
        x = state.get(name)
        if x is None or x.dtype == wanted.get(name, dtype):
            continue
        here, scale = processes.local(x), state.pop(storage.scale_name(name), None)
        value = storage.read(here, None if scale is None else processes.local(scale), dtype)
        stored = torch.zeros_like(value, dtype=wanted.get(name, dtype))
        if name not in wanted:
            stored.copy_(value)
        elif stored.dtype == torch.bfloat16:
            storage.write_(stored, None, value)
        else:
            axes = storage.row_axes(rule, p.shape, group)
            scale = value.new_zeros(storage.scale_shape(value.shape, axes), dtype=torch.float32)
            storage.write_(stored, scale, value)
            whole = storage.scale_shape(x.shape, axes)
            state[storage.scale_name(name)] = processes.placed_like(scale, x, whole)
        state[name] = processes.placed_like(stored, x, tuple(x.shape))
    return {name: shift for name, shift in names.items() if name in state and name in wanted}


def expected_state(rule: type[Rule], p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]) -> State:
    """What the saved state of a parameter should be like, without values; empty if none of it is the rule's.

    A residual is expected where one was saved, and state in low precision where it was saved so: the next step makes
    what it needs.
    """
    like = torch.empty_like(real_view(p), device="meta")
    expected = new_state(rule, like, group)
    if expected.keys().isdisjoint(saved):
        return {}
    for name in rule.group_state if issubclass(rule, GroupRule) else ():
        expected[name] = expected[name].to(devices.widest(p.device))
    if RESIDUAL in saved:
        kind = getattr(saved[RESIDUAL], "dtype", None)
        kind = kind if kind in (torch.bfloat16, torch.float16) else torch.int16
        expected[RESIDUAL] = torch.empty_like(like, dtype=kind)
    for name in storage.may_be_low(rule, group):
        x = saved.get(name)
        if storage.is_low(x) and name in expected:
            expected[name] = torch.empty_like(expected[name], dtype=x.dtype)
            if x.dtype != torch.bfloat16:
                whole = storage.scale_shape(like.shape, storage.row_axes(rule, like.shape, group))
                expected[storage.scale_name(name)] = processes.zeros_of_rows(like, whole)
    return expected


def load_state(p: Tensor, saved: Mapping[str, Any], expected: State) -> State:
    """A copy of the saved state of a parameter beside it, of the expected dtypes and sharded as expected.

    What is not expected keeps its dtype, so that a wrapper's float32 averages of bfloat16 parameters stay exact.
    """
    state: State = {}
    for name, value in saved.items():
        if name not in expected:
            state[name] = tree_map_only(Tensor, lambda x: x.to(p.device, copy=True), value)
            continue
        like = expected[name]
        if like.is_cpu:  # Counts and host scalars stay where the host reads them.
            number = value.to(like.device, like.dtype, copy=True)
            # A number until the next step: Lightning moves tensors to the device, which may not have their dtype.
            state[name] = number if name == "step" else number.item()
        else:
            state[name] = processes.sharded_like(value.to(p.device, like.dtype, copy=True), like)
    return state


def follow(rule: type[Rule], params: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]) -> None:
    """Bring state to the precision and device of parameters that were cast or moved.

    Raises:
        ValueError: A parameter was replaced by one of another shape, or of a precision too narrow for its state.
    """
    shapes = state_shapes(rule, params[0], group)
    if not shapes:
        return
    exact = {name: shape for name, shape in shapes.items() if not storage.is_low(states[0].get(name))} or shapes
    name = next((name for name, shape in exact.items() if shape is LIKE_PARAMETER), next(iter(exact)))
    alike = shapes[name] is LIKE_PARAMETER
    for p, state in zip(map(real_view, params), states):
        x, dtype = state[name], compute_dtype(p.dtype)
        expected = p.shape if alike else state_shapes(rule, p, group)[name]
        if x.shape != expected and x.numel():  # State that another rank keeps is empty here.
            what = f"of shape {tuple(x.shape)}" if alike else f"whose state {name!r} has the shape {tuple(x.shape)}"
            raise ValueError(
                f"A parameter {what} was replaced by one of shape {tuple(p.shape)}, which its state does not fit: "
                "delete optimizer.state[parameter] to start over, or build a new optimizer."
            )
        if (x.dtype != dtype and not storage.is_low(x)) or x.device != p.device:
            _convert(rule, p, state, group)


def _convert(rule: type[Rule], p: Tensor, state: State, group: Mapping[str, Any]) -> None:
    dtype = compute_dtype(p.dtype)
    limit = largest_gradient(dtype)
    names = [name for name in state_shapes(rule, p, group) if not storage.is_low(state[name])]
    here = [processes.local(state[name]) for name in names if state[name].dtype != dtype]
    peaks = [x.abs().max().double() for x in here if x.numel()]
    peak = torch.stack([torch.zeros((), dtype=torch.float64, device=p.device), *peaks]).max()
    if processes.all_reduce_max(peak, processes.shard_groups(p)) > limit:
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} was cast to {p.dtype}, for which its state is too large "
            f"(above {limit:.1e}): delete optimizer.state[parameter] to start over, or cast it back."
        )
    for name in names:
        state[name] = state[name].to(p.device, dtype)
    low = [name for name in storage.may_be_low(rule, group) if storage.is_low(state.get(name))]
    for name in (*low, *map(storage.scale_name, low)):
        if name in state:
            state[name] = state[name].to(p.device)
    for name in rule.group_state if issubclass(rule, GroupRule) else ():
        state[name] = state[name].to(p.device, devices.widest(p.device))


def has_owner(rule: type[Rule], p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether several processes hold parts of a parameter, and one of them has its state and runs the rule."""
    return issubclass(rule, MatrixRule) and processes.sharding_of(p) is not None and not runs_on_rows(rule, p, group)


def runs_on_rows(rule: type[Rule], p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether processes that hold some rows each of a parameter's matrices run the rule on those."""
    if not issubclass(rule, MatrixRule) or not rule.by_rows or group["transposed"] or group.get("interleaved"):
        return False
    cut = processes.sharding_of(p)
    return cut is not None and cut.by_rows
