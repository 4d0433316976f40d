"""What is said of AdaDiag: SOAP with one basis of one gradient, and results that do not depend on the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim as lo


def gradients(shape: tuple[int, int], steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3 for _ in range(steps)]


def trained(cls: Any, grads: list[Tensor], **arguments: Any) -> Tensor:
    w = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = cls([{"params": [w], "role": "matrix"}], lr=0.01, weight_decay=0.0, **arguments)
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (2, 9)])
def test_adadiag_is_soap_with_one_basis_of_one_gradient(shape: tuple[int, int]) -> None:
    grads = gradients(shape, 12)
    never = {"precondition_frequency": 1000, "stagger": False, "betas": (0.9, 0.99), "eps": 1e-14}
    ours = trained(lo.AdaDiag, grads, **never)
    # SOAP's first call only makes the bases, and the longer axis gets none.
    soap = trained(lo.SOAP, [grads[0], *grads], max_precondition_dim=min(shape), **never)
    # SOAP's eigenvectors are those of the squared singular values, and of a ramp of 1e-9 beside them.
    torch.testing.assert_close(ours, soap, rtol=1e-6, atol=1e-8)
    assert ours.abs().max() > 0.01


@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 3)])
def test_the_first_step_of_both_bases_is_the_polar_factor(shape: tuple[int, int]) -> None:
    (g,) = gradients(shape, 1)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(trained(lo.AdaDiagPP, [g]), -0.01 * u @ vh, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ["AdaDiag", "AdaDiagPP"])
@pytest.mark.parametrize("case", ["square", "wide", "tall", "rank two", "zero first"])
def test_the_signs_that_an_svd_returns_do_not_matter(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"wide": (4, 6), "tall": (6, 4)}.get(case, (5, 5))
    grads = gradients(shape, 9)
    if case == "rank two":
        grads = [g[:, :2] @ h[:2] for g, h in zip(grads, gradients(shape, 9, seed=1))]
    if case == "zero first":
        grads[0].zero_()
    arguments: dict[str, Any] = {"precondition_frequency": 2}
    expected = trained(getattr(lo, name), grads, **arguments)
    svd, eigh = torch.linalg.svd, torch.linalg.eigh

    def other_svd(x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, sigma, vh = svd(x, **options)
        signs = torch.randint(2, sigma.shape, generator=torch.Generator().manual_seed(3)).mul(2).sub(1).to(x)
        return u * signs.unsqueeze(-2), sigma, vh * signs.unsqueeze(-1)

    def other_eigh(x: Tensor) -> Any:
        values, vectors = eigh(x)
        signs = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(4)).mul(2).sub(1).to(x)
        return torch.return_types.linalg_eigh((values, vectors * signs.unsqueeze(-2)))

    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    monkeypatch.setattr(torch.linalg, "eigh", other_eigh)
    found = trained(getattr(lo, name), grads, **arguments)
    # Signs are exact; the rest is the same arithmetic.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_rounding_errors_of_the_first_step_are_no_steps() -> None:
    """In its own bases a gradient is diagonal: other entries, divided by their own size, would move at full rate."""
    (g,) = gradients((6, 6), 1)
    double, single = (trained(lo.AdaDiagPP, [g.to(dtype)]) for dtype in (torch.float64, torch.float32))
    # Float32 bases are orthogonal to 1e-7.
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-7)
