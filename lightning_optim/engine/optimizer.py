"""The engine: the only :class:`torch.optim.Optimizer` with a ``step``.

:class:`RuleOptimizer` owns parameter groups, state, step counts, the verdict on non-finite gradients and
checkpoints. :class:`~.two_rules.MatrixOptimizer` builds on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from operator import is_
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
from torch import Tensor

from .. import processes
from ..devices import read_later
from ..processes import ProcessGroup
from . import checkpoint, decay, declare, formats, owned_state, storage, switches
from .batch import Batch, SharedStep, prepare, usable_gradient, write_step_counts
from .checkpoint import CheckpointError
from .gradients import inspect_gradients
from .hyperparameters import NUMBERS, count, satisfies
from .losses import RunningStatistics, loss_of, mean_loss
from .plain_values import is_plain, plain_hyperparameters
from .rounding import RESIDUAL, Rounding, load, residual_dtype
from .rule import OPTIONAL, MatrixRule, ModelRule, Rule, as_attributes, averages_of, entry
from .state import expected_state, has_begun, has_owner, load_state, state_shapes
from .step import Backend, run_rules
from .storage import StateDtype

if TYPE_CHECKING:
    from .cuda_graphs import StepGraphs

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: Precisions of gradients that are used as they are.
_DIRECT = (torch.float32, torch.bfloat16, torch.float16)
#: Arguments that hold for all parameters, not for a group of them.
_OPTIONS = {"skip_nonfinite", "max_consecutive_skips", "backend", "rounding", "state_dtype"}


class NonFiniteGradientsError(RuntimeError):
    """Gradients were NaN or infinite for too many steps in a row; nothing has changed since the last finite ones."""


class RuleOptimizer(torch.optim.Optimizer, Rule):
    """Base of all optimizers here: a rule that runs itself, on the parameters of its groups.

    What holds for every one of them:

    - ``step(closure)`` works as PyTorch and Lightning call it; ``p.grad`` is never modified; parameters without a
      gradient are left alone.
    - State is float32 (float64 for float64 parameters), also after ``load_state_dict``, and consists of tensors. It
      follows parameters that are cast or moved.
    - Hyperparameters that are edited in ``param_groups`` are validated at the next step; a step that is refused has
      changed nothing.
    - A step whose gradients hold NaN or infinity changes nothing and is counted in :attr:`skipped_steps`, unless
      ``skip_nonfinite=False``. Gradients so large that their squares would overflow are scaled down first, per
      tensor, to ``finfo.max ** 0.4`` (about 2.6e15 in float32).

    Args:
        params: Parameters, named parameters or parameter groups.
        maximize: Ascend instead of descend.
        skip_nonfinite: Skip and count steps whose gradients hold NaN or infinity.
        backend: How the step is run. All ways give the same result within rounding, and a checkpoint of one loads in
            any other.

            - ``"plain"``: one parameter at a time: the reference, easy to step through.
            - ``"chunked"``: small tensors joined, large ones cut into pieces that stay in cache, equal matrices
              stacked. Needs no compiler.
            - ``"compiled"``: as chunked, with each element-wise rule as one kernel, compiled once (about 5 s, about
              1 s where Inductor's cache holds it) for any model and any hyperparameters. Needs a C++ compiler, for
              GPUs Triton. On a CPU its threads wait for one another: beside processes that keep the cores busy
              (data loading) it can become slower than ``"chunked"``.
            - ``"auto"``: compiled for 8 million elements or more, where it saves milliseconds per step, otherwise
              chunked; chunked with a warning where compiling fails.
        rounding: How the float32 result of a step is stored in parameters of bfloat16 and float16; without effect on
            others. Rounded to nearest, bfloat16 forgets every update below 1/512 of the weight, float16 below 1/4096.
            Two of the others keep what was rounded off in a state tensor ``"residual"`` of the parameter's shape, two
            bytes per parameter; a run that goes on from a checkpoint without one starts with zeros.

            - ``"nearest"``: nothing is kept.
            - ``"stochastic"``: up or down at random with the odds that make the mean right. The random numbers of
              successive steps are evenly distributed, so that their errors cancel. Nothing is kept: the numbers follow
              from the parameter's step, its position in the optimizer and the element's position. They are the same
              for every backend and after every restart, and leave torch's generators alone.
            - ``"kahan"``: the residual has the parameter's dtype (in units of its eps); together they have about twice
              its precision.
            - ``"split"``: the residual is the lower 16 bits of a float32 number whose nearest bfloat16 is the
              parameter: the same arithmetic as on float32 parameters, bit for bit. Not for float16.
        state_dtype: How running averages are stored, the larger part of the state. Everything else stays as it is:
            numbers, eigenbases, copies of parameters, and all state of parameters in float64 or of fewer than 4096
            elements. The arithmetic is in float32. Rounding is stochastic, with random numbers as above. State of
            another dtype, as a checkpoint may hold it, is converted at the next step.

            - ``"float32"``: 4 bytes per element.
            - ``"bfloat16"``: 2 bytes.
            - ``"8bit"``: 1 byte and 4 for each block of up to 256 elements of a row (see :mod:`.storage`). State whose
              rows have fewer than 64 elements, such as that of vectors, stays in float32.
        max_consecutive_skips: After so many skipped steps in a row ``step`` raises :class:`NonFiniteGradientsError`;
            ``None`` for no limit. The count restarts after the error and after loading a checkpoint. On an
            accelerator the host learns of a step at the next one, which raises then.

    Attributes:
        skipped_steps: How many steps were skipped.
        observer: Called as ``observer(parameter, name, value)`` with what matrix rules compute in between. Where
            parameters are sharded, all processes have to set one for the same steps, since they exchange these values.
        router: Called as ``router(group)`` with a parameter group that is added without names; returns groups with
            names, and roles where there are two rules. :func:`lightning_optim.build_optimizer` sets it.
        process_group: Processes that hold equal parameters and gradients, as under DDP. Set, they share the work of
            orthogonalisation, and all have to make every step. Copies of an optimizer start without one.
        work_group: Those of them that share the work, such as the processes of a node; ``None`` for all.
        shard_group: Processes that hold parts of the parameters without saying which, as under FSDP1 and DeepSpeed.
            (``DTensor`` parameters, as under FSDP2, say so themselves.) Set, all have to make every step.
        statistics: Running statistics of the model. A rule that takes a step back also undoes what the forward pass at
            the rejected parameters did to them. ``None`` if there are none, or the model is not known.
    """

    _of_the_engine = True
    params: Params
    maximize: bool = dataclasses.field(default=False, kw_only=True)
    skip_nonfinite: bool = dataclasses.field(default=True, kw_only=True)
    max_consecutive_skips: Annotated[int | None, count()] = dataclasses.field(default=100, kw_only=True)
    backend: Backend = dataclasses.field(default="auto", kw_only=True)
    rounding: Rounding = dataclasses.field(default="nearest", kw_only=True)
    state_dtype: StateDtype = dataclasses.field(default="float32", kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in cls.__dict__ and "__init__" not in cls.__dict__:
            cls.__init__ = declare.constructor(cls, Params)  # type: ignore[method-assign]
            cls.__doc__ = declare.documentation(cls)

    def __init__(self, params: Params, **arguments: Any) -> None:
        raise TypeError(f"{type(self).__name__} declares no update, so there is nothing that it could run.")

    def _construct(self, params: Params, arguments: dict[str, Any]) -> None:
        """What the constructor that declarations get does.

        Args:
            params: Its first argument.
            arguments: All others by name.
        """
        if "decay" in self.fields:
            arguments = decay.renamed(arguments, self.fields["decay"].default, type(self).__name__)
        for name in _OPTIONS:
            constraint = self.arguments[name].constraint
            if not satisfies(constraint, value := arguments[name]):
                raise ValueError(f"{type(self).__name__}: {name} must be {constraint[1]}, got {name}={value!r}.")
        self.skip_nonfinite = arguments["skip_nonfinite"]
        self.max_consecutive_skips = arguments["max_consecutive_skips"]
        self.backend = arguments["backend"]
        self.rounding = arguments["rounding"]
        self.state_dtype = arguments["state_dtype"]
        self.skipped_steps = 0
        self.consecutive_skips = 0
        self.observer: Callable[[Tensor, str, Tensor], None] | None = None
        self.router: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None
        self.process_group: ProcessGroup | None = None
        self.work_group: ProcessGroup | None = None
        self.shard_group: ProcessGroup | None = None
        self.statistics: RunningStatistics | None = None
        #: The last step, if the host does not know yet whether it was made: a function that waits for the answer, and
        #: what the step did to step counts.
        self._unsettled: tuple[Callable[[], bool], list[SharedStep]] | None = None
        self._graphs: StepGraphs | None = None
        #: Of parameters with a matrix rule that have state: the rank that keeps it, ``None`` if every rank has its own.
        self._owners: dict[Tensor, int | None] = {}
        self._seen: list[dict[str, Any]] = []
        #: What was prepared for the last step, by the place of a group among those that took part.
        self._batches: dict[int, Batch] = {}
        hyperparameters = {name: arguments[name] for name in self.fields}
        if self.state_dtype != "float32" and not any(averages_of(type(self), as_attributes(hyperparameters))):
            raise ValueError(
                f"{type(self).__name__}: state_dtype={self.state_dtype!r} stores running averages in low precision, "
                "and this optimizer has none, or needs them exactly; leave state_dtype out."
            )
        torch.optim.Optimizer.__init__(self, params, hyperparameters | {"maximize": arguments["maximize"]})

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return super().__getstate__() | {
            "skip_nonfinite": self.skip_nonfinite,
            "max_consecutive_skips": self.max_consecutive_skips,
            "backend": self.backend,
            "rounding": self.rounding,
            "state_dtype": self.state_dtype,
            "skipped_steps": self.skipped_steps,
            "consecutive_skips": self.consecutive_skips,
            "observer": None,
            "router": None,
            "process_group": None,
            "work_group": None,
            "shard_group": None,
            "statistics": None,
            "_unsettled": None,
            "_graphs": None,
            "_owners": self._owners,
            "_batches": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = []  # Groups from a checkpoint or a copy are checked as a whole.

    @classmethod
    def default_hyperparameters(cls) -> dict[str, Any]:
        """Hyperparameters and their defaults, including the fallback's where there is one.

        >>> from lightning_optim import DeVAVector
        >>> DeVAVector.default_hyperparameters()
        {'lr': 0.02, 'betas': (0.9, 0.999), 'weight_decay': 0.0, 'nesterov': False, 'decay': 'decoupled', \
'cautious': False, 'norm_control': 'none'}
        """
        own = {name: field for name, field in cls.arguments.items() if name not in RuleOptimizer.arguments}
        return {name: field.default for name, field in (cls.fields | own).items()}

    def check_shard_group(self) -> None:
        """Refuse settings that do not go with a :attr:`shard_group`.

        Raises:
            ValueError: State in 8 bits, which needs rows, or steps that need sums over whole parameters.
        """
        if self.shard_group is None:
            return
        if self.state_dtype == "8bit":
            raise ValueError(
                f"{type(self).__name__}: state_dtype='8bit' stores blocks of a row, and under FSDP1 and DeepSpeed "
                "parameters are parts of vectors; use FSDP2, or state_dtype='bfloat16'."
            )
        for group in self.param_groups:
            for name, field in switches.FIELDS.items():
                if (value := group.get(name, field.default)) != field.default:
                    raise ValueError(
                        f"{type(self).__name__}: {name}={value!r} needs sums over whole parameters, and under FSDP1 "
                        f"and DeepSpeed parameters are parts of vectors; use FSDP2, or leave {name} out."
                    )

    # --- parameter groups ---------------------------------------------------------------------------------------

    def rule(self, group: Mapping[str, Any]) -> type[Rule]:
        """The rule that runs on a parameter group."""
        if group["rule"] != self.name:
            raise ValueError(
                f"{type(self).__name__} runs {self.name!r}, got a parameter group with rule={group['rule']!r}."
            )
        return type(self)

    def group_defaults(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters of a new group that does not set them itself."""
        return self.defaults | {"rule": self.name}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its keys override the optimizer's defaults for its parameters.

        Parameters without names, as Lightning's finetuning callbacks add them, go to the ``router`` if the others have
        names. Without a router they are named after their group and position.
        """
        params = listed(param_group["params"])
        param_group = param_group | plain_hyperparameters(
            {key: value for key, value in param_group.items() if key not in checkpoint.LABELS}
        )
        if self._lack_names(params):
            if self.router is not None:
                for group in self.router(param_group | {"params": params}):
                    self.add_param_group(group)
                return
            params = [(f"added.{len(self.param_groups)}.{i}", p) for i, p in enumerate(params)]
        param_group = param_group | {"params": params}
        if "decoupled" in param_group:
            form = self.group_defaults(param_group).get("decay", "decoupled")
            param_group = decay.renamed(param_group, form, type(self).__name__)
        # The defaults of a group depend on its rule, and torch fills in `self.defaults`.
        defaults = self.defaults
        self.defaults = self.group_defaults(param_group)
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = defaults
        group = self.param_groups[-1]
        try:
            for name in OPTIONAL:
                if name in group and _same(group[name], entry(self.rule(group), {}, name)):
                    del group[name]
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _lack_names(self, params: list[Any]) -> bool:
        """Whether these have no names, but the parameters in the optimizer have."""
        return any("param_names" in group for group in self.param_groups) and all(isinstance(p, Tensor) for p in params)

    def _check(self, group: dict[str, Any]) -> None:
        bounds = self.rule(group).constraints
        self._check_hyperparameters(group, [name for name in bounds if name in group])
        for name in _OPTIONS & group.keys():
            raise ValueError(f"{type(self).__name__}: {name} is one for all parameters, not for a parameter group.")
        self._check_parameters(group)

    def _check_hyperparameters(self, group: Mapping[str, Any], names: Iterable[str]) -> None:
        bounds = self.rule(group).constraints
        for name in names:
            if not satisfies(bounds[name], group[name]):
                what = bounds[name][1]
                raise ValueError(f"{type(self).__name__}: {name} must be {what}, got {name}={group[name]!r}.")

    def _check_parameters(self, group: Mapping[str, Any]) -> None:
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(f"{type(self).__name__}: a parameter is twice in one parameter group; list it once.")
        for p in group["params"]:
            residual_dtype(self.rounding, p.dtype)
            processes.refuse_partial(p)
            self._check_storage(group, p)
            self._check_norm(group, p)
            if p.is_complex():
                self._check_complex(group, p)
            if p.numel() and any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape)):
                raise ValueError(
                    f"{type(self).__name__} does not take expanded parameters (shape {tuple(p.shape)}, strides "
                    f"{p.stride()}), whose entries share memory; optimize parameter.contiguous() instead."
                )

    def _check_norm(self, group: Mapping[str, Any], p: Tensor) -> None:
        """Refuse a matrix of zeros whose norm is to be kept, as far as this process sees it."""
        if group.get("norm_control") != "hyperball" or p.ndim < 2 or p.is_meta or has_begun(self.state.get(p)):
            return
        if processes.placements(p) is None and p.numel() and not p.any():
            raise ValueError(
                f"{type(self).__name__}: norm_control='hyperball' keeps the norms that matrices begin with, and a "
                f"parameter of shape {tuple(p.shape)} is zero; initialise it otherwise, or give its group "
                "norm_control='none'."
            )

    def _check_storage(self, group: Mapping[str, Any], p: Tensor) -> None:
        """Refuse a parameter whose state cannot be stored as ``state_dtype`` says."""
        rule, shape = self.rule(group), tuple(p.shape)
        if self.state_dtype != "8bit" or not storage.stored_dtypes(rule, shape, group, self.state_dtype):
            return
        axes = storage.row_axes(rule, shape, group)
        if any(dim >= axes for dim, _ in processes.sharded_dims(p)):
            raise ValueError(
                f"{type(self).__name__}: state_dtype='8bit' stores blocks of a row, and a parameter of shape {shape} "
                f"is sharded within its rows (placements {processes.placements(p)}); use state_dtype='bfloat16', or "
                "shard it along its first axis."
            )

    def _check_complex(self, group: Mapping[str, Any], p: Tensor) -> None:
        """Refuse a complex parameter that does not stand for a real one of twice its size."""
        rule = self.rule(group)
        if issubclass(rule, MatrixRule):
            reason, remedy = f"{rule.name} works on real matrices", "give it to the fallback rule (role='fallback')"
        elif p.dtype not in (torch.complex64, torch.complex128):
            reason, remedy = "complex parameters are complex64 or complex128", "convert it with parameter.to()"
        elif processes.placements(p) is not None:
            reason, remedy = "sharded parameters are real", "shard torch.view_as_real(parameter) instead"
        elif p.is_conj():
            reason, remedy = "it is a lazy conjugate of other memory", "use parameter.resolve_conj()"
        else:
            return
        raise ValueError(
            f"{type(self).__name__} does not take a complex parameter of shape {tuple(p.shape)} and {p.dtype} here: "
            f"{reason}; {remedy}."
        )

    def _check_edits(self) -> None:
        """Validate what was changed in the parameter groups since the last step."""
        for i, group in enumerate(self.param_groups):
            if i == len(self._seen):
                self._seen.append({})
            seen = self._seen[i]
            if len(group) == len(seen) and all(map(is_, group.values(), seen.values())):
                continue
            if seen.get("params") is not group["params"]:
                seen = {}  # Another group than the last time.
            bounds = self.rule(group).constraints
            for name in bounds:
                if name in seen and name not in group:
                    raise ValueError(
                        f"{type(self).__name__}: parameter group {i} has lost {name}={seen[name]!r}; put it back."
                    )
            changed = [
                name for name in bounds if name in group and not (name in seen and _same(group[name], seen[name]))
            ]
            for name in changed:
                if not is_plain(group[name]):  # A checkpoint must hold no NumPy number, say.
                    group |= plain_hyperparameters({name: group[name]})
            if changed or not seen:
                self._check_hyperparameters(group, changed)
                if not NUMBERS.keys() >= set(changed):
                    self._check_parameters(group)
                    if seen:
                        self._check_state(group, seen, changed)
                    self._batches.clear()
            self._seen[i] = self._as_seen(group)

    def _as_seen(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a group. Values that may be edited in place are other objects in it, and so are compared again."""
        seen = dict(group)
        for name in self.rule(group).constraints:
            if isinstance(x := seen.get(name), (Tensor, list)):
                seen[name] = x.detach() if isinstance(x, Tensor) else list(x)
        return seen

    def _check_state(self, group: Mapping[str, Any], before: Mapping[str, Any], changed: list[str]) -> None:
        """Refuse hyperparameters that need other state than there is."""
        rule = self.rule(group)
        fixed = any(name in rule.fixed for name in changed)
        for p in group["params"]:
            if not has_begun(self.state.get(p)):
                continue
            needed, had = ((state_shapes(rule, p, g), has_owner(rule, p, g)) for g in (group, before))
            if fixed or needed != had:
                edits = ", ".join(f"{name}={group[name]!r} (was {before.get(name)!r})" for name in changed)
                raise ValueError(
                    f"{type(self).__name__}: {edits} does not go with the state that the parameter of shape "
                    f"{tuple(p.shape)} has; change it back, or build a new optimizer."
                )

    # --- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            closure: Reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            ValueError: A gradient is sparse or of another shape than its parameter, a parameter group was changed to
                something that it must not be, or a rule needs the loss and gets none; nothing has been updated then.
            NonFiniteGradientsError: Too many steps in a row were skipped.
        """
        loss = None
        if self.statistics is not None and self.statistics.kept is None:
            self.statistics.keep()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.settle()
        self._check_edits()
        self._check_skips()
        work = [(group, params) for group in self.param_groups if (params := self._taking_part(group["params"]))]
        if not work:
            return loss
        if isinstance(self, ModelRule):
            finite, steps = self._run_over_model(work, loss)
        else:
            finite, steps = self._run(work) if self._graphs is None else self._graphs(work)
        if isinstance(finite, Tensor):
            self._unsettled = read_later(finite), steps
        else:
            self._account(finite, steps)
            self._check_skips()
        return loss

    def _run_over_model(
        self, work: list[tuple[dict[str, Any], list[Tensor]]], result: Any
    ) -> tuple[bool | Tensor, list[SharedStep]]:
        """:meth:`_run` with the loss that the closure returned; running statistics follow the parameters."""
        loss = loss_of(result, {group["maximize"] for group, _ in work}, type(self).__name__)
        finite, steps = self._run(work, loss=loss)
        if self.statistics is not None:
            first = work[0][1][0]
            if finite is not False and bool(self.state[first]["taken_back"]):
                self.statistics.restore()
            self.statistics.keep()
        return finite, steps

    def _run(
        self,
        work: list[tuple[dict[str, Any], list[Tensor]]],
        given: Iterator[dict[str, Any]] | None = None,
        loss: float | None = None,
    ) -> tuple[bool | Tensor, list[SharedStep]]:
        """Update parameters and state, unless gradients are not finite.

        Args:
            work: Parameter groups and those of their parameters that have a gradient.
            given: Scalars to use instead of those that the rule computes, one set for each shared step.
            loss: The loss of this rank, for a rule that needs it.

        Returns:
            Whether the step was made, which the host may not know yet, and the step counts that follow from it.
        """
        held = [self._held(i, group, params) for i, (group, params) in enumerate(work)]
        if None in held:
            self._check_gradients(work)
        params = [p for _, params in work for p in params]
        plain = self.shard_group is None
        self.check_shard_group()
        grads = [
            g if plain and type(g := p.grad) is Tensor and g.dtype in _DIRECT else usable_gradient(p) for p in params
        ]
        parts, replicas = processes.nontrivial(self.shard_group), processes.nontrivial(self.process_group)
        workers = processes.nontrivial(self.work_group or self.process_group)
        if replicas and processes.is_joining(self):
            replicas = workers = ()  # Each rank makes the whole step by itself.
        # Replicas have equal gradients, but if one rank's are broken all have to skip: the ranks wait for each other.
        involved = tuple(dict.fromkeys((*processes.mesh_groups(params), *parts, *replicas)))
        if loss is not None:
            loss = mean_loss(loss, involved, params[0].device, type(self).__name__)
            if loss == math.inf:  # The last step was too long, if there was one; gradients there mean nothing.
                if not any(has_begun(self.state.get(p)) for p in params):
                    return False, []
                grads = [torch.zeros_like(g) for g in grads]
        finite, grad_scales = inspect_gradients(grads, involved, not parts, self.backend)
        if not self.skip_nonfinite:
            finite = True
        elif finite is False:
            return False, []
        if None in held:
            self._gather_owned_state(work)
        batches: list[Batch] = []
        first = 0
        for i, (group, some) in enumerate(work):
            last = first + len(some)
            batch = held[i] or self._prepare(i, group, some)
            batch.begin(grads[first:last], grad_scales[first:last], given)
            if len(some) < len(group["params"]):
                others = (self.state.get(p) for p in group["params"] if p.grad is None)
                batch.idle = [state for state in others if has_begun(state)]
            batches.append(batch)
            first = last
        verdict = finite if isinstance(finite, Tensor) else None
        run_rules(batches, self.backend, verdict, self.observer, workers, parts, loss)
        for batch in batches:
            batch.seal()
        return finite, [step for batch in batches for step in batch.steps]

    def _held(self, index: int, group: dict[str, Any], params: list[Tensor]) -> Batch | None:
        """What was prepared for a group in the last step; ``None`` if anything about it has changed."""
        batch = self._batches.get(index)
        if batch is None or not batch.holds(group, params, self.state, self.rounding, self.state_dtype):
            return None
        return batch

    def _prepare(self, index: int, group: dict[str, Any], params: list[Tensor]) -> Batch:
        """Prepare the parameters of a group that a step updates."""
        states = [self.state[p] for p in params]
        owners = [self._owners.get(p) for p in params] if self._owners else [None] * len(params)
        positions = self._noisy_positions()
        rule = self.rule(group)
        batch = prepare(rule, group, params, states, owners, self.rounding, self.state_dtype, positions)
        self._batches[index] = batch
        return batch

    def _taking_part(self, params: list[Tensor]) -> list[Tensor]:
        """The parameters that are updated. One without elements on this rank is, if other ranks may have some."""
        if self.shard_group is None:
            return [p for p in params if p.grad is not None and p.numel()]
        return [p for p in params if (p.numel() > 0) is (p.grad is not None)]

    def _check_gradients(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        for _, params in work:
            for p in params:
                g = p.grad
                if g is None or (g.layout is torch.strided and g.shape == p.shape):
                    continue
                if g.layout is not torch.strided:
                    raise ValueError(
                        f"{type(self).__name__} does not take sparse gradients (parameter of shape {tuple(g.shape)}); "
                        "use sparse=False in the embedding, or torch.optim.SparseAdam for it."
                    )
                raise ValueError(
                    f"{type(self).__name__}: a gradient of shape {tuple(g.shape)} cannot be that of a parameter of "
                    f"shape {tuple(p.shape)}; set parameter.grad to None when the parameter is replaced."
                )

    def _noisy_positions(self) -> dict[Tensor, int]:
        """The positions of all parameters, if something is rounded at random."""
        if self.rounding != "stochastic" and self.state_dtype == "float32":
            return {}
        return {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def _owned_parameters(self) -> list[owned_state.OwnedParameter]:
        return owned_state.owned_parameters((self.rule(group), group) for group in self.param_groups)

    def _gather_owned_state(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Gather state that one rank keeps on that rank, if it is not there yet."""
        matrices = [p for group, params in work if issubclass(self.rule(group), MatrixRule) for p in params]
        if all(p in self._owners and has_begun(self.state.get(p)) for p in matrices):
            return
        owned = self._owned_parameters()
        owners = owned_state.choose_owners(owned, self._owners)
        owned_state.gather_to_owners(owned, owners, self.state)
        self._owners = self._owners | dict.fromkeys(matrices) | owners

    def settle(self) -> None:
        """Advance the step counts of the last step, or count it as skipped.

        The next step and :meth:`state_dict` do so themselves. Call it to read :attr:`skipped_steps` or step counts
        right after a step on an accelerator, which it waits for.
        """
        if self._unsettled is not None:
            (made, steps), self._unsettled = self._unsettled, None
            self._account(made(), steps)

    def _account(self, made: bool, steps: list[SharedStep]) -> None:
        """Write down that a step was made, or skipped."""
        if not made:
            self._count_skip()
            return
        self.consecutive_skips = 0
        write_step_counts(steps)

    def _count_skip(self) -> None:
        self.skipped_steps += 1
        self.consecutive_skips += 1

    def _check_skips(self) -> None:
        """Raise the error at the limit. Only ``step`` calls this, so that such an optimizer can still be saved."""
        count, limit = self.consecutive_skips, self.max_consecutive_skips
        if limit is None or count < limit:
            return
        self.consecutive_skips = 0  # A caller that goes on has as many tries again.
        states = [self.state.get(p) for group in self.param_groups for p in group["params"]]
        done = max((int(state["step"]) for state in states if has_begun(state)), default=0)
        raise NonFiniteGradientsError(
            f"{type(self).__name__} has skipped {count} steps in a row, all since its step {done}, because gradients "
            "held NaN or infinity; parameters and state are as they were after that step. The data or the loss may "
            "hold such values themselves (torch.autograd.set_detect_anomaly(True) finds the operation), the learning "
            "rate may be too high, the forward pass may overflow (16-true: train in bf16-true or 16-mixed), or weights "
            f"may be NaN already. max_consecutive_skips={limit} is the limit, None for none."
        )

    def exact(self, p: Tensor) -> Tensor:
        """What a parameter stands for: itself, and what ``rounding`` "kahan" or "split" keeps of it, in float32.

        >>> from lightning_optim import MVNGrad
        >>> w = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> w.grad = torch.ones_like(w)
        >>> optimizer = MVNGrad([w], lr=1e-4, rounding="split")
        >>> optimizer.step()
        >>> w.data, optimizer.exact(w)
        (tensor([1.], dtype=torch.bfloat16), tensor([0.9999]))
        """
        residual = self.state[p].get(RESIDUAL) if p in self.state else None
        if residual is None or residual.dtype != residual_dtype(self.rounding, p.dtype):
            return p.detach()  # A residual of what was here before a cast, or of another way: the next step drops it.
        return load(p.detach(), residual, torch.float32)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and parameter groups: tensors and plain values only, and the number of their format.

        Where parameters are sharded, all ranks have to call it: state that one rank keeps for all is sent to the
        others. torch's hooks run as they do in any optimizer; the format number, which stands behind the names of the
        rules (see :mod:`.formats`), is added after them.
        """
        self.settle()
        for group in self.param_groups:
            for state in filter(has_begun, map(self.state.get, group["params"])):
                for name in self.rule(group).host_state:  # They are plain numbers from loading to the first step.
                    state[name] = torch.as_tensor(state[name], dtype=torch.float64, device="cpu")
        state = self.state
        parts = owned_state.sharded_state(self._owned_parameters(), self._owners, state)
        self.state = defaultdict(dict, {**state, **parts})  # The hooks of torch see what they return.
        try:
            return formats.stamped(super().state_dict())
        finally:
            self.state = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer with the same rules for the same parameters.

        Parameters with names are found by name, others by position. State takes the precision of the arithmetic on the
        parameters that are here now; where those are sharded, every rank takes its shard of state that is whole. What
        wrappers keep in a parameter's state under names of their own is moved to the parameter's device and otherwise
        left as it was. Nothing is changed unless everything fits.

        torch's hooks run as they do in any optimizer: those before may replace the state dict, those after see the
        optimizer as it goes on.

        Raises:
            CheckpointError: The checkpoint is of another optimizer, of other parameters or groups of them, of a later
                format, or damaged.
        """
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)  # Hooks may change it.
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replacement = before(self, state_dict)
            state_dict = state_dict if replacement is None else replacement
        state_dict = checkpoint.matched(self, state_dict)
        state = self._loaded_state(state_dict)
        self.settle()
        groups = [
            {**deepcopy(saved), "params": group["params"]}
            for group, saved in zip(self.param_groups, state_dict["param_groups"])
        ]
        for group, old in zip(groups, self.param_groups):
            if "param_names" in old:
                group.setdefault("param_names", old["param_names"])
        self.__setstate__({"state": state, "param_groups": groups})
        self.consecutive_skips = 0
        self._owners = {}
        if self.statistics is not None:
            self.statistics.kept = None
        self._seen = [self._as_seen(group) for group in groups]  # Hyperparameters that go with the loaded state.
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _loaded_state(self, state_dict: Mapping[str, Any]) -> defaultdict[Any, Any]:
        """A checkpoint's state as this optimizer needs it.

        Raises:
            CheckpointError: Hyperparameters are out of range, or state is not what the rules need.
        """
        found, states, expected = [], {}, {}
        others = dict(state_dict["state"])
        for i, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            try:
                self._check({**saved, "params": group["params"]})
            except ValueError as error:
                raise CheckpointError(f"Group {group.get('name', i)!r} of the checkpoint: {error}") from error
            rule = self.rule(saved)
            for j, (p, key) in enumerate(zip(group["params"], saved["params"])):
                if state := others.pop(key, None):
                    name = checkpoint.label(group, i, j)
                    states[name], expected[name] = state, expected_state(rule, p, saved, state)
                    found.append((p, state, expected[name]))
        checkpoint.check_state(states, expected)
        loaded = {p: load_state(p, state, like) for p, state, like in found}
        return defaultdict(dict, {**loaded, **others})  # As torch does, what belongs to no parameter stays.


def listed(params: Any) -> list[Any]:
    """The parameters of a group, of which there may be one, in their order."""
    if isinstance(params, set):
        raise TypeError("A set of parameters has another order in every run, and state goes by order; use a list.")
    return [params] if isinstance(params, Tensor) else list(params)


def _same(a: Any, b: Any) -> bool:
    """Whether a hyperparameter is known to be unchanged; a tensor may have been edited in place."""
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
