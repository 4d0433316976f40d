"""Communication: reductions, and tensors that are sent from rank to rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import ProcessGroup, rank, size, transport

#: Shape and dtype of a tensor to be received.
TensorSpec = tuple[tuple[int, ...], torch.dtype]

#: Bytes that this process has sent since it started, by operation. For an all-reduce, what a ring sends.
bytes_sent: Counter[str] = Counter()


# --- reductions ---------------------------------------------------------------------------------------------------


def all_reduce_max(x: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """The element-wise maximum of a tensor over the ranks of some groups, in place. The tensor holds no NaN."""
    return _all_reduce(x, groups, dist.ReduceOp.MAX) if groups else x


def all_reduce_sum(x: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """The sum of a tensor over the ranks of some groups, in place."""
    return _all_reduce(x, groups, dist.ReduceOp.SUM) if groups else x


def _all_reduce(x: Tensor, groups: Sequence[ProcessGroup], operation: Any) -> Tensor:
    for group in groups:
        sent = x.to(transport(group, x.device.type))
        dist.all_reduce(sent, operation, group)
        if sent is not x:
            x.copy_(sent)
        ranks = size(group)
        bytes_sent["all_reduce"] += 2 * x.nbytes * (ranks - 1) // ranks
    return x


def any_rank(flag: bool, group: ProcessGroup | None) -> bool:
    """Whether a flag is true on any rank of a group of :func:`.new_cpu_group`.

    Raises:
        RuntimeError: Another rank did not call it within the group's timeout.
    """
    return flag if group is None else bool(all_reduce_max(torch.tensor(float(flag)), [group]))


# --- tensors of any types ------------------------------------------------------------------------------------------


def all_to_all(
    send: Sequence[Sequence[Tensor]], receive: Sequence[Sequence[TensorSpec]], device: torch.device, group: ProcessGroup
) -> Callable[[], list[list[Tensor]]]:
    """Start to send tensors of any types to each rank of a group, by one all-to-all.

    Args:
        send: The tensors for each rank.
        receive: What comes from each rank.
        device: Device of the tensors.
        group: The process group.

    Returns:
        A function that waits for the tensors and returns those from each rank. What is sent must not change before.
    """
    packages = [_pack(xs, device) for xs in send]
    lengths = [sum(map(_bytes, specs)) for specs in receive]
    packed = torch.cat(packages).to(transport(group, device.type))
    received = packed.new_empty(sum(lengths))
    work = dist.all_to_all_single(received, packed, lengths, [len(x) for x in packages], group=group, async_op=True)
    bytes_sent["all_to_all"] += len(packed) - len(packages[rank(group)])
    return partial(_wait, work, received, receive, lengths, packed, device)


def all_gather(
    xs: Sequence[Tensor], specs: Sequence[Sequence[TensorSpec]], device: torch.device, group: ProcessGroup
) -> Callable[[], list[list[Tensor]]]:
    """Start to send tensors of any types to all ranks of a group, by one all-gather.

    Args:
        xs: The tensors of this rank.
        specs: What each rank sends.
        device: Device of the tensors.
        group: The process group.

    Returns:
        A function that waits for the tensors and returns those from each rank. What is sent must not change before.
    """
    sizes = [sum(map(_bytes, each)) for each in specs]
    length = max(sizes)
    packed = _pack(xs, device)
    packed = torch.cat([packed, packed.new_empty(length - len(packed))]).to(transport(group, device.type))
    received = packed.new_empty(length * len(specs))
    work = dist.all_gather_into_tensor(received, packed, group=group, async_op=True)
    bytes_sent["all_gather"] += length * (len(specs) - 1)
    return partial(_wait, work, received, specs, [length] * len(specs), packed, device)


def _wait(
    work: Any,
    received: Tensor,
    specs: Sequence[Sequence[TensorSpec]],
    lengths: list[int],
    sent: Tensor,
    device: torch.device,
) -> list[list[Tensor]]:
    """The tensors from each rank, when they are here; ``sent`` is kept until then."""
    work.wait()
    return [_unpack(part, each) for part, each in zip(received.to(device).split(lengths), specs)]


def all_gather_equal(xs: Sequence[Tensor], group: ProcessGroup) -> list[list[Tensor]]:
    """The tensors of every rank, which have the same shapes and dtypes on all ranks."""
    spec: list[TensorSpec] = [(tuple(x.shape), x.dtype) for x in xs]
    return all_gather(xs, [spec] * size(group), xs[0].device, group)()


def all_gather_object(x: Any, group: ProcessGroup | None) -> list[Any]:
    """An object of every rank of a group, pickled for transport; only this rank's own where there is no group."""
    if group is None:
        return [x]
    gathered: list[Any] = [None] * size(group)
    dist.all_gather_object(gathered, x, group)
    return gathered


def _bytes(spec: TensorSpec) -> int:
    shape, dtype = spec
    return torch.Size(shape).numel() * dtype.itemsize


def _pack(xs: Sequence[Tensor], device: torch.device) -> Tensor:
    if not xs:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in xs])


def _unpack(buffer: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    tensors, offset = [], 0
    for shape, dtype in specs:
        part = buffer[offset : offset + _bytes((shape, dtype))]
        offset += len(part)
        if part.storage_offset() % dtype.itemsize:
            part = part.clone()  # The one before it has a smaller dtype, so this one is not aligned.
        tensors.append(part.view(dtype).view(shape))
    return tensors
