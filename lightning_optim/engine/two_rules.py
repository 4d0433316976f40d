"""One optimizer object, two rules: a matrix rule for hidden matrices and a fallback rule for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from .. import processes
from .decay import BY_LR, Decay
from .hyperparameters import anything, satisfies
from .layout import misfit
from .optimizer import RuleOptimizer, listed
from .rule import RULES, MatrixRule, ModelRule, Rule

#: Arguments that set hyperparameters of the fallback rule; ``None`` means the rule's own default.
_FALLBACK_ARGUMENTS = ("lr", "betas", "eps", "weight_decay", "decay")


def fallbacks() -> dict[str, type[Rule]]:
    """Every rule that can be a fallback, by name: those that take a tensor of any shape, and need not have all."""
    return {name: rule for name, rule in RULES.items() if not issubclass(rule, (MatrixRule, ModelRule))}


def fallback_hyperparameters(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters of a fallback rule.

    Weight decay that is multiplied by the learning rate means the same in both rules, so a value that is given for
    matrices also holds for the fallback, and so does another form than the default. Updates are cautious in both rules.
    Learning rates are not shared, and norms are those of matrices.

    Args:
        name: The rule.
        arguments: The optimizer's arguments: ``weight_decay``, ``fallback_lr`` and so on; ``decay`` if it is not the
            default.

    Raises:
        ValueError: There is no such fallback rule, or it has no such hyperparameter.

    >>> import lightning_optim
    >>> fallback_hyperparameters("AdamW", {"lr": 0.02, "weight_decay": 0.1, "fallback_lr": 3e-4})
    {'lr': 0.0003, 'betas': (0.9, 0.999), 'eps': 1e-08, 'weight_decay': 0.1, 'decay': 'decoupled', \
'cautious': False, 'norm_control': 'none'}
    """
    if name not in fallbacks():
        raise ValueError(f"fallback={name!r} is not one of {', '.join(sorted(fallbacks()))}.")
    rule = fallbacks()[name]
    values = rule.hyperparameters() | dict(rule.as_fallback)
    if "decay" in values:
        form = arguments.get("decay")
        if isinstance(form, str) and satisfies(rule.fields["decay"].constraint, form):
            values["decay"] = form
        own = arguments.get("fallback_decay") or values["decay"]
        named = all(isinstance(x, (str, type(None))) for x in (own, form))  # Others are refused where they are set.
        if named and (own == form or {own, form or "decoupled"} <= BY_LR):
            values["weight_decay"] = arguments.get("weight_decay", values["weight_decay"])
    cautious = arguments.get("cautious", False)
    if satisfies(rule.fields["cautious"].constraint, cautious):
        values["cautious"] = cautious
    for key in _FALLBACK_ARGUMENTS:
        value = arguments.get(f"fallback_{key}")
        if value is None:
            continue
        if key not in values:
            raise ValueError(f"fallback_{key}={value!r}: {name} has no {key}; leave fallback_{key} out.")
        values[key] = value
    return values


class MatrixOptimizer(RuleOptimizer):
    """Base of optimizers with a matrix rule, and a fallback rule for everything that is not a hidden matrix.

    The ``"role"`` of a parameter group, ``"matrix"`` or ``"fallback"``, says which rule runs on it. Matrix groups may
    also carry ``"blocks"`` (the first axis of each parameter stacks that many equal matrices; default 1) and
    ``"transposed"`` (parameters are stored (in, out, ...), as in transposed convolutions; default ``False``), and
    ``"split"``: the rows of each of several matrices that a block stacks along its output axis, such as ``(q, k, v)``
    rows, with ``"interleaved"`` where their rows alternate.
    :func:`lightning_optim.build_optimizer` makes such groups from the types and roles of the modules. Parameters
    without a role are split by their number of axes, which sends embeddings and output heads to the matrix rule;
    a warning says so.
    """

    _of_the_engine = True
    fallback: Annotated[str, anything()] = field(default="AdamW", kw_only=True)
    fallback_lr: Annotated[float | None, anything()] = field(default=None, kw_only=True)
    fallback_betas: Annotated[tuple[float, float] | None, anything()] = field(default=None, kw_only=True)
    fallback_eps: Annotated[float | None, anything()] = field(default=None, kw_only=True)
    fallback_weight_decay: Annotated[float | None, anything()] = field(default=None, kw_only=True)
    fallback_decay: Annotated[Decay | None, anything()] = field(default=None, kw_only=True)

    def _construct(self, params: Any, arguments: dict[str, Any]) -> None:
        name = arguments["fallback"]
        given = dict(arguments)
        if "decay" in self.fields and given["decay"] == self.fields["decay"].default:
            del given["decay"]
        self._fallback = {**fallback_hyperparameters(name, given), "rule": name}
        self._warned = False
        super()._construct(params, arguments)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_fallback": self._fallback, "_warned": self._warned}

    def rule(self, group: Mapping[str, Any]) -> type[Rule]:
        matrix = group["role"] == "matrix"
        name = self.name if matrix else self._fallback["rule"]
        if group["rule"] != name:
            raise ValueError(
                f"{type(self).__name__} runs {name!r} on parameter groups of role {group['role']!r}, got "
                f"rule={group['rule']!r}; role and rule of a group cannot be changed."
            )
        return type(self) if matrix else RULES[name]

    def group_defaults(self, group: Mapping[str, Any]) -> dict[str, Any]:
        if group["role"] == "matrix":
            return super().group_defaults(group) | {"blocks": 1, "transposed": False}
        return {"maximize": self.defaults["maximize"]} | self._fallback

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; one without a ``"role"`` is split by the number of axes."""
        role = param_group.get("role")
        if role in ("matrix", "fallback"):
            super().add_param_group(param_group)
            return
        if role is not None:
            raise ValueError(f"A parameter group's role must be 'matrix' or 'fallback', got {role!r}.")
        params = listed(param_group["params"])
        if self.router is not None and self._lack_names(params):
            super().add_param_group(param_group)
            return
        if "lr" in param_group and self._lack_names(params):
            raise ValueError(
                f"{type(self).__name__} has a learning rate for matrices and another for the rest, so a group that is "
                f"added with lr={param_group['lr']!r} needs a role: add_param_group({{'params': [(name, parameter), "
                "...], 'role': 'matrix', ...}) and another one for the rest, with 'role': 'fallback'. Optimizers "
                "from lightning_optim.build_optimizer find the roles themselves."
            )
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        is_matrix = [p.ndim >= 2 and not p.is_complex() for p in tensors]
        self._warn_nameless(sum(is_matrix), len(params))
        for role, wanted in (("matrix", True), ("fallback", False)):
            part = [p for p, matrix in zip(params, is_matrix) if matrix is wanted]
            if part:
                super().add_param_group(param_group | {"params": part, "role": role})

    def _check_parameters(self, group: Mapping[str, Any]) -> None:
        super()._check_parameters(group)
        if group["role"] == "fallback":
            return
        rule = self.rule(group)
        least = 2 if issubclass(rule, MatrixRule) and (rule.flatten or group["transposed"]) else 1
        for p in group["params"]:
            processes.refuse_unknown(p)
            if p.ndim < least:
                raise ValueError(
                    f"{rule.name} takes parameters of at least {least} axes, got shape {tuple(p.shape)}; "
                    "give the group role='fallback'."
                )
            if problem := misfit(p.shape, group):
                raise ValueError(f"{problem}.")

    def _warn_nameless(self, matrices: int, total: int) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{type(self).__name__} was built from parameters without their modules, so {matrices} of {total} "
            f"tensors, those with two axes or more, go to {type(self).__name__} and the rest to "
            f"{self._fallback['rule']}. Embeddings and output heads belong to the latter: build it with "
            "lightning_optim.build_optimizer(module, ...), or give parameter groups a 'role'.",
            stacklevel=4,
        )
