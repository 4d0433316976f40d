"""What the papers say of their algorithms, beyond the equations that the references repeat."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo

from .rows import build, gradients, run


def moved(
    name: str, shape: tuple[int, ...], steps: int, grads: Any = None, start: float = 0.0, **arguments: Any
) -> Any:
    """The parameter after each step, in float64, from ``start`` times a fixed matrix."""
    p = nn.Parameter(start * torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    optimizer = build(name, [p], **arguments)
    path = [p.detach().clone()]
    for t in range(1, steps + 1):
        p.grad = gradients([p], t)[0] if grads is None else grads(t)
        optimizer.step()
        path.append(p.detach().clone())
    return path, optimizer.state[p]


def spectral_norm(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), 2))


# --- MARS-M -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 2, 3, 3)])
def test_muon_with_nesterov_is_marsm(beta: float, shape: tuple[int, ...]) -> None:
    shared = {"momentum": beta, "lr": 0.1, "weight_decay": 0.1, "orthogonalizer": "exact"}
    marsm, _ = moved("MARSM", shape, 8, gamma=1 - beta, memory_efficient=True, **shared)
    muon, _ = moved("Muon", shape, 8, scale="moonlight", nesterov=True, **shared)
    torch.testing.assert_close(marsm[-1], muon[-1], rtol=1e-12, atol=1e-12)  # float64, in another order


@pytest.mark.parametrize(("size", "equal"), [(1e-3, True), (1.0, False)])
def test_the_memory_efficient_form_of_marsm_is_the_other_without_its_bound(size: float, equal: bool) -> None:
    def small(t: int) -> Tensor:
        return size * gradients([torch.empty(4, 3, dtype=torch.float64)], t)[0]

    paths = [moved("MARSM", (4, 3), 8, small, memory_efficient=x, gamma=0.1)[0] for x in (True, False)]
    assert torch.allclose(paths[0][-1], paths[1][-1], rtol=1e-12, atol=1e-12) is equal


def test_mars_without_correction_is_adamw_on_bounded_gradients() -> None:
    def small(t: int) -> Tensor:
        return 0.1 * gradients([torch.empty(4, 3, dtype=torch.float64)], t)[0]

    mars, _ = moved("MARS", (4, 3), 8, small, 1.0, gamma=0.0, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    q = nn.Parameter(mars[0].clone())
    adamw = torch.optim.AdamW([q], 0.01, (0.9, 0.99), weight_decay=0.1)
    for t in range(1, 9):
        q.grad = small(t)
        assert q.grad.norm() < 1
        adamw.step()
    torch.testing.assert_close(mars[-1], q.detach(), rtol=1e-12, atol=1e-12)


def test_mars_reduces_the_noise_of_gradients_that_change_together() -> None:
    """Gradients of one direction with a common drift: the correction takes out the lag of the momentum."""
    beta, drift = 0.9, 0.01
    ramp = [torch.full((2, 2), 0.01 + drift * t / 10, dtype=torch.float64) for t in range(60)]
    lags = {}
    for gamma in (0.0, 1.0):
        _, state = moved("MARS", (2, 2), 60, lambda t: ramp[t - 1], gamma=gamma, betas=(beta, 0.99), lr=0.0)
        lags[gamma] = float((ramp[-1] - state["m"]).abs().max())
    # Momentum lags beta/(1-beta) steps of the drift behind; with the whole correction it does not.
    assert lags[0.0] == pytest.approx(drift / 10 * beta / (1 - beta), rel=0.05)
    assert lags[1.0] < 1e-2 * lags[0.0]


# --- AdaGO ------------------------------------------------------------------------------------------------------------


def test_steps_of_adago_decay_as_those_of_adagrad() -> None:
    large = torch.full((3, 3), 10.0, dtype=torch.float64)
    path, _ = moved("AdaGO", (3, 3), 20, lambda t: large, lr=0.5, orthogonalizer="exact")
    steps = [spectral_norm(b - a) for a, b in pairwise(path)]
    # All gradients count as gamma = v0, so the t-th step is lr / sqrt(t + 1).
    assert steps == pytest.approx([0.5 / (t + 1) ** 0.5 for t in range(1, 21)], rel=1e-9)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_a_step_of_adago_is_between_its_floor_and_its_rate(size: float) -> None:
    path, _ = moved(
        "AdaGO", (4, 3), 10, lambda t: size * gradients([torch.empty(4, 3, dtype=torch.float64)], t)[0],
        lr=0.1, eps=1e-3, v0=1e-3, gamma=1e3, orthogonalizer="exact",
    )  # fmt: skip
    for a, b in pairwise(path):
        assert 1e-3 * (1 - 1e-9) <= spectral_norm(b - a) <= 0.1 * (1 + 1e-9)


# --- OLion ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 2, 3, 3)])
def test_all_entries_of_a_step_of_olion_are_equal_in_size(shape: tuple[int, ...]) -> None:
    path, _ = moved("OLion", shape, 3, lr=0.1, orthogonalizer="exact")
    for a, b in pairwise(path):
        torch.testing.assert_close((b - a).abs(), torch.full(shape, 0.02, dtype=torch.float64))


@pytest.mark.parametrize("orthogonalizer", ["exact", "kj5", "pe8"])
def test_a_row_without_gradients_stays_where_it_is_under_olion(orthogonalizer: str) -> None:
    def without_a_row(t: int) -> Tensor:
        g = gradients([torch.empty(5, 4, dtype=torch.float64)], t)[0]
        g[2] = 0
        return g

    path, _ = moved("OLion", (5, 4), 5, without_a_row, 1.0, orthogonalizer=orthogonalizer)
    assert torch.equal(path[-1][2], path[0][2])
    assert (path[-1][[0, 1, 3, 4]] != path[0][[0, 1, 3, 4]]).any(1).all()


# --- SSO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (8, 2, 3, 3)])
def test_weights_of_sso_stay_on_the_sphere(shape: tuple[int, ...], start: float) -> None:
    """Whatever the initialisation; off by what is of second order in the step, which the next step takes back."""
    lr, radius = 0.01, 2.0
    arguments = {"lr": lr, "radius": radius, "power_iterations": 200, "tolerance": 1e-9}
    path, _ = moved("SSO", shape, 10, None, start, **arguments)
    sphere = radius * (shape[0] / path[0].flatten(1).shape[1]) ** 0.5
    norms = [spectral_norm(w.flatten(1)) / sphere for w in path[1:]]
    assert norms == pytest.approx([1] * 10, abs=30 * lr**2)  # Curvature is that over the gap of singular values.
    on_the_way, _ = moved("SSO", shape, 10, None, start, tangent=False, **arguments)
    assert max(abs(spectral_norm(w.flatten(1)) / sphere - 1) for w in on_the_way[1:]) > max(abs(x - 1) for x in norms)


def test_steps_of_sso_are_tangents_and_as_long_as_those_of_muonsphere() -> None:
    lr = 1e-4
    path, _ = moved("SSO", (6, 4), 6, None, 1.0, lr=lr, power_iterations=300, tolerance=1e-9, orthogonalizer="exact")
    for a, b in pairwise(path[1:]):
        u, sigma, vh = torch.linalg.svd(a, full_matrices=False)
        sphere = (6 / 4) ** 0.5
        step = (b - a * sphere / sigma[0]) / (lr * sphere)
        assert float(u[:, 0] @ step @ vh[0]) == pytest.approx(0, abs=1e-7)
        torch.testing.assert_close(step.T @ step, torch.eye(4, dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_a_matrix_of_zeros_moves_under_sso() -> None:
    path, _ = moved("SSO", (4, 3), 3, lr=0.1)
    assert spectral_norm(path[1]) == pytest.approx(0.1 * (4 / 3) ** 0.5, rel=0.02)  # Singular values of pe8.
    assert spectral_norm(path[2]) > 1


# --- Admeta -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdmetaR", "AdmetaS"])
def test_a_lookahead_ends_between_slow_and_fast_weights(name: str) -> None:
    with_it, _ = moved(name, (5,), 6, None, 1.0, lookahead_steps=6)
    without, _ = moved(name, (5,), 6, None, 1.0, lookahead_steps=7)
    torch.testing.assert_close(with_it[:6], without[:6])
    # 0.8 (1 + 1 / (0.1 sqrt(6) + 3.8)) of the way.
    start, fast, slow = without[0], without[6], with_it[6]
    torch.testing.assert_close(
        (slow - start) / (fast - start), torch.full((5,), 0.99778, dtype=torch.float64), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "split"])
def test_slow_weights_do_not_push_back_what_rounding_kept_in_place(rounding: str) -> None:
    """Steps below half a digit of bfloat16: the parameter stays, and the lookahead does not move it backwards."""
    p = nn.Parameter(torch.full((4,), 256.0, dtype=torch.bfloat16))
    optimizer: Any = lo.AdmetaS([p], lr=1e-6, lookahead_steps=2, rounding=rounding)
    run(optimizer, [p], range(1, 30))
    assert (optimizer.exact(p).float() <= 256.0).all()


# --- Muown ------------------------------------------------------------------------------------------------------------


def test_the_turn_of_muown_leaves_the_norms_of_rows_alone() -> None:
    """Gradients across the rows turn them; where Muon's step makes them longer, Muown's does not."""
    start = torch.randn(5, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    g = gradients([start], 1)[0]
    u = start / start.norm(dim=1, keepdim=True)
    across = g - (g * u).sum(1, keepdim=True) * u
    norms = {}
    for name, arguments in (("Muown", {}), ("Muon", {"scale": "moonlight"})):
        path, _ = moved(name, (5, 4), 1, lambda t: across, 1.0, lr=0.1, orthogonalizer="exact", **arguments)
        assert (path[1] - path[0]).norm() > 0.05
        norms[name] = path[1].norm(dim=1) / start.norm(dim=1)
    # What rounding leaves along the rows, 1e-17, is over eps = 1e-8.
    torch.testing.assert_close(norms["Muown"], torch.ones(5, dtype=torch.float64), rtol=1e-8, atol=0)
    assert not torch.allclose(norms["Muon"], torch.ones(5, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_row_of_zeros_moves_under_muown() -> None:
    path, _ = moved("Muown", (3, 4), 4, lr=0.1)  # It starts at zero.
    assert all((b - a).norm(dim=1).min() > 1e-3 for a, b in pairwise(path))
