"""What is timed: our optimizers with each backend, and the implementations that they are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_optim import capture_step
from lightning_optim.engine.rule import ModelRule
from lightning_optim.registry import OPTIMIZERS

from .workload import Workload

#: Learning rate and weight decay of all contenders. Their values do not matter, since only time is measured, but every
#: implementation that can apply weight decay has to (ELRA and SSO cannot). All other settings are each implementation's
#: defaults.
LR, WEIGHT_DECAY = 1e-4, 0.01
COMMON: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}

BACKENDS = ("auto", "plain", "chunked", "compiled")

#: Other implementations. ``baseline`` is written here, after published algorithms; the others are packages.
PEERS = ("torch", "pytorch_optimizer", "timm", "baseline", "heavyball")

#: Distributions of the peers that are packages.
PACKAGES = ("pytorch_optimizer", "timm", "heavyball")

#: The period, in steps, of optimizers whose steps do not all cost the same.
PERIODS = {
    name: info.defaults["precondition_frequency"]
    for name, info in OPTIMIZERS.items()
    if "precondition_frequency" in info.defaults
}

Stepper = Any  # Whatever has a `step()` and a `state`.


@dataclass(frozen=True)
class Contender:
    """One implementation of one optimizer.

    Args:
        optimizer: Name in :data:`lightning_optim.OPTIMIZERS`.
        implementation: Whose it is: ``ours/<backend>``, ``+<rounding>``, ``+graph``, ``torch/<variant>``,
            ``baseline/<variant>`` or a package.
        build: Makes it for the parameters of a workload: one or several objects, stepped one after another.
        backend: The way in which ours runs.
        bfloat16: Whether it multiplies matrices in bfloat16 on every device.
    """

    optimizer: str
    implementation: str
    build: Callable[[Workload], list[Stepper]]
    backend: str | None = None
    bfloat16: bool = False

    @property
    def period(self) -> int:
        """After how many steps its work repeats."""
        return PERIODS.get(self.optimizer, 1)


def installed(peer: str) -> bool:
    """Whether a peer can be imported."""
    return peer == "baseline" or find_spec(peer) is not None


def contenders(
    optimizers: Iterable[str],
    backends: Iterable[str],
    peers: Iterable[str],
    roundings: Iterable[str] = ("nearest",),
    graphs: bool = False,
) -> list[Contender]:
    """All implementations of some optimizers; torch's fused AdamW, the reference, comes first.

    Args:
        optimizers: Names in :data:`lightning_optim.OPTIMIZERS`. Two that are compared with each other are interleaved
            if both are asked for.
        backends: Ways in which ours run.
        peers: Names in :data:`PEERS`, of installed ones.
        roundings: How ours store results in bfloat16 parameters.
        graphs: Whether ours run as CUDA graphs, too, where they can.
    """
    optimizers, peers = list(optimizers), list(peers)
    ways = list(product(backends, roundings))
    found = [REFERENCE]
    for name in optimizers:
        cls: Any = OPTIMIZERS[name].cls
        if cls not in (SGD, Adam, AdamW):
            found += [_ours(name, backend, rounding) for backend, rounding in ways]
            if graphs and cls.capturable:
                found += [_ours(name, *way, graph=True) for way in ways if way[1] != "stochastic"]
        found += [c for peer in peers for c in _PEERS[peer] if c.optimizer == name and c is not REFERENCE]
    return found


class _WithLoss:
    """An optimizer that reads the loss, which is 1 here in every step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.state = optimizer, optimizer.state

    def step(self) -> None:
        self.optimizer.step(lambda: 1.0)


def _ours(name: str, backend: str, rounding: str, graph: bool = False) -> Contender:
    def build(work: Workload) -> list[Stepper]:
        cls: Any = OPTIMIZERS[name].cls
        common = {key: value for key, value in COMMON.items() if key in OPTIMIZERS[name].defaults}
        optimizer = cls(work.groups(cls), **common, backend=backend, rounding=rounding)
        if graph:
            capture_step(optimizer)
        return [_WithLoss(optimizer) if issubclass(cls, ModelRule) else optimizer]

    extras = [*([] if rounding == "nearest" else [rounding]), *(["graph"] if graph else [])]
    return Contender(name, "+".join([f"ours/{backend}", *extras]), build, backend)


# --- peers: the hidden matrices and the rest are those of our routing, so that all do the same work -----------------


def _torch(name: str, cls: type[Optimizer], **variant: Any) -> Contender:
    label = next(iter(variant), "default")
    return Contender(name, f"torch/{label}", lambda work: [cls(work.parameters, **COMMON, **variant)])


def _fused_adamw(parameters: list[Tensor]) -> Optimizer:
    return AdamW(parameters, **COMMON, fused=True)


class CheckedAdamW(AdamW):
    """Torch's fused AdamW after torch's own check that all gradients are finite, which ours make in every step."""

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if nn.utils.get_total_norm(gradients).isfinite():
            super().step(closure)


def _checked_adamw(work: Workload) -> list[Stepper]:
    return [CheckedAdamW(work.parameters, **COMMON, fused=True)]


def _torch_muon(work: Workload) -> list[Stepper]:
    return [torch.optim.Muon(work.matrices, **COMMON), _fused_adamw(work.others)]


def _peer(module: str, name: str, takes: str = "all", **settings: Any) -> Callable[[Workload], list[Stepper]]:
    """An optimizer of another package.

    Args:
        module: Where to import it from.
        name: Its class.
        takes: ``"all"`` parameters; ``"groups"``, marked by ``use_muon``, since it has a fallback of its own; or
            the workload's ``"matrices"`` or ``"blocks"``, with torch's fused AdamW for the rest.
        settings: Arguments beside learning rate and weight decay.
    """

    def build(work: Workload) -> list[Stepper]:
        cls = partial(getattr(import_module(module), name), **COMMON, **settings)
        if takes == "all":
            return [cls(work.parameters)]
        if takes == "groups":
            return [cls([{"params": work.matrices, "use_muon": True}, {"params": work.others, "use_muon": False}])]
        return [cls(getattr(work, takes)), _fused_adamw(work.others)]

    return build


_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class PublishedMuon:
    """Muon as published: five quintic steps with the coefficients of Polar Express, nothing else done for speed.

    With ``stacked`` it is the algorithm of microsoft/dion, which is not on the package registry: all matrices of one
    shape in one batched iteration. Without, one matrix at a time, the algorithm of ``torch.optim.Muon``.

    Args:
        matrices: What to optimize.
        dtype: Precision of the iteration. bfloat16 is published; few processors multiply in it quickly.
        stacked: Whether equal shapes share an iteration.
    """

    def __init__(self, matrices: list[Tensor], dtype: torch.dtype, stacked: bool) -> None:
        groups: dict[Any, list[Tensor]] = defaultdict(list)
        for i, p in enumerate(matrices):
            groups[p.shape if stacked else i].append(p)
        self.groups = list(groups.values())
        self.state = {p: {"momentum": torch.zeros_like(p)} for p in matrices}
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            gradients = [p.grad for p in group if p.grad is not None]
            momenta = [self.state[p]["momentum"] for p in group]
            torch._foreach_lerp_(momenta, gradients, 0.05)
            updates = self.orthogonalize(torch.stack(torch._foreach_lerp(gradients, momenta, 0.95)))
            torch._foreach_mul_(group, 1 - LR * WEIGHT_DECAY)
            torch._foreach_add_(group, list(updates.float().unbind()), alpha=-LR)

    def orthogonalize(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
        for a, b, c in _POLAR_EXPRESS:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def _published(dtype: torch.dtype, stacked: bool) -> Contender:
    def build(work: Workload) -> list[Stepper]:
        return [PublishedMuon(work.matrices, dtype, stacked), _fused_adamw(work.others)]

    label = f"baseline/{'batched' if stacked else 'loop'}-{str(dtype).removeprefix('torch.')}"
    return Contender("Muon", label, build, bfloat16=dtype is torch.bfloat16)


REFERENCE = _torch("AdamW", AdamW, fused=True)
CHECKED = Contender("AdamW", "torch/fused+check", _checked_adamw)

_SOAP: dict[str, Any] = {"takes": "blocks", "precondition_frequency": PERIODS["SOAP"]}
_HEAVYBALL: dict[str, Any] = {"consume_grad": False}

_PEERS: dict[str, list[Contender]] = {
    "torch": [
        REFERENCE,
        CHECKED,
        _torch("AdamW", AdamW),
        _torch("AdamW", AdamW, foreach=True),
        _torch("Adam", Adam, fused=True),
        _torch("Adam", Adam),
        _torch("SGD", SGD, fused=True),
        _torch("SGD", SGD),
        Contender("Muon", "torch/muon+fused-adamw", _torch_muon, bfloat16=True),
    ],
    "pytorch_optimizer": [
        Contender("LaProp", "pytorch_optimizer", _peer("pytorch_optimizer", "LaProp")),
        Contender("AdaBelief", "pytorch_optimizer", _peer("pytorch_optimizer", "AdaBelief", rectify=True)),
        Contender("Muon", "pytorch_optimizer", _peer("pytorch_optimizer", "Muon", "groups"), bfloat16=True),
        Contender("SOAP", "pytorch_optimizer", _peer("pytorch_optimizer", "SOAP", **_SOAP)),
    ],
    "timm": [
        Contender("LaProp", "timm", _peer("timm.optim.laprop", "LaProp")),
        Contender("AdaBelief", "timm", _peer("timm.optim.adabelief", "AdaBelief")),
        Contender("Muon", "timm", _peer("timm.optim.muon", "Muon", "groups", nesterov=True), bfloat16=True),
    ],
    "heavyball": [
        Contender("LaProp", "heavyball", _peer("heavyball", "LaProp", **_HEAVYBALL)),
        Contender("Muon", "heavyball", _peer("heavyball", "Muon", "matrices", **_HEAVYBALL), bfloat16=True),
        Contender("SOAP", "heavyball", _peer("heavyball", "SOAP", **_SOAP, **_HEAVYBALL)),
    ],
    "baseline": [
        _published(torch.bfloat16, stacked=True),
        _published(torch.float32, stacked=True),
        _published(torch.float32, stacked=False),
    ],
}
