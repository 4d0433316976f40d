"""The float64 references agree with recorded trajectories and have the properties that their papers state."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lightning_optim.engine.rule import RULES

from . import references
from .references import AdamWReference, Array, Reference, newton_schulz, polar_factor
from .rows import REFERENCES, kind_of
from .rows.adabelief import AdaBeliefReference
from .rows.anon import AnonReference
from .rows.deva import DeVAReference
from .rows.deva_vector import DeVAVectorReference
from .rows.hvadam import HVAdamReference
from .rows.laprop import LaPropReference
from .rows.madam import LaMAdamReference, MAdamReference
from .rows.muon import MuonReference
from .rows.mvn_grad import MVNGradReference
from .rows.namo import NAMODReference, NAMOReference
from .rows.pnm import AdaPNMReference, PNMReference
from .rows.soap import SOAPReference, merged_shape
from .test_golden import ADAPTERS, arguments_of

# ------------------------------------------------------------------------------ recorded trajectories
# A file holds init.<i>, grads.<i> and params.<i> of shape (steps, ...), hyperparameters and tolerances.

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))

# Signs of gradients with null spaces: later steps remember how the recorded polar factors were completed there. The
# rule is compared with them (test_golden.py) by taking the recorded completion where there are two.
UNDETERMINED = ("adamuon__defaults__svd", "adamuon__paper_form__svd")
CASES = sorted(
    path
    for path in GOLDEN_DIR.glob("*.safetensors")
    if path.name.split("__")[0] in ADAPTERS and path.stem not in UNDETERMINED
)


class Routed:
    """References of the rules of a recording in which not every tensor has the optimizer's main rule."""

    def __init__(self, name: str, params: list[Array], arguments: dict[str, Any]) -> None:
        role = arguments.pop("role")
        ofs = {key.removeprefix("fallback_"): x for key, x in arguments.items() if key.startswith("fallback_")}
        own = {key: x for key, x in arguments.items() if not key.startswith("fallback_")}
        rules = {"matrix": (REFERENCES[name], own), "fallback": (REFERENCES["AdamW"], ofs)}
        chosen = [rules[role(p)] for p in params]
        self.references = [reference([p], **values) for p, (reference, values) in zip(params, chosen)]
        self.rates = [values["lr"] / own["lr"] for _, values in chosen]

    @property
    def params(self) -> list[Array]:
        return [reference.params[0] for reference in self.references]

    def step(self, grads: Any, lr: float | None = None) -> None:
        for reference, rate, g in zip(self.references, self.rates, grads):
            reference.step([g], None if lr is None else lr * rate)


def recorded_reference(metadata: dict[str, str], params: list[Array]) -> Any:
    """The reference for a recorded case, with the case's hyperparameters."""
    name, arguments = arguments_of(metadata)
    return Routed(name, params, arguments) if "role" in arguments else REFERENCES[name](params, **arguments)


@dataclasses.dataclass
class Recording:
    """One recorded case; `deviation` measures a trajectory against it in units of the tolerances."""

    path: Path

    def __post_init__(self) -> None:
        with safe_open(self.path, "numpy") as file:
            self.metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        count = sum(name.startswith("init.") for name in tensors)
        self.init = [tensors[f"init.{i}"].astype(np.float64) for i in range(count)]
        self.golden = [tensors[f"params.{i}"].astype(np.float64) for i in range(count)]
        self.grads = list(zip(*(tensors[f"grads.{i}"] for i in range(count))))
        self.losses = tensors.get("losses")
        self.lrs = json.loads(self.metadata.get("lr_schedule", "null")) or [None] * len(self.grads)

    def deviation(self, trajectory: list[Array]) -> tuple[float, float]:
        """Largest elementwise error and largest relative displacement error of the stacked parameters."""
        rtol, atol = float(self.metadata["rtol"]), float(self.metadata["atol"])
        displacement_tol = float(self.metadata["rel_displacement_tol"])
        elementwise = displacement = 0.0
        for init, golden, p in zip(self.init, self.golden, trajectory):
            error = p - golden
            elementwise = max(elementwise, float(np.max(np.abs(error) / (atol + rtol * np.abs(golden)))))
            relative = np.linalg.norm(error) / np.linalg.norm(golden - init)
            displacement = max(displacement, float(relative) / displacement_tol)
        return elementwise, displacement


def replay(reference: Any, grads: Any, lrs: Any = None) -> list[Array]:
    """The parameters after each step, stacked, one array for each tensor."""
    history = []
    for t, g in enumerate(grads):
        reference.step(g, lrs[t] if lrs else None)
        history.append(list(reference.params))
    return [np.stack(p) for p in zip(*history)]


def _with_losses(step: Callable[..., None], losses: Iterator[float], grads: Any, lr: float | None = None) -> None:
    step(grads, lr, loss=float(next(losses)))


def completed_polar_factor(x: Array, sign: int) -> Array:
    """Polar factor plus sign * u v^T of the null vectors of x, if it has a null space."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    null = sigma < 1e-10 * sigma[0]
    assert null.sum() <= 1, "more than two completions"
    return polar_factor(x) + sign * u[:, null] @ vt[null]


def replay_completing_polar_factors(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """As replay, where a singular matrix may have either completion of its polar factor.

    The sign of a matrix is often singular. Its recorded polar factor then contains +-u v^T of the null
    vectors, whose sign is rounding noise of the SVD that made it; the references drop it. At every step both
    signs are tried and the one nearer to the recorded parameters goes on. No state depends on the choice.
    """
    trajectory = []
    for i, (init, golden) in enumerate(zip(recording.init, recording.golden)):
        reference = recorded_reference(recording.metadata, [init])
        history = []
        for t, g in enumerate(recording.grads):
            candidates = []
            for sign in (1, -1):
                monkeypatch.setattr(references, "polar_factor", partial(completed_polar_factor, sign=sign))
                candidates.append(copy.deepcopy(reference))
                candidates[-1].step([g[i]], recording.lrs[t])
            errors = [np.abs(candidate.params[0] - golden[t]).max() for candidate in candidates]
            reference = candidates[int(np.argmin(errors))]
            history.append(reference.params[0])
        trajectory.append(np.stack(history))
    return trajectory


@pytest.mark.skipif(not CASES, reason=f"no recorded trajectories in {GOLDEN_DIR}: set GOLDEN_DIR to their folder")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_reproduces_recorded_trajectory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(path)
    reference = recorded_reference(recording.metadata, recording.init)
    orthogonalises_signs = getattr(reference, "form", None) in ("sign", "efficient")
    exact = recording.metadata["orthogonalization"] == "exact-svd"
    if orthogonalises_signs and exact:
        trajectory = replay_completing_polar_factors(recording, monkeypatch)
    else:
        if recording.losses is not None:
            reference.step = partial(_with_losses, reference.step, iter(recording.losses))  # type: ignore[method-assign]
        trajectory = replay(reference, recording.grads, recording.lrs)
    elementwise, displacement = recording.deviation(trajectory)
    assert displacement <= 1
    # A Newton-Schulz in bfloat16 depends on the machine's rounding: there only the displacement counts.
    assert elementwise <= 1 or recording.metadata["orthogonalization"] == "ns5-bf16"


# ------------------------------------------------------------------------------ linear algebra

seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(1, 7)


def random_orthogonal(rng: np.random.Generator, n: int) -> Array:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


@given(m=lengths, n=lengths, rank=st.integers(0, 7), scale=st.floats(1e-20, 1e20), seed=seeds)
def test_polar_factor(m: int, n: int, rank: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = min(m, n, rank)
    # Singular values within [1, 2], so that the rank is not in doubt and the factors are well conditioned.
    sigma = np.diag(rng.uniform(1, 2, rank))
    x = scale * random_orthogonal(rng, m)[:, :rank] @ sigma @ random_orthogonal(rng, n)[:rank]
    o = polar_factor(x)
    h = o.T @ x / scale
    np.testing.assert_allclose(np.linalg.svd(o, compute_uv=False)[:rank], 1, rtol=1e-12)
    np.testing.assert_allclose(o @ h, x / scale, atol=1e-12)
    np.testing.assert_allclose(h, h.T, atol=1e-12)
    assert np.linalg.eigvalsh(h).min() > -1e-12
    assert np.linalg.matrix_rank(o) == rank


@given(m=lengths, n=lengths, extra=st.booleans(), scale=st.floats(1e-3, 1e20), seed=seeds)
def test_newton_schulz_keeps_the_singular_vectors(m: int, n: int, extra: bool, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    r = min(m, n)
    u, v = random_orthogonal(rng, m)[:, :r], random_orthogonal(rng, n)[:r]
    o = newton_schulz(scale * u @ np.diag(rng.uniform(0.2, 1, r)) @ v, extra_normalisation=extra)
    sigma = u.T @ o @ v.T
    np.testing.assert_allclose(sigma, np.diag(np.diag(sigma)), atol=1e-10)
    # Five iterations map [0.05, 1] into this interval; the inputs are above 0.2 / sqrt(7) once normalised.
    assert np.diag(sigma).min() > 0.65
    assert np.diag(sigma).max() < 1.25


def test_newton_schulz_of_zero_is_zero() -> None:
    assert not newton_schulz(np.zeros((3, 4))).any()
    assert not newton_schulz(np.zeros((4, 3)), extra_normalisation=True).any()


# ------------------------------------------------------------------------------ all references


def gradients(seed: int, steps: int, *shapes: tuple[int, ...]) -> list[list[Array]]:
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=shape) + 0.5 for shape in shapes] for _ in range(steps)]


@pytest.mark.parametrize("name", REFERENCES)
def test_moves_in_float64_and_leaves_its_inputs_alone(name: str) -> None:
    params = [np.ones((4, 3), np.float32), np.ones((3, 2, 2, 2), np.float32)]
    grads = gradients(0, 12, (4, 3), (3, 2, 2, 2))
    inputs: list[Any] = [params, *grads]
    before = copy.deepcopy(inputs)
    trajectory = replay(REFERENCES[name](params), grads)
    for old, new in zip(before, inputs):
        for x, y in zip(old, new):
            np.testing.assert_array_equal(x, y)
    for p, moved in zip(params, trajectory):
        assert moved.dtype == np.float64
        assert np.isfinite(moved).all()
        assert (moved != p).any(0).all()  # Steps of equal size may add up to none.


@pytest.mark.parametrize("name", REFERENCES)
def test_lr_of_the_step_replaces_the_constructors(name: str) -> None:
    grads = gradients(1, 5, (4, 4))
    schedule = [0.1, 0.2, 0.05, 0.0, 0.3]
    by_argument = replay(REFERENCES[name]([np.ones((4, 4))], lr=7.0), grads, schedule)
    reference = REFERENCES[name]([np.ones((4, 4))])
    for t, lr in enumerate(schedule):
        reference.lr = lr
        reference.step(grads[t])
        np.testing.assert_array_equal(reference.params[0], by_argument[0][t])


@pytest.mark.parametrize("name", [name for name in REFERENCES if kind_of(name) != "matrix"])
def test_element_wise_references_do_not_see_how_parameters_are_cut(name: str) -> None:
    grads = gradients(2, 30, (3, 4))
    decay = {"weight_decay": 0.01} if "weight_decay" in RULES[name].fields else {}
    (whole,) = replay(REFERENCES[name]([np.ones((3, 4))], **decay), grads)
    cut = REFERENCES[name]([np.ones((1, 4)), np.ones((2, 4))], **decay)
    parts = replay(cut, [[g[:1], g[1:]] for (g,) in grads])
    joined = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(joined, whole, rtol=1e-10)  # HVAdam's sums are reordered


@pytest.mark.parametrize(
    "reference",
    [
        AdamWReference([np.ones((5, 4))], eps=0.0),
        MVNGradReference([np.ones((5, 4))], eps=0.0, eps_s=0.0),
        AdaBeliefReference([np.ones((5, 4))], eps=0.0, rectify=False),
        LaPropReference([np.ones((5, 4))], eps=0.0),
        AdaPNMReference([np.ones((5, 4))], eps=0.0),
        AnonReference([np.ones((5, 4))], eps=0.0, gamma=1.0),
        NAMOReference([np.ones((5, 4))], eps=0.0, orthogonalizer="exact"),
        NAMODReference([np.ones((5, 4))], eps=0.0, orthogonalizer="exact"),
        MuonReference([np.ones((5, 4))], orthogonalizer="exact"),
        SOAPReference([np.ones((5, 4))], eps=0.0),
        DeVAReference([np.ones((5, 4))], eps=0.0, orthogonalizer="exact"),
        DeVAReference([np.ones((5, 4))], eps=0.0, orthogonalizer="exact", form="efficient"),
    ],
    ids=lambda reference: type(reference).__name__,
)
def test_gradient_scale_does_not_matter(reference: Reference) -> None:
    grads = gradients(3, 25, (5, 4))
    (scaled,) = replay(copy.deepcopy(reference), [[g * 2.0**20] for (g,) in grads])
    (plain,) = replay(reference, grads)
    np.testing.assert_allclose(scaled, plain, rtol=1e-10)


def first_step(cls: type[Any], g: Array, **args: Any) -> Array:
    """Displacement of the first step at learning rate 1, without weight decay."""
    reference = cls([np.zeros_like(g)], lr=1.0, weight_decay=0.0, **args)
    reference.step([g])
    return reference.params[0]


@pytest.mark.parametrize(
    ("cls", "args", "expected"),
    [
        (AdamWReference, {}, lambda g: np.sign(g)),
        (LaPropReference, {}, lambda g: np.sign(g)),
        (MVNGradReference, {"betas": (0.8, 0.9)}, lambda g: np.sign(g) / 0.8),
        (AdaBeliefReference, {"betas": (0.8, 0.9), "rectify": False}, lambda g: np.sign(g) / 0.8),
        (AdaBeliefReference, {"rectify": True}, lambda g: g),
        (PNMReference, {"momentum": 0.8, "beta0": 1.0}, lambda g: 0.36 * 2 / math.sqrt(5) * g),
        (AdaPNMReference, {"betas": (0.8, 0.9), "beta0": 0.0}, lambda g: 1.8 * np.sign(g)),
        (MAdamReference, {}, lambda g: np.sign(g)),
        (LaMAdamReference, {}, lambda g: np.sign(g)),
        (HVAdamReference, {"betas": (0.8, 0.9)}, lambda g: 0.8 * np.sign(g)),
        (AnonReference, {"gamma": 0.0}, lambda g: g),
        (AnonReference, {"gamma": 0.5}, lambda g: np.sign(g) * np.sqrt(np.abs(g))),
        (AnonReference, {"gamma": -1.0}, lambda g: g * np.abs(g)),
        (DeVAVectorReference, {"betas": (0.9, 0.99)}, lambda g: 10 * np.sign(g)),
    ],
)
def test_first_step(cls: type[Any], args: dict[str, Any], expected: Any) -> None:
    g = np.array([-3e3, 1e3, 4e5])  # large against every eps and against DeVA's constant 1e-5
    np.testing.assert_allclose(-first_step(cls, g, **args), expected(g), rtol=1e-6)


# ------------------------------------------------------------------------------ element-wise optimizers


def test_adamw_is_torchs() -> None:
    grads = gradients(4, 20, (3, 4))
    (ours,) = replay(AdamWReference([np.ones((3, 4))], lr=0.01, eps=1e-3, weight_decay=0.1), grads)
    p = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=0.01, eps=1e-3, weight_decay=0.1)
    for t, (g,) in enumerate(grads):
        p.grad = torch.from_numpy(g)
        optimizer.step()
        np.testing.assert_allclose(ours[t], p.detach().numpy(), rtol=1e-12)


@given(
    b1=st.floats(0.05, 0.99),
    b2=st.floats(0.05, 0.999),
    spike=st.floats(1e-3, 1e30),
    quiet=st.integers(0, 20),
)
def test_mvn_grad_response_to_a_spike_is_bounded(b1: float, b2: float, spike: float, quiet: int) -> None:
    """|z| <= 1 / (b1 sqrt(1 - b2)) for any betas and spike; the k-th later update has b1^k (1 - b1) of it."""
    t = quiet + 1
    grads = [[np.zeros(1)]] * quiet + [[np.full(1, spike)]] + [[np.zeros(1)]] * 5
    (p,) = replay(MVNGradReference([np.zeros(1)], lr=1.0, betas=(b1, b2), eps=1e-12, eps_s=0.0), grads)
    updates = -np.diff(p[:, 0], prepend=0.0)[quiet:]
    k = np.arange(6)
    z = math.sqrt(1 - b2**t) / (b1 * math.sqrt(1 - b2))
    bound = b1**k * (1 - b1) * z / (1 - b1 ** (t + k))
    assert (updates <= bound * (1 + 1e-9)).all()
    if spike > 1:
        np.testing.assert_allclose(updates, bound, rtol=1e-6)


@given(refresh=st.sampled_from(["powers_of_two", "every_step"]), b1=st.floats(0, 0.99), seed=seeds)
@settings(max_examples=20)
def test_anon_without_adaptivity_is_momentum(refresh: Any, b1: float, seed: int) -> None:
    grads = gradients(seed, 20, (4,))
    (p,) = replay(AnonReference([np.zeros(4)], lr=0.1, betas=(b1, 0.999), gamma=0.0, refresh=refresh), grads)
    expected, m = np.zeros(4), np.zeros(4)
    for t, (g,) in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        expected = expected - 0.1 * m / (1 - b1**t)
        np.testing.assert_allclose(p[t - 1], expected, rtol=1e-9, atol=1e-12)


def test_anon_scale_is_frozen_between_refreshes() -> None:
    """A gradient after step 8 changes the scale only at step 16: until then the response is linear."""
    shared = gradients(5, 8, (4,))

    def steps_9_to_16(gradient: float) -> Array:
        (p,) = replay(
            AnonReference([np.zeros(4)], betas=(0.0, 0.9), gamma=1.0),
            [*shared, *[[np.full(4, gradient)]] * 8],
        )
        return np.diff(p, axis=0)[7:]

    one, ten = steps_9_to_16(1.0), steps_9_to_16(10.0)
    np.testing.assert_allclose(ten[:7], 10 * one[:7], rtol=1e-10)
    assert (np.abs(ten[7]) < 9 * np.abs(one[7])).all()


def test_adabelief_amsgrad_never_lengthens_a_step() -> None:
    grads = gradients(6, 40, (50,))
    plain, ams = (
        replay(AdaBeliefReference([np.zeros(50)], betas=(0.9, 0.9), rectify=False, amsgrad=amsgrad), grads)[0]
        for amsgrad in (False, True)
    )
    plain_step, ams_step = np.abs(np.diff(plain, axis=0)), np.abs(np.diff(ams, axis=0))
    assert (ams_step <= plain_step * (1 + 1e-9) + 1e-15).all()
    assert (ams_step < 0.9 * plain_step).any()


def test_laprop_at_lr_zero_stands_still() -> None:
    grads = gradients(7, 6, (4,))
    (p,) = replay(LaPropReference([np.ones(4)]), grads, [0.0, 0.0, 0.1, 0.1, 0.0, 0.1])
    moved = np.abs(np.diff(p, axis=0, prepend=np.ones((1, 4)))).max(axis=1)
    assert (moved[[0, 1, 4]] == 0).all()
    assert (moved[[2, 3, 5]] > 0).all()
    assert np.isfinite(p).all()


def test_laprop_is_linear_in_a_constant_lr() -> None:
    grads = gradients(8, 15, (4,))
    one, two = (replay(LaPropReference([np.zeros(4)], lr=lr, centered=True), grads)[0] for lr in (0.1, 0.2))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-12)


def test_hvadam_hidden_vector_is_the_nearest_point_to_the_origin() -> None:
    reference = HVAdamReference([np.zeros(4), np.zeros((2, 3))], betas=(0.9, 0.99))
    b1 = 0.9
    m = np.zeros(10)
    hidden = None
    for t, g in enumerate(gradients(9, 20, (4,), (2, 3)), start=1):
        reference.step(g)
        m = b1 * m + (1 - b1) * np.concatenate([x.ravel() for x in g])
        mhat = m / (1 - b1**t)
        new = np.concatenate([s["v"].ravel() for s in reference.states])
        if hidden is None:
            np.testing.assert_allclose(new, mhat, rtol=1e-12)
        else:
            line = hidden - mhat
            assert abs(new @ line) <= 1e-9 * np.linalg.norm(new) * np.linalg.norm(line)
            # On the line through both: what is left beside it is rounding.
            off = new - mhat - (new - mhat) @ line / (line @ line) * line
            assert np.linalg.norm(off) <= 1e-9 * np.linalg.norm(new)
        hidden = new


# ------------------------------------------------------------------------------ matrix optimizers


@pytest.mark.parametrize(
    ("shape", "scale", "factor"),
    [
        ((6, 4), "original", math.sqrt(1.5)),
        ((4, 6), "original", 1.0),
        ((6, 2, 4, 2), "original", math.sqrt(2)),  # the last two axes of the kernel
        ((6, 4), "moonlight", 0.2 * math.sqrt(6)),
        ((2, 6, 3, 3), "moonlight", 0.2 * math.sqrt(6)),  # the first two axes of the kernel
    ],
)
def test_muon_update_is_orthogonal(shape: tuple[int, ...], scale: Any, factor: float) -> None:
    (g,) = gradients(10, 1, shape)[0]
    u = first_step(MuonReference, g, scale=scale, orthogonalizer="exact").reshape(shape[0], -1)
    np.testing.assert_allclose(np.linalg.svd(u, compute_uv=False), factor, rtol=1e-12)


@pytest.mark.parametrize("cls", [NAMOReference, NAMODReference])
@pytest.mark.parametrize(("nesterov", "expected"), [(False, 1.0), (True, 1.95)])
def test_namo_first_scale(cls: type[Any], nesterov: bool, expected: float) -> None:
    (g,) = gradients(11, 1, (5, 3))[0]
    u = first_step(cls, g, nesterov=nesterov, scale=None, max_step=None, orthogonalizer="exact")
    np.testing.assert_allclose(-u, expected * polar_factor(g), rtol=1e-5)  # eps = 1e-8, column norms ~ 0.1


@given(mu1=st.floats(0.0, 0.99), extra=st.floats(0, 1), seed=seeds)
@settings(max_examples=50)
def test_namo_scale_bound(mu1: float, extra: float, seed: int) -> None:
    """Lemma 7: for mu1 <= mu2 no scale exceeds sqrt((1 - mu1) / (1 - mu2))."""
    mu2 = mu1 + extra * (0.999 - mu1)
    rng = np.random.default_rng(seed)
    # Heavy-tailed in time and over the columns, so that the bound is approached.
    grads = [[rng.normal(size=(4, 3)) * np.exp(3 * rng.normal(size=3))] for _ in range(20)]
    bound = math.sqrt((1 - mu1) / (1 - mu2)) * (1 + 1e-9)
    for cls in (NAMOReference, NAMODReference):
        args: dict[str, Any] = {
            "nesterov": False,
            "scale": None,
            "orthogonalizer": "exact",
            "weight_decay": 0.0,
        }
        (p,) = replay(cls([np.zeros((4, 3))], lr=1.0, betas=(mu1, mu2), eps=0.0, **args), grads)
        assert np.linalg.norm(np.diff(p, axis=0), axis=1).max() <= bound


@given(clamp=st.floats(0.1, 1), seed=seeds)
@settings(max_examples=50)
def test_namo_d_columns_stay_near_their_mean(clamp: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    args: dict[str, Any] = {
        "nesterov": False,
        "scale": None,
        "orthogonalizer": "exact",
        "weight_decay": 0.0,
        "clamp": clamp,
    }
    reference = NAMODReference([np.zeros((6, 3))], lr=1.0, **args)
    grads = [[rng.normal(size=(6, 3)) * np.exp(3 * rng.normal(size=3))] for _ in range(10)]
    (p,) = replay(reference, grads)
    columns = np.linalg.norm(np.diff(p, axis=0), axis=1)  # the polar factor's columns have norm 1
    assert (columns.min(axis=1) >= clamp**2 * columns.max(axis=1) * (1 - 1e-9)).all()


def test_namo_clamps_the_released_step_at_one() -> None:
    (g,) = gradients(12, 1, (5, 3))[0]
    for cls in (NAMOReference, NAMODReference):
        reference = cls([np.ones((5, 3))], lr=100.0, weight_decay=0.25, orthogonalizer="exact")
        reference.step([g])
        mix = g * (1 - 0.95**2)
        np.testing.assert_allclose(reference.params[0], 0.75 - polar_factor(mix), rtol=1e-12)


DEVA_FORMS = ("momentum", "sign", "instantaneous", "efficient")


@pytest.mark.parametrize(
    ("cls", "shape", "args"),
    [
        (MuonReference, (5, 3), {}),
        (NAMOReference, (5, 3), {}),
        (SOAPReference, (5, 5), {"precondition_frequency": 3}),
        (SOAPReference, (5, 5), {"precondition_frequency": 1, "shampoo_beta": 0.7}),
        (SOAPReference, (3, 4, 5), {"precondition_frequency": 3}),
        *[(DeVAReference, (5, 5), {"form": form, "precondition_frequency": 3}) for form in DEVA_FORMS],
        (DeVAReference, (5, 5), {"precondition_frequency": 4, "shampoo_beta": 0.7, "nesterov": False}),
    ],
)
def test_rotated_gradients_give_rotated_steps(cls: type[Any], shape: tuple[int, ...], args: dict[str, Any]) -> None:
    """Matrix rules do not depend on the coordinates, whatever the signs and the order of the eigenvectors."""
    rng = np.random.default_rng(13)
    rotations = [random_orthogonal(rng, n) for n in shape]

    def rotated(x: Array) -> Array:
        for axis, q in enumerate(rotations):
            x = np.swapaxes(np.swapaxes(x, axis, -1) @ q.T, axis, -1)
        return x

    if cls is not SOAPReference:
        args = {**args, "orthogonalizer": "exact"}
    grads = gradients(14, 15, shape)
    (p,) = replay(cls([np.ones(shape)], **args), grads)
    (q,) = replay(cls([rotated(np.ones(shape))], **args), [[rotated(g)] for (g,) in grads])
    np.testing.assert_allclose(q, np.stack([rotated(x) for x in p]), atol=1e-9)


@pytest.mark.parametrize("cls", [SOAPReference, DeVAReference])
def test_first_call_only_builds_the_bases(cls: type[Any]) -> None:
    reference = cls([np.ones((4, 4))], weight_decay=0.5)
    reference.step(gradients(15, 1, (4, 4))[0])
    np.testing.assert_array_equal(reference.params[0], np.ones((4, 4)))


@pytest.mark.parametrize("cls", [SOAPReference, DeVAReference])
def test_bias_correction_is_a_factor_of_the_step(cls: type[Any]) -> None:
    grads = gradients(16, 6, (4, 4))
    b1, b2 = 0.8, 0.9
    corrected, plain = (
        replay(cls([np.zeros((4, 4))], betas=(b1, b2), weight_decay=0.0, correct_bias=correct), grads)[0]
        for correct in (True, False)
    )
    for t in range(1, 6):  # the t of the paper: the first call does not count
        factor = math.sqrt(1 - b2**t) / (1 - b1**t)
        np.testing.assert_allclose(
            corrected[t] - corrected[t - 1], factor * (plain[t] - plain[t - 1]), rtol=1e-9, atol=1e-12
        )


def test_soap_without_bases_is_adam_one_call_later() -> None:
    grads = gradients(17, 12, (6,), (4, 3))
    soap = SOAPReference([np.ones(6), np.ones((4, 3))], eps=0.0, weight_decay=0.0, max_precondition_dim=2)
    adam = AdamWReference([np.ones(6), np.ones((4, 3))], lr=3e-3, betas=(0.95, 0.95), eps=0.0, weight_decay=0.0)
    for late, p in zip(replay(soap, grads), replay(adam, grads[1:])):
        np.testing.assert_allclose(late[1:], p, rtol=1e-10)


def test_soap_one_sided() -> None:
    """Only the axis that is too long for a basis depends on the coordinates."""
    q = random_orthogonal(np.random.default_rng(18), 6)
    grads = gradients(19, 10, (6, 4))
    args: dict[str, Any] = {"max_precondition_dim": 5, "precondition_frequency": 2, "weight_decay": 0.0}
    (p,) = replay(SOAPReference([np.zeros((6, 4))], **args), grads)
    (rows,) = replay(SOAPReference([np.zeros((6, 4))], **args), [[q @ g] for (g,) in grads])
    r = random_orthogonal(np.random.default_rng(20), 4)
    (columns,) = replay(SOAPReference([np.zeros((6, 4))], **args), [[g @ r] for (g,) in grads])
    np.testing.assert_allclose(columns, p @ r, atol=1e-10)
    assert np.abs(rows - q @ p).max() > 1e-4


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((8, 3, 3, 3), 27, (24, 9)),
        ((8, 3, 3, 3), 9, (8, 9, 3)),
        ((8, 3, 3, 3), 10000, (216,)),
        ((100, 3, 3), 9, (100, 9)),
        ((5, 4), 3, (5, 4)),
        ((1, 1), 10, (1,)),
    ],
)
def test_soap_merges_neighbouring_axes(shape: tuple[int, ...], limit: int, merged: tuple[int, ...]) -> None:
    assert merged_shape(shape, limit) == merged


def test_soap_merge_dims_is_soap_on_the_merged_tensor() -> None:
    grads = gradients(21, 12, (4, 3, 2, 2))
    args: dict[str, Any] = {"max_precondition_dim": 12, "precondition_frequency": 3}
    (p,) = replay(SOAPReference([np.ones((4, 3, 2, 2))], merge_dims=True, **args), grads)
    (q,) = replay(SOAPReference([np.ones((12, 4))], **args), [[g.reshape(12, 4)] for (g,) in grads])
    np.testing.assert_allclose(p.reshape(q.shape), q, rtol=1e-12)


def test_soap_preconditions_a_vector_as_a_column() -> None:
    grads = gradients(22, 12, (5,))
    (p,) = replay(SOAPReference([np.ones(5)], precondition_1d=True, precondition_frequency=3), grads)
    column = SOAPReference([np.ones((5, 1))], precondition_frequency=3)
    (q,) = replay(column, [[g[:, None]] for (g,) in grads])
    np.testing.assert_allclose(p, q[..., 0], rtol=1e-9)
    (without,) = replay(SOAPReference([np.ones(5)], precondition_frequency=3), grads)
    assert np.abs(p - without).max() > 1e-4


@pytest.mark.parametrize("form", ["momentum", "instantaneous"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (4, 2, 1, 3)])
def test_deva_first_step_is_the_polar_factor(form: Any, shape: tuple[int, ...]) -> None:
    """All modulations are equal there: 1 / sqrt(1 - b2), which the bias correction cancels."""
    b1 = 0.9
    grads = gradients(23, 2, shape)
    reference = DeVAReference(
        [np.zeros(shape)],
        lr=1.0,
        betas=(b1, 0.99),
        eps=0.0,
        weight_decay=0.0,
        form=form,
        orthogonalizer="exact",
    )
    u = replay(reference, grads)[0][1].reshape(shape[0], -1)
    expected = 0.2 * math.sqrt(max(u.shape)) / (1 - b1) * polar_factor(grads[1][0].reshape(u.shape))
    np.testing.assert_allclose(-u, expected, atol=1e-10)


def test_deva_instantaneous_form_rests_without_a_gradient() -> None:
    """Its modulation is that of the present gradient; the momentum form goes on with the momentum's."""
    grads = [*gradients(24, 5, (4, 4)), [np.zeros((4, 4))]]
    forms: tuple[tuple[Any, bool], ...] = (("instantaneous", True), ("momentum", False))
    for form, rests in forms:
        reference = DeVAReference([np.zeros((4, 4))], weight_decay=0.0, form=form, orthogonalizer="exact")
        (p,) = replay(reference, grads)
        assert (np.abs(p[-1] - p[-2]).max() < 1e-12) == rests


@pytest.mark.parametrize(("shampoo_beta", "used"), [(None, 0.8), (0.6, 0.6)])
def test_shampoo_beta_averages_the_outer_products(shampoo_beta: float | None, used: float) -> None:
    grads = gradients(25, 8, (4, 3))
    reference = SOAPReference([np.zeros((4, 3))], betas=(0.9, 0.8), shampoo_beta=shampoo_beta)
    replay(reference, grads)
    weights = (1 - used) * used ** np.arange(7, -1, -1)
    expected = sum(w * g @ g.T for w, (g,) in zip(weights, grads))
    np.testing.assert_allclose(reference.states[0]["L"][0], expected, rtol=1e-12)
