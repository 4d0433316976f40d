"""How much of the updates is noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim.diagnostics.charts import CHARTS, Chart
from lightning_optim.diagnostics.parameter_change import sample
from lightning_optim.diagnostics.update_variance import (
    conditional_sums,
    conditional_variance,
    noise_share,
    noise_to_signal,
    online_sums,
    running_moments,
)
from lightning_optim.diagnostics.what_if import VirtualOptimizer, fork_rng, gradients_of, parameters_of
from lightning_optim.processes import all_gather_equal, local, strategies, world
from lightning_optim.trainer import is_lightning

from .isolation import StandInTrainer, classes_of, isolated_steps, kept_globals, kept_state, not_isolated
from .loop import Loop
from .monitor import ProbingMonitor, Results, layers_of
from .recorder import Step, StepRecorder


class UpdateVariance(ProbingMonitor):
    r"""Variance of the updates, :math:`V = \mathbb{E}\,\|d - \mathbb{E} d\|^2`, and its ratio to
    :math:`\|\mathbb{E} d\|^2`.

    ===================================== ===========================================================================
    ``update_variance/online``            :math:`V` over the steps measured lately, in squared units of the weights
    ``update_variance/online_ratio``      its ratio to :math:`\|\mathbb{E} d\|^2`, both without bias
    ``update_variance/online_share``      its share of :math:`\mathbb{E}\,\|d\|^2`, from 0 to 1
    ``update_variance/conditional``       :math:`V` over mini-batches, from the state the optimizer is in
    ``update_variance/conditional_ratio`` its ratio to :math:`\|\mathbb{E} d\|^2`, both without bias
    ``update_variance/conditional_share`` its share of :math:`\mathbb{E}\,\|d\|^2`, from 0 to 1
    ``update_variance/cosine_spread``     1 - mean cosine between the update from a mini-batch and the mean of these
    ``update_variance/batches``           how many mini-batches that were
    ===================================== ===========================================================================

    *Online* is cheap: mean and variance over the measured steps, weighted by ``decay ** i``, of at most 4,096 elements
    of each parameter. It holds the change of the weights in the meantime, too, and it is unbiased for updates that are
    not correlated: measured in steps closer together than the optimizer's momentum lasts (10 steps at 0.9), it comes
    out too small.

    *Conditional* is a probe, made every ``probe_every_n_steps``: the updates that the optimizer would make from each of
    several mini-batches are compared, as made on copies of the optimizer
    (:class:`lightning_optim.diagnostics.VirtualOptimizer`). The mini-batches are, by ``source``,

    - ``"batches"``: additional ones, drawn uniformly from the training data with a generator of their own, of the
      loader's batch size, run through a copy of the LightningModule. Costs that many forward and backward passes.
      Global random numbers are put back; a data set that draws from a generator of its own sees the reads;
    - ``"accumulation"``: those of ``accumulate_grad_batches``, on one process;
    - ``"ranks"``: those of the processes under DDP, before their gradients are averaged. All processes gather the
      sampled elements of all updates: one more collective per probe.

    Their gradients are clipped as the Trainer clips (but not by an overridden ``configure_gradient_clipping``). A
    mini-batch is smaller than what the real step averages over accumulation and processes, so its variance is larger.
    Statistics are of at most 4,096 elements of each parameter, scaled up. A ratio whose denominator is not known to be
    positive, as where noise hides the mean, is not logged. Until it is done, a probe holds a copy of the optimizer's
    state and five of the parameters: gradients and changes are as large.

    Args:
        every_n_steps: Measure *online* every so many optimizer steps, or where a function of the step is true.
        first_n_steps: Measure each of the first so many steps, too.
        parameters: Shell-style patterns of the names of parameters to measure.
        layers: Shell-style patterns of the names of parameters whose own values are logged, too.
        decay: Weight of a measured step relative to the next in *online*; 0.9 remembers about ten.
        probe_every_n_steps: Probe every so many optimizer steps; ``None`` for never.
        source: Where the mini-batches of a probe come from.
        batches: How many ``"batches"`` a probe draws.
        seed: Seed of these.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: The run does not have the mini-batches asked for.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> variance = UpdateVariance(every_n_steps=2, probe_every_n_steps=4, batches=3)
        >>> trainer = pl.Trainer(max_steps=8, callbacks=[variance], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> [len(variance.history[f"update_variance/{name}"]) for name in ("online", "conditional")]
        [3, 2]
    """

    family = "update_variance"
    charts: ClassVar = CHARTS["update_variance"]

    def __init__(
        self,
        every_n_steps: int | Callable[[int], bool] = 50,
        first_n_steps: int = 0,
        parameters: Sequence[str] = ("*",),
        layers: Sequence[str] = (),
        decay: float = 0.9,
        probe_every_n_steps: int | None = None,
        source: Literal["batches", "accumulation", "ranks"] = "batches",
        batches: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, first_n_steps, parameters, layers)
        if not 0 <= decay < 1:
            raise ValueError(f"UpdateVariance: decay must be in [0, 1), got {decay!r}.")
        if probe_every_n_steps is not None and probe_every_n_steps < 1:
            raise ValueError(
                f"UpdateVariance: probe_every_n_steps must be None or at least 1, got {probe_every_n_steps!r}."
            )
        if source not in _SOURCES:
            raise ValueError(f"UpdateVariance: source must be one of {', '.join(_SOURCES)}, got {source!r}.")
        if batches < 2:
            raise ValueError(f"UpdateVariance: batches must be at least 2 to have a variance, got {batches!r}.")
        self.decay = decay
        self.probe_every_n_steps = probe_every_n_steps
        self.source = source
        self.batches = batches
        self.seed = seed
        self._source: _Source | None = None
        self._updates: list[list[Tensor]] = []

    def charts_of(self, trainer: pl.Trainer) -> Mapping[str, Chart]:
        return {title: chart for title, chart in self.charts.items() if self.can_probe or "mini-batches" not in title}

    # --- values -------------------------------------------------------------------------------------------------

    def before_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> bool:
        self._updates = []
        if self._source is not None and self.probes(step.index):
            with self.probing():
                self._updates = self._source.collect(step)
            if not self.can_probe:  # Another process cannot.
                self._updates = []
        return bool(step.watched)

    def sums(self, step: Step) -> dict[str, Tensor]:
        updates = step.sampled(step.change.updates)
        numel = step.change.numel
        means = self.remembered(step, "mean", updates)
        moments = torch.stack(self.remembered(step, "moments", [numel.new_zeros(3)] * len(updates)))
        means, moments = running_moments(updates, means, moments, self.decay)
        self.remember(step, "mean", means)
        self.remember(step, "moments", moments.unbind())
        sums = {"numel": numel, "sampled": numel.new_tensor([u.numel() for u in updates])}
        sums |= {f"online_{name}": x for name, x in online_sums(means, moments).items()}
        if len(self._updates) > 1:
            sums |= {f"probe_{name}": x for name, x in conditional_sums(self._updates).items()}
        return sums

    def results(self, step: Step, sums: dict[str, Tensor]) -> Results:
        of_all = sums["numel"] / sums["sampled"].clamp(min=1)
        scaled = {name: x * of_all for name, x in sums.items()}
        online, probe = _of("online_", scaled), _of("probe_", scaled)
        together = _statistics(online, probe, lambda x: x.sum())
        each = layers_of(step, _statistics(online, probe, lambda x: x))
        values = {name: float(x) for name, x in together.items()}
        if probe:
            values["batches"] = float(len(self._updates))
        self._updates = []
        return Results(values, each)

    # --- hooks --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.probe_every_n_steps is None:
            return
        with self.probing(starting=True):
            if isinstance(trainer, Loop):
                raise MisconfigurationException(
                    "a probe of update variance repeats training_step on other batches, for which it needs Lightning's "
                    "Trainer."
                )
            if not pl_module.automatic_optimization:
                raise MisconfigurationException(
                    "UpdateVariance: a probe repeats what automatic optimization does, which "
                    f"{type(pl_module).__name__} does not use; leave probe_every_n_steps out."
                )
            self._source = _SOURCES[self.source](self, trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._source is not None and self.probes(self._counts.get("", 0) + 1):
            self._source.batch_start()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._source is not None and self.probes(self._counts.get("", 0) + 1):
            with StepRecorder.of(trainer).clock, torch.no_grad(), self.probing():
                self._source.after_backward()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._forget()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._forget()
        super().on_exception(trainer, pl_module, exception)

    def _forget(self) -> None:
        if self._source is not None:
            self._source.close()
        self._source, self._updates = None, []


def _statistics(
    online: dict[str, Tensor], probe: dict[str, Tensor], of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    variance, mean_sq = of(online["variance"]), of(online["mean_sq"])
    values = {
        "online": variance,
        "online_ratio": noise_to_signal(variance, mean_sq),
        "online_share": noise_share(variance, mean_sq),
    }
    return values | (conditional_variance(**{name: of(x) for name, x in probe.items()}) if probe else {})


def _of(prefix: str, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in sums.items() if name.startswith(prefix)}


def _sampled(step: Step, update: Mapping[Tensor, Tensor]) -> list[Tensor]:
    return [x.clone() for x in step.sampled([local(update[w.parameter]) for w in step.watched])]


# --- where mini-batches come from -------------------------------------------------------------------------------


class _Source:
    """Makes the updates of mini-batches. In a batch whose step is probed, its methods are called in this order."""

    def __init__(self, monitor: UpdateVariance, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.monitor, self.trainer, self.module = monitor, trainer, module

    def batch_start(self) -> None:
        """Called before the forward pass."""

    def after_backward(self) -> None:
        """Called after the backward pass, of every micro-batch."""

    def collect(self, step: Step) -> list[list[Tensor]]:
        """Called before the optimizer's step. Samples of the update of each mini-batch, for the step's parameters."""
        raise NotImplementedError

    def close(self) -> None:
        """Called at the end of training."""

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by in mixed precision."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def update(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What the optimizer would do with gradients, which may still be multiplied by the loss scale."""
        scale = self.loss_scale
        gradients = gradients if scale == 1 else {p: g / scale for p, g in gradients.items()}
        optimizer = self.trainer.optimizers[0]
        with isolated_steps(optimizer):
            return VirtualOptimizer(optimizer, clipping(self.trainer)).step(gradients)


class _Accumulation(_Source):
    def __init__(self, monitor: UpdateVariance, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().__init__(monitor, trainer, module)
        if trainer.world_size > 1:
            raise MisconfigurationException(
                "UpdateVariance(source='accumulation') works on one process, since the last micro-batch's gradient is "
                "added up with those of other processes; use source='ranks'."
            )
        if trainer.accumulate_grad_batches < 2:
            raise MisconfigurationException(
                "UpdateVariance(source='accumulation') needs Trainer(accumulate_grad_batches=N) with N of at least 2; "
                "use source='batches'."
            )
        self._before: dict[Tensor, Tensor] = {}
        self._updates: list[dict[Tensor, Tensor]] = []

    def after_backward(self) -> None:
        now = gradients_of(self.trainer.optimizers[0])
        # Lightning divides the loss by that number.
        n = self.trainer.accumulate_grad_batches
        gradients = {p: (g - self._before[p] if p in self._before else g) * n for p, g in now.items()}
        self._updates.append({p: sample(local(u)).clone() for p, u in self.update(gradients).items()})
        self._before = {p: g.clone() for p, g in now.items()}

    def collect(self, step: Step) -> list[list[Tensor]]:
        updates = [[update[w.parameter] for w in step.watched] for update in self._updates]
        self._before, self._updates = {}, []
        return updates


class _Ranks(_Source):
    def __init__(self, monitor: UpdateVariance, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().__init__(monitor, trainer, module)
        if not strategies.averages_gradients(trainer.strategy):
            raise MisconfigurationException(
                "UpdateVariance(source='ranks') needs at least two processes with strategy='ddp', got "
                f"{type(trainer.strategy).__name__} and {trainer.world_size}; use source='batches'."
            )
        self._gradients: dict[Tensor, Tensor] = {}
        self._handles: list[Any] = []

    def batch_start(self) -> None:
        # DDP averages a gradient after these hooks. With accumulation, the last call sees it complete.
        if not self._handles:
            parameters = parameters_of(self.trainer.optimizers[0])
            self._handles = [p.register_post_accumulate_grad_hook(self._keep) for p in parameters if p.requires_grad]

    def _keep(self, p: Tensor) -> None:
        self._gradients[p] = p.grad.clone()  # type: ignore[union-attr]

    def collect(self, step: Step) -> list[list[Tensor]]:
        gradients = self._gradients
        self.close()
        return all_gather_equal(_sampled(step, self.update(gradients)), world()) if step.watched else []

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._gradients = [], {}


class _Batches(_Source):
    def __init__(self, monitor: UpdateVariance, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().__init__(monitor, trainer, module)
        loader = trainer.train_dataloader
        what = type(loader).__name__
        if isinstance(loader, DataLoader):
            if loader.batch_size is not None and not isinstance(loader.dataset, IterableDataset):
                return
            what = f"one over {type(loader.dataset).__name__} with batch_size={loader.batch_size}"
        raise MisconfigurationException(
            "UpdateVariance(source='batches') draws from a single DataLoader with a batch_size over a dataset with "
            f"indices, got {what}; use source='accumulation' or 'ranks'."
        )

    def collect(self, step: Step) -> list[list[Tensor]]:
        optimizer = self.trainer.optimizers[0]
        with (
            kept_globals(classes_of(self.module)),
            kept_state(self._shared()),
            isolate_rng(include_cuda=False),
            fork_rng(self.module.device),
            torch.enable_grad(),
        ):
            module = self._copy()
            real: dict[Tensor, Tensor] = dict(zip(module.parameters(), self.module.parameters()))
            updates = []
            for number, batch in enumerate(self._draw(step.index)):
                module.zero_grad()
                # The copy may still reach what is not part of the module.
                with _without_gradients(parameters_of(optimizer)):
                    self._backward(module, batch, number)
                    outside = gradients_of(optimizer)
                gradients = outside | {p: copied.grad for copied, p in real.items() if copied.grad is not None}
                updates.append(_sampled(step, self.update(gradients)))
        return updates

    def _shared(self) -> list[Any]:
        """What a training step of the copy, and the loading of its data, can reach of the run."""
        loader: DataLoader[Any] = self.trainer.train_dataloader  # type: ignore[assignment]
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return [loader.dataset, loader.collate_fn, getattr(self.trainer, "datamodule", None), *schedulers, *groups]

    def _copy(self) -> pl.LightningModule:
        try:
            module = copy.deepcopy(self.module)
        except Exception as error:
            raise MisconfigurationException(
                f"UpdateVariance(source='batches') needs a copy of {type(self.module).__name__}, which cannot be made: "
                f"{error}. Use source='accumulation' or 'ranks'."
            ) from error
        if module._compiler_ctx is not None:  # Its compiled steps are still those of the real module.
            to_uncompiled(module)
        if reason := not_isolated(module):
            raise MisconfigurationException(
                f"UpdateVariance(source='batches') runs a copy of {type(self.module).__name__}, and {reason}, which "
                "the copy would share with the module that is trained. Use source='accumulation' or 'ranks'."
            )
        self._trainer = StandInTrainer(self.trainer)
        module.trainer = self._trainer  # type: ignore[assignment]
        for part in module.modules():
            if is_lightning(part, "LightningModule"):  # What it logs is not that of the run.
                part.log = part.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
        return module

    def _draw(self, index: int) -> Iterator[Any]:
        loader: DataLoader[Any] = self.trainer.train_dataloader  # type: ignore[assignment]
        draws = DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            shuffle=True,
            collate_fn=loader.collate_fn,
            drop_last=len(loader.dataset) >= loader.batch_size,  # type: ignore[arg-type, operator]
            generator=torch.Generator().manual_seed(self.monitor.seed + index),
        )
        remaining = self.monitor.batches
        while remaining:
            for _, batch in zip(range(remaining), draws):
                remaining -= 1
                yield batch

    def _backward(self, module: pl.LightningModule, batch: Any, number: int) -> None:
        # What Lightning does between the loader and the optimizer.
        plugin = self.trainer.precision_plugin
        batch = plugin.convert_input(batch)
        device = self.trainer.strategy.root_device
        for hook, *more in (
            ("on_before_batch_transfer", 0),
            ("transfer_batch_to_device", device, 0),
            ("on_after_batch_transfer", 0),
        ):
            owner = self.trainer._data_connector._datahook_selector.get_instance(hook)  # type: ignore[union-attr]
            batch = getattr(module if owner is self.module else owner, hook)(batch, *more)
        numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with plugin.train_step_context():
            output = module.training_step(batch, number) if numbered else module.training_step(batch)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor):
            (loss * self.loss_scale).backward()


@contextmanager
def _without_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters have no gradients for the time being, and the same as before afterwards."""
    gradients = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for p, g in zip(parameters, gradients):
            p.grad = g


_SOURCES: dict[str, type[_Source]] = {"batches": _Batches, "accumulation": _Accumulation, "ranks": _Ranks}


def clipping(trainer: pl.Trainer) -> Callable[[Optimizer], None] | None:
    """What clips the gradients of an optimizer as the Trainer does, if it does."""
    if not trainer.gradient_clip_val:
        return None
    algorithm: dict[str, Any] = (
        {} if trainer.gradient_clip_algorithm is None else {"gradient_clip_algorithm": trainer.gradient_clip_algorithm}
    )
    return partial(trainer.precision_plugin.clip_gradients, clip_val=trainer.gradient_clip_val, **algorithm)
