"""Diagnostics of a training loop without Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import processes
from lightning_optim.processes import strategies

from .diagnostics import Diagnostics
from .loop import Loop
from .recorder import StepRecorder, when_gradients_are_there

#: First parts of the names of validation metrics.
_VALIDATION = ("val", "eval", "test")
_PRECISIONS = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-true",
    torch.float16: "16-true",
    torch.float64: "64-true",
}


class Watch:
    """Measures in any training loop what the callback :class:`.Diagnostics` measures in Lightning's Trainer.

    It listens to the optimizer, whose steps need not be announced, and never changes training. Three lines are enough::

        watch = Watch(model, optimizer, folder="runs/mine")
        ...
        watch.loss(loss)      # before each backward pass
        ...
        watch.close()         # after training; `with Watch(...) as watch:` does it also when training fails

    Values have the tags of the callback's. They go to TensorBoard's event files in ``folder``, of which
    ``lightning-optim diagnostics runs`` gives the verdict, and to ``loggers``. Models and optimizers may be wrapped by
    ``Fabric.setup``, accelerate's ``prepare``, ``DistributedDataParallel`` or ``torch.compile``, or sharded by
    ``fully_shard``. Under distributed training every rank has its own ``Watch``, and the first one writes.

    The gradient's norm is taken when the optimizer begins its step. If gradients are clipped before, call
    :meth:`before_clipping`, or ``gradient/norm`` is that of the clipped gradient. Probes of update variance (tier
    ``full``) need Lightning's Trainer and are left out after a warning.

    Args:
        model: The model that is trained, as it is called in the loop.
        optimizer: Its optimizer, or several.
        folder: Folder of the run, for event files and pictures; ``None`` for neither.
        diagnostics: What to measure; ``Diagnostics()`` by default. It also has the results: ``plot()``, ``summary()``,
            ``diagnosis()``.
        loggers: Objects with ``log_metrics(values, step=step)``, as those of Lightning and Fabric.
        accumulate: Micro-batches per step, by whose number the loop divides their losses.
        scaler: A ``torch.amp.GradScaler``, so that steps that it skips are counted. That of a Fabric or accelerate
            optimizer is found.
        max_steps: How many steps the run is to have, if known.

    Raises:
        ValueError: The optimizer has none of the model's parameters, ``accumulate`` is below 1, or the model is wrapped
            by FSDP1 or DeepSpeed, which hide parameters and gradients.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=2, quiet=True)) as watch:
        ...     for _ in range(8):
        ...         loss = model(torch.ones(16, 4)).square().mean()
        ...         watch.loss(loss)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> watch.diagnostics.run().scalars["training/loss"][0]  # the first two, and every second step
        [0, 1, 3, 5, 7]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        folder: str | Path | None = None,
        *,
        diagnostics: Diagnostics | None = None,
        loggers: Sequence[Any] = (),
        accumulate: int = 1,
        scaler: Any = None,
        max_steps: int | None = None,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"Watch: accumulate must be at least 1, got {accumulate!r}.")
        wrapped = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        optimizers = [_unwrapped_optimizer(o) for o in wrapped]
        *wrappers, module = _layers(model)
        if hidden := next((w for w in wrappers if type(w).__name__ in _HIDING), None):
            raise ValueError(
                f"Watch does not work with {type(hidden).__name__}, which hides parameters or gradients; use "
                "DistributedDataParallel or torch.distributed.fsdp.fully_shard."
            )
        known = set(module.parameters())
        for o in optimizers:
            if not any(p in known for group in o.param_groups for p in group["params"]):
                raise ValueError(
                    f"Watch: {type(o).__name__} has no parameter of {type(module).__name__}; give the model that it "
                    "trains, after both have been prepared."
                )
        self.diagnostics = Diagnostics() if diagnostics is None else diagnostics
        world = processes.world()
        first = world is None or processes.rank(world) == 0
        self._board = TensorBoardLogger(folder, name="", version="") if folder is not None and first else None
        found = next((x for x in map(_scaler_of, wrapped) if x is not None), None)
        self._loop = Loop(
            next((w for w in wrappers if strategies.averages_gradients(w)), module),
            optimizers,
            [*([self._board] if self._board else []), *loggers] if first else [],
            accumulate,
            found if scaler is None else scaler,
            -1 if max_steps is None else max_steps,
            _precision(wrapped[0], module, found if scaler is None else scaler),
            first,
            1 if world is None else processes.size(world),
        )
        inner: Any = module
        self._module = inner
        self._steps = dict.fromkeys(optimizers, 0)
        self._announced: set[Optimizer] = set()
        self._loss: Tensor | None = None
        self._scale = self._scale_now()
        self._in_step = self._stepped = self._closed = False
        place: Any = self._loop
        self.diagnostics.setup(place, inner, "fit")
        self._handles = [o.register_step_pre_hook(self._before_step) for o in optimizers]
        self.diagnostics.on_train_start(place, inner)
        self._handles += [o.register_step_post_hook(self._after_step) for o in optimizers]
        self._recorder = StepRecorder.of(self._loop)
        self._recorder.batch_start()

    # --- what the loop calls --------------------------------------------------------------------------------------

    def loss(self, loss: Tensor, batch_size: int | None = None) -> None:
        """To be called before each backward pass.

        Args:
            loss: The mean loss of the batch or micro-batch, not divided by ``accumulate``, not scaled.
            batch_size: Number of its examples, from which the gradient noise scale is computed where there are several
                micro-batches or ranks.

        Raises:
            ValueError: It is not one number.
        """
        if loss.numel() != 1:
            raise ValueError(f"Watch.loss: the loss must be one number, got one of shape {tuple(loss.shape)}.")
        place: Any = self._loop
        self._loss, before = loss.detach() / self._loop.accumulate_grad_batches, self._loss
        if not self._in_step:  # otherwise it is computed in the closure of a step
            self._end_batch(before)
            batch = None if batch_size is None else torch.empty(batch_size, 0)
            self.diagnostics.on_train_batch_start(place, self._module, batch, 0)
        self.diagnostics.on_before_backward(place, self._module, self._loss)

    def before_clipping(self, optimizer: Optimizer | None = None) -> None:
        """To be called when gradients are complete and unscaled, and before they are clipped.

        Args:
            optimizer: The one that is about to make a step; needed where there are several.

        Raises:
            ValueError: There are several.
        """
        if optimizer is None and len(self._steps) > 1:
            raise ValueError("Watch.before_clipping: say which of the optimizers is about to make a step.")
        self._announce(next(iter(self._steps)) if optimizer is None else _unwrapped_optimizer(optimizer))

    def validation(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Log validation metrics, which the verdict takes into account.

        Args:
            metrics: Values by names that begin with ``val``, ``eval`` or ``test``.

        Raises:
            ValueError: A name begins otherwise.
        """
        for name in metrics:
            if not name.lower().startswith(_VALIDATION):
                raise ValueError(
                    f"Watch.validation: {name!r} must begin with one of {', '.join(_VALIDATION)}, as in 'val/loss'."
                )
        self._end_batch(self._loss)
        values = {
            name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in metrics.items()
        }
        self._loop.enable_validation = True
        self._loop.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in self._loop.loggers:
            logger.log_metrics(values, step=self._loop.global_step)
        place: Any = self._loop
        self.diagnostics.on_validation_end(place, self._module)

    def close(self) -> None:
        """End the record, say the verdict, and leave the optimizer alone."""
        self._close(None)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should hold for diagnostics to go on where they were."""
        return {"steps": list(self._steps.values()), "diagnostics": self.diagnostics.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another ``Watch`` was when its :meth:`state_dict` was taken."""
        self._steps = dict(zip(self._steps, state_dict["steps"]))
        self._loop.global_step = max(self._steps.values())
        self.diagnostics.load_state_dict(state_dict["diagnostics"])

    # --- what the optimizer tells ---------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._in_step = True
        return when_gradients_are_there(args, kwargs, lambda: self._announce(optimizer))

    def _announce(self, optimizer: Optimizer) -> None:
        if optimizer in self._announced:
            return
        self._announced.add(optimizer)
        self._loop.global_step = self._steps[optimizer]
        place: Any = self._loop
        self.diagnostics.on_after_backward(place, self._module)
        self.diagnostics.on_before_optimizer_step(place, self._module, optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self._announced:
            return  # The step of a subclass has called that of its base.
        self._announced.discard(optimizer)
        self._in_step, self._stepped = False, True
        self._count(optimizer)
        self._end_batch(self._loss, after_step=True)

    def _count(self, optimizer: Optimizer) -> None:
        self._steps[optimizer] += 1
        self._loop.global_step = max(self._steps.values())

    def _end_batch(self, loss: Tensor | None, after_step: bool = False) -> None:
        """End a batch, if its loss is known, and begin the next one, which takes the time up to its own end."""
        place: Any = self._loop
        self._in_step = False
        if not after_step:
            self._note_skipped_steps()
        if loss is not None:
            self.diagnostics.on_after_backward(place, self._module)
        self.diagnostics.on_train_batch_end(place, self._module, loss, None, 0)
        self._recorder.batch_start()
        if self._loss is loss:
            self._loss = None

    def _note_skipped_steps(self) -> None:
        """Count steps that were announced and not made, and those of which the optimizer has heard nothing.

        A scaler that lowers its scale has left out a step.
        """
        before, self._scale = self._scale, self._scale_now()
        lowered = before is not None and self._scale is not None and self._scale < before
        if lowered and not self._stepped:
            for optimizer in self._steps:
                self._announce(optimizer)
        for optimizer in self._announced:
            self._count(optimizer)
        self._announced.clear()
        self._stepped = False

    def _scale_now(self) -> float | None:
        return None if self._loop.scaler is None else float(self._loop.scaler.get_scale())

    def _close(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._closed = True
        place: Any = self._loop
        self._end_batch(self._loss)
        if error is None:
            self.diagnostics.on_train_end(place, self._module)
        else:
            self.diagnostics.on_exception(place, self._module, error)
        self.diagnostics.teardown(place, self._module, "fit")
        for handle in self._handles:
            handle.remove()
        if self._board is not None:
            self._board.finalize("success" if error is None else "failed")

    # --- Hugging Face ---------------------------------------------------------------------------------------------

    @staticmethod
    def transformers_callback(folder: str | Path | None = None, diagnostics: Diagnostics | None = None) -> Any:
        """A callback for the Trainer of Hugging Face's transformers: ``Trainer(..., callbacks=[it])``.

        It takes the loss from the model's output, and the rest from the Trainer. Gradients are seen after the Trainer
        has clipped them (``max_grad_norm``), since it calls no callback before.

        Args:
            folder: As for the constructor, also the next one.
            diagnostics: What to measure.

        Returns:
            A ``transformers.TrainerCallback``, whose attribute ``watch`` is the :class:`Watch` once training has begun.

        Raises:
            ModuleNotFoundError: transformers is not installed.
        """
        try:
            from transformers import TrainerCallback
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Watch.transformers_callback needs transformers: pip install transformers"
            ) from error

        class WatchCallback(TrainerCallback):  # type: ignore[misc]
            watch: Watch | None = None

            def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
                model, optimizer = objects["model"], objects["optimizer"]
                accumulate = args.gradient_accumulation_steps
                self.watch = watch = Watch(
                    model, optimizer, folder, diagnostics=diagnostics, accumulate=accumulate, max_steps=state.max_steps
                )
                watch._steps = dict.fromkeys(watch._steps, state.global_step)
                if args.bf16 or args.fp16:
                    watch._loop.precision = "bf16-mixed" if args.bf16 else "16-mixed"
                hook = _loss_hook(watch, args)
                self.handle = model.register_forward_hook(hook, with_kwargs=True)

            def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **objects: Any) -> None:
                if self.watch is None or self.watch._closed or not metrics:
                    return
                numbers = {name: x for name, x in metrics.items() if isinstance(x, (int, float))}
                self.watch.validation({n: x for n, x in numbers.items() if n.startswith("eval_") and _is_metric(n)})

            def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
                if self.watch is not None:
                    self.handle.remove()
                    self.watch.close()

        return WatchCallback()


#: Wrappers, by the names of their classes, that hide parameters or gradients.
_HIDING = ("FullyShardedDataParallel", "DeepSpeedEngine")


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """A model's wrappers from the outside to the inside, and the model itself."""
    yield model
    for name in ("_forward_module", "_orig_mod", "module"):
        # Of Fabric; of torch.compile; and of what distributes a model. Other modules may have a part of such a name.
        if isinstance(inner := model._modules.get(name), nn.Module) and type(model).__name__ in _WRAPPERS:
            yield from _layers(inner)
            return


_WRAPPERS = ("_FabricModule", "OptimizedModule", "DistributedDataParallel", "DataParallel", *_HIDING)


def _unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer itself, without those of Fabric and accelerate around it."""
    while hasattr(type(optimizer), "optimizer") or _is_accelerated(optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"Watch: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return optimizer


def _is_accelerated(optimizer: Any) -> bool:
    return type(optimizer).__name__ == "AcceleratedOptimizer"


def _scaler_of(optimizer: Any) -> Any:
    """The loss scaler of a wrapper of Fabric or accelerate."""
    if _is_accelerated(optimizer):
        return optimizer.scaler
    return getattr(getattr(getattr(optimizer, "_strategy", None), "precision", None), "scaler", None)


def _precision(optimizer: Any, module: nn.Module, scaler: Any) -> str:
    of_fabric = getattr(getattr(getattr(optimizer, "_strategy", None), "precision", None), "precision", None)
    if isinstance(of_fabric, str):
        return of_fabric
    if scaler is not None:
        return "16-mixed"
    return _PRECISIONS.get(next((p.dtype for p in module.parameters()), torch.float32), "")


def _loss_hook(watch: Watch, args: Any) -> Callable[..., None]:
    def note(model: nn.Module, inputs: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not (model.training and torch.is_grad_enabled()):
            return
        if kwargs.get("num_items_in_batch") is not None:
            # The sum over the micro-batch, divided by the number of tokens in the step, of all ranks or of this one.
            ranks = watch._loop.world_size if args.average_tokens_across_devices else 1
            loss = loss * args.gradient_accumulation_steps * ranks
        tokens = next((x for x in kwargs.values() if isinstance(x, Tensor) and x.ndim), None)
        watch.loss(loss, None if tokens is None else len(tokens))

    return note


def _is_metric(name: str) -> bool:
    """Whether a value of Hugging Face's evaluation says something of the model, and not of the time that it took."""
    return not name.endswith(("_runtime", "_per_second")) and name != "eval_model_preparation_time"
