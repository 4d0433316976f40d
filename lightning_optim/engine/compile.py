"""Rules compiled to one kernel each, whatever the model.

A rule's function is traced once, on vectors of symbolic length and with its hyperparameters as 0-d tensors, and
compiled by Inductor. Dynamo (``torch.compile``'s front end) is left out on purpose: a traced function has no guards, so
it is never recompiled, and a call costs 4 microseconds instead of 60. What :func:`torch.compile` would
specialise on, dtypes, device and switches (booleans, strings, ``None``), is the key under which a kernel is kept.

What this takes from torch is private: ``torch._inductor.compile_fx.compile_fx_inner`` and the symbols of
``torch.fx.experimental`` in :func:`_compile` and :func:`_hoist`, checked with torch 2.9 to 2.15. Where they fail, the
same trace goes through :func:`torch.compile`, with numbers as 0-d tensors: slower, and still much faster than eager
operations.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from .call import call
from .hyperparameters import is_number

#: Length of the vectors a kernel is traced on: long enough for Inductor to share the loop among threads.
_EXAMPLE = 2**16
#: Parts that :func:`peak` reads side by side; a power of two.
_STREAMS = 8
#: Older versions of Inductor do not take floating-point numbers by value.
_BY_VALUE = torch.__version__ >= "2.11"


@dataclass(frozen=True)
class Kernel:
    """A compiled function.

    Args:
        prepare: From the numbers to what the kernel takes in their place.
        run: The kernel, called with a list of its arguments.
    """

    prepare: Callable[[tuple[float, ...]], Sequence[float | Tensor]]
    run: Callable[[list[Any]], Any]


_kernels: dict[Any, Kernel] = {}


def compilations() -> int:
    """How many kernels this process has compiled."""
    return len(_kernels)


def runner(
    function: Callable[..., Any],
    p: Tensor,
    g: Tensor,
    grad_scale: float | Tensor,
    finite: Tensor | None,
    state: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    noisy: bool,
) -> Callable[..., Any]:
    """:func:`.call.call` of ``function`` with these scalars on vectors of the same kinds as those given, compiled.

    Compiles now if it has to; nothing is updated. ``noisy`` says whether there will be random numbers.

    Returns:
        ``run(p, g, grad_scale, state, noise)``; a ``grad_scale`` that is a number has to be the one given here.
    """
    numbers = {name: float(x) for name, x in scalars.items() if is_number(x) or _on_host(x)}
    tensors = {name: x for name, x in scalars.items() if isinstance(x, Tensor) and name not in numbers}
    switches = {name: x for name, x in scalars.items() if name not in tensors and name not in numbers}
    own_scale = isinstance(grad_scale, Tensor)
    key = (
        function, p.dtype, g.dtype, own_scale, finite is not None,
        tuple((name, x.dtype) for name, x in state.items()),
        tuple(numbers), tuple((name, x.dtype) for name, x in tensors.items()), tuple(switches.items()),
        p.device, torch.get_num_threads(), noisy,
    )  # fmt: skip
    values = (*numbers.values(), 1.0 if isinstance(grad_scale, Tensor) else grad_scale)
    kernel = _kernels.get(key)
    if kernel is None:

        def flat(*args: Tensor) -> Any:
            rest = iter(args)
            p, *vectors, gradient = [next(rest) for _ in range(2 + len(state))]
            noise = next(rest) if noisy else None
            factor = next(rest) if own_scale else None
            verdict = None if finite is None else next(rest)
            given = {name: next(rest) for name in (*tensors, *numbers)} | switches
            common_factor = next(rest)
            factor = common_factor if factor is None else factor
            return call(function, p, gradient, factor, verdict, dict(zip(state, vectors)), given, noise) or ()

        dtypes = [x.dtype for x in (p, *state.values(), g)] + [torch.int64] * noisy
        others = [x for x in (grad_scale, finite, *tensors.values()) if isinstance(x, Tensor)]

        def example(length: int) -> list[Tensor]:
            return [torch.zeros(length, dtype=dtype, device=p.device) for dtype in dtypes] + others

        kernel = _compile_apart(flat, example(_EXAMPLE), values)
        # One that cannot be launched, or is bound to the example's length, has to fail before it has updated anything.
        kernel.run([*example(7), *kernel.prepare(values)])
        _kernels[key] = kernel
    fixed = [*([] if finite is None else [finite]), *tensors.values(), *kernel.prepare(values)]

    def run(p: Tensor, g: Tensor, grad_scale: float | Tensor, state: Mapping[str, Tensor], noise: Tensor | None) -> Any:
        others = [*([] if noise is None else [noise]), *([grad_scale] if own_scale else [])]
        return kernel.run([p, *state.values(), g, *others, *fixed])

    return run


def peak(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The largest absolute value in a vector of 64 elements or more, NaN if it holds one; compiled.

    Parts are read side by side: a core reads several places of memory in turn about twice as fast as one after another.
    """
    key = (peak, dtype, device, torch.get_num_threads())
    kernel = _kernels.get(key)
    if kernel is None:

        def largest(x: Tensor) -> tuple[Tensor]:
            n = x.shape[0]
            length = (n + _STREAMS - 1) // _STREAMS
            starts = [i * length for i in range(_STREAMS - 1)] + [n - length]
            parts = [x.narrow(0, start, length).abs() for start in starts]
            while len(parts) > 1:
                parts = [torch.maximum(a, b) for a, b in zip(parts[::2], parts[1::2])]
            return (parts[0].amax(),)

        kernel = _kernels[key] = _compile_apart(largest, [torch.zeros(_EXAMPLE, dtype=dtype, device=device)], ())
    run = kernel.run
    return lambda x: run([x])[0]


def _on_host(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cpu


@lru_cache(maxsize=64)
def _as_tensors(numbers: tuple[float, ...]) -> tuple[Tensor, ...]:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").unbind()


def _compile_apart(function: Callable[..., Any], example: list[Tensor], numbers: tuple[float, ...]) -> Kernel:
    """Compile in a thread of its own, by torch's private interface or else by its public one.

    The caller's profiler (which reads shapes and so fixes the symbolic length), autocast, default device and other
    modes would become part of the kernel.
    """
    thread, threads = _thread(os.getpid()), torch.get_num_threads()
    try:
        return thread.submit(copy_context().run, _compile, function, example, numbers, threads).result()
    except (ImportError, AttributeError, TypeError):  # What another version of torch answers.
        return thread.submit(copy_context().run, _compile_publicly, function, example, numbers).result()


@cache
def _thread(process: int) -> ThreadPoolExecutor:
    # Kept, since torch 2.11 crashes where the first thread that traced is gone; a forked process has none of it.
    return ThreadPoolExecutor(1)


@torch.no_grad()
def _compile(function: Callable[..., Any], example: list[Tensor], numbers: tuple[float, ...], threads: int) -> Kernel:
    # Imported here because these imports take seconds, and most runs do not compile.
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(
        torch.func.functionalize(function), tracing_mode="symbolic", decomposition_table=select_decomp_table()
    )
    graph = trace(*example, *_as_tensors(numbers))
    by_value = _BY_VALUE and all(x.is_cpu and x.dtype != torch.float64 for x in example)
    prepare = _hoist(graph, len(numbers)) if by_value else _as_tensors
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    # Part of Inductor's own cache key, so that a process with other threads does not find this process's kernel.
    # Contracted, a product and a sum are one instruction and one rounding, as in torch's own loops.
    flags = {"cpp.threads": threads, "cpp.enable_floating_point_contract_flag": "fast"}
    with config.patch(flags), torch.accelerator.device_index(example[0].device.index):
        return Kernel(prepare, compile_fx_inner(graph, inputs))


@torch.no_grad()
def _compile_publicly(function: Callable[..., Any], example: list[Tensor], numbers: tuple[float, ...]) -> Kernel:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(torch.func.functionalize(function), tracing_mode="symbolic")(*example, *_as_tensors(numbers))
    compiled = torch.compile(graph, dynamic=True, fullgraph=True)

    @torch.no_grad()
    def run(arguments: list[Any]) -> Any:
        return compiled(*arguments)

    return Kernel(_as_tensors, run)


def _hoist(module: fx.GraphModule, count: int) -> Callable[[tuple[float, ...]], list[float]]:
    """Move the arithmetic among the last ``count`` inputs, numbers all, out of the graph, which then takes its results.

    The kernel gets them by value. Read from memory they would be read again for every vector register, since to the
    C++ compiler they could have changed with whatever the loop has stored; that halves the speed in cache. By value
    they are float32, to which eager arithmetic rounds them too, but only after all arithmetic in float64.

    Returns:
        The arithmetic.
    """
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    numbers = inputs[len(inputs) - count :]
    outside = fx.Graph()
    moved = {node: outside.placeholder(node.name) for node in numbers}
    for node in graph.nodes:
        operation = _ARITHMETIC.get(str(node.target))
        if operation and not node.kwargs and all(x in moved or isinstance(x, (int, float)) for x in node.args):
            moved[node] = outside.call_function(operation, tuple(moved.get(x, x) for x in node.args))
    results = [node for node in moved if any(user not in moved for user in node.users)]
    outside.output([moved[node] for node in results])
    arithmetic = fx.GraphModule({}, outside)

    shape_env = inputs[0].meta["val"].fake_mode.shape_env
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first), shape_env.ignore_fresh_unbacked_symbols():
        values = [graph.placeholder(f"{node.name}_value") for node in results]
        for node, value in zip(results, values):
            value.meta["val"] = shape_env.create_unbacked_symfloat()
            scalar = graph.call_function(torch.ops.aten.scalar_tensor.default, (value,), {"dtype": torch.float32})
            node.replace_all_uses_with(scalar, delete_user_cb=lambda user: user not in moved)
    for node in reversed(moved):
        graph.erase_node(node)
    module.recompile()
    return lambda numbers: arithmetic(*numbers)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": operator.add,
    "aten.sub.Tensor": operator.sub,
    "aten.mul.Tensor": operator.mul,
    "aten.div.Tensor": operator.truediv,
    "aten.neg.default": operator.neg,
}
