"""What papers claim of their optimizers and needs no training: four small experiments, and what they gave here.

    python -m benchmarks.claims --json benchmarks/results/claims.json    # a minute on one core
    python -m benchmarks.report                                          # writes docs/claims.md from it

Every experiment runs the optimizers of this library as users have them. ``tests/benchmarks/test_claims.py`` says what
must come out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import lightning_optim

from .machine import describe

Make = Callable[[Tensor], Optimizer]


def quantiles(x: Tensor) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return torch.quantile(x.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


# --- DeVA's trace quadratic -------------------------------------------------------------------------------------------

#: Eigenvalues of the three blocks of the Hessian.
HESSIANS = {
    "heterogeneous": [[1.0, 2.0, 3.0], [99.0, 100.0, 101.0], [4998.0, 4999.0, 5000.0]],
    "homogeneous": [[1.0, 99.0, 4998.0], [2.0, 100.0, 4999.0], [3.0, 101.0, 5000.0]],
}
#: Quartiles of the suboptimality after 400 steps over 100 seeds, by the authors' program.
RELEASED = {
    "heterogeneous": {
        "GD": [19.0, 22.7, 27.6],
        "SignSGD": [1.8e4, 6.4e5, 1.0e6],
        "Adam": [0.107, 0.264, 0.575],
        "Muon": [0.045, 0.093, 0.185],
        "Muon in bfloat16": [0.045, 0.093, 0.185],
        "SOAP": [0.083, 0.233, 0.676],
        "DeVAVector": [0.099, 0.236, 0.700],
        "DeVA": [0.015, 0.028, 0.080],
    },
    "homogeneous": {
        "GD": [18.6, 24.5, 29.1],
        "SignSGD": [518.0, 918.0, 1.9e3],
        "Adam": [13.2, 17.6, 23.2],
        "Muon": [8.2, 13.9, 27.8],
        "Muon in bfloat16": [8.2, 13.9, 27.8],
        "SOAP": [0.151, 0.214, 0.334],
        "DeVAVector": [12.3, 17.2, 22.8],
        "DeVA": [31.0, 84.0, 152.0],
    },
}
_SIZE, _STEPS = 9, 400


def _matrices(x: Tensor, blocks: int) -> list[dict[str, Any]]:
    return [{"params": [x], "role": "matrix", "blocks": blocks}]


class Bfloat16Muon(Optimizer):
    """The authors' Muon, whose products are in bfloat16, which this library uses only where it is faster."""

    def __init__(self, x: Tensor, seeds: int) -> None:
        super().__init__([x], {"lr": 0.1})
        self.seeds = seeds

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        (x,) = self.param_groups[0]["params"]
        y = x.grad.view(self.seeds, _SIZE, _SIZE).bfloat16()
        y /= y.norm(dim=(-2, -1), keepdim=True) + 1e-7
        for _ in range(5):
            gram = y @ y.mT
            y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
        x.sub_(self.param_groups[0]["lr"] * _SIZE**0.5 * y.float().view_as(x))


def _trace_methods(seeds: int) -> dict[str, Make]:
    betas = (0.0, 0.99)
    shared: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0}
    eigen: dict[str, Any] = {"betas": betas, "precondition_frequency": 10, "stagger": False, **shared}
    return {
        "GD": lambda x: torch.optim.SGD([x], lr=1e-4),
        "SignSGD": lambda x: torch.optim.SGD([x], lr=0.1),  # of the gradient's sign
        "Adam": lambda x: torch.optim.Adam([x], lr=0.1, betas=betas),
        # The authors' Muon multiplies by sqrt(max(m, n)), five times what is multiplied by here.
        "Muon": lambda x: lightning_optim.Muon(
            _matrices(x, seeds), lr=0.5, momentum=0.0, nesterov=False, scale="moonlight", weight_decay=0.0
        ),
        "Muon in bfloat16": lambda x: Bfloat16Muon(x, seeds),
        "SOAP": lambda x: lightning_optim.SOAP(_matrices(x, seeds), **eigen),
        "DeVAVector": lambda x: lightning_optim.DeVAVector([x], betas=betas, **shared),
        "DeVA": lambda x: lightning_optim.DeVA(_matrices(x, seeds), **eigen),
    }


def trace_quadratic(
    hessian: str, method: str, seeds: int = 100, generator_seed: int = 0
) -> tuple[list[float], dict[int, float]]:
    r"""Minimise :math:`\frac12 \mathrm{tr}(X^\top H X)` from sampled rows, for all seeds at once.

    ``H`` is block-diagonal, three randomly rotated blocks of three, with a spectrum per block (heterogeneous) or all
    scales in every block (homogeneous). The loss of a step is :math:`\frac12 \cdot \frac93 \|A_b X\|_F` with three
    rows of :math:`A = H^{1/2}`, drawn with replacement; the norm is not squared, as released. Gradient descent alone
    has the exact gradient.

    Returns:
        Quartiles of the suboptimality over the seeds at the end, and medians by step.
    """
    generator = torch.Generator().manual_seed(generator_seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h = torch.zeros(seeds, _SIZE, _SIZE, dtype=torch.float64)
    root = torch.zeros_like(h)
    for i, eigenvalues in enumerate(HESSIANS[hessian]):
        values = torch.tensor(eigenvalues, dtype=torch.float64)
        q, r = torch.linalg.qr(normal(seeds, 3, 3))
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over rotations
        rows = slice(3 * i, 3 * i + 3)
        h[:, rows, rows] = q @ torch.diag(values) @ q.mT
        root[:, rows, rows] = q @ torch.diag(values.sqrt()) @ q.mT
    h, root = h.float(), root.float()
    x = torch.nn.Parameter(normal(seeds * _SIZE, _SIZE).float())
    optimizer = _trace_methods(seeds)[method](x)
    lr = optimizer.param_groups[0]["lr"]
    medians: dict[int, float] = {}
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / _STEPS))
        y = x.detach().view(seeds, _SIZE, _SIZE)
        if method == "GD":
            gradient = h @ y
        else:
            drawn = torch.randint(_SIZE, (seeds, 3), generator=generator)
            a = root.gather(1, drawn.unsqueeze(-1).expand(-1, -1, _SIZE))
            ay = a @ y
            norm = ay.square().sum((-2, -1), keepdim=True).sqrt()
            gradient = 0.5 * _SIZE / 3 * (a.mT @ ay) / norm
        gradient = gradient.reshape(x.shape)
        x.grad = gradient.sign() if method == "SignSGD" else gradient
        optimizer.step()
        if step + 1 in (50, 100, 150, 200, 250, 300, 350, 400):
            y = x.detach().view(seeds, _SIZE, _SIZE).double()
            medians[step + 1] = quantiles(0.5 * (y * (h.double() @ y)).sum((-2, -1)))[1]
    y = x.detach().view(seeds, _SIZE, _SIZE).double()
    return quantiles(0.5 * (y * (h.double() @ y)).sum((-2, -1))), medians


# --- HVAdam's valley --------------------------------------------------------------------------------------------------

VALLEY: dict[str, Make] = {
    "SGD": lambda x: torch.optim.SGD([x], lr=_RATE, momentum=0.9),
    "Adam": lambda x: torch.optim.Adam([x], lr=_RATE),
    "AdaBelief": lambda x: lightning_optim.AdaBelief([x], lr=_RATE, rectify=False),
    "MVNGrad": lambda x: lightning_optim.MVNGrad([x], lr=_RATE),
    "HVAdam": lambda x: lightning_optim.HVAdam([x], lr=_RATE),
}
_RATE = 0.01


def valley(method: str, steps: int = 3000, start: tuple[float, float] = (-8.0, -4.0)) -> list[float]:
    r"""Values of :math:`4|x - y| + |x + y|`, a steep valley with a flat floor, at every step."""
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = VALLEY[method](x)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 4 * (x[0] - x[1]).abs() + (x[0] + x[1]).abs()
        loss.backward()
        values.append(float(loss.detach()))
        optimizer.step()
    return values


# --- MaxVA's noisy quadratic ------------------------------------------------------------------------------------------

RATES = [round(1e-3 * 10 ** (i / 4), 5) for i in range(10)]  # 1e-3 to 0.18
BETAS = [0.5, 0.9, 0.99, 0.999]


def noisy_quadratic(method: str, lr: float, beta2: float = 0.999, trials: int = 100, steps: int = 500) -> float:
    r"""Mean expected loss of the last hundred steps on :math:`\frac12\sum_i h_i (\theta_i - \epsilon_i)^2`.

    The curvatures are 1 and 20, the noise has a standard deviation of 0.2, and the expected loss is
    :math:`\frac12\sum_i h_i\theta_i^2`, without that of the noise.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.tensor([1.0, 20.0])
    x = torch.nn.Parameter(torch.ones(trials, 2))
    optimizer: Optimizer
    if method == "Adam":
        optimizer = torch.optim.Adam([x], lr=lr, betas=(0.9, beta2))
    else:
        optimizer = lightning_optim.MAdam([x], lr=lr, betas=(0.9, beta2))
    losses = []
    for step in range(steps):
        x.grad = h * (x.detach() - 0.2 * torch.randn(trials, 2, generator=generator))
        optimizer.step()
        if step >= steps - 100:
            losses.append(float(0.5 * (h * x.detach().square()).sum(1).mean()))
    return sum(losses) / len(losses)


# --- MVN-Grad's low-variance regime -----------------------------------------------------------------------------------

NOISES = [10.0**-i for i in range(6)]


def low_variance(method: str, noise: float, steps: int = 400) -> tuple[float, float]:
    r"""How updates of gradients :math:`g + \sigma\xi` depend on ``g``, whose entries are 0.1, 0.3, 1 and 3.

    The second moments forget their start within the run, and their floor, 1e-4 per step, is 1e-3 in all.

    Returns:
        The exponent of the size of the mean update as a power of that of the gradient, 0 for signs and 1 for plain
        gradients, and the mean update of the entry 1 over the learning rate.
    """
    mean = torch.tensor([0.1, 0.3, 1.0, 3.0]).repeat(250, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(torch.zeros_like(mean))
    optimizer: Optimizer
    if method == "Adam":
        optimizer = torch.optim.Adam([x], lr=1.0, betas=(0.9, 0.9))
    elif method == "AdaBelief":
        optimizer = lightning_optim.AdaBelief([x], lr=1.0, betas=(0.9, 0.9), eps=1e-4, rectify=False)
    else:
        optimizer = lightning_optim.MVNGrad([x], lr=1.0, betas=(0.9, 0.9), eps=1e-8, eps_s=1e-4)
    total = torch.zeros_like(mean)
    for step in range(steps):
        x.grad = mean + noise * torch.randn(mean.shape, generator=generator)
        before = x.detach().clone()
        optimizer.step()
        if step >= steps // 2:
            total -= x.detach() - before
    sizes = (total / (steps - steps // 2)).mean(0)
    logs, of = sizes.abs().log(), mean[0].log()
    slope = ((of - of.mean()) * (logs - logs.mean())).sum() / (of - of.mean()).square().sum()
    return float(slope), float(sizes[2])


def measured(seeds: int = 100) -> dict[str, Any]:
    """All of it, as it is written down."""
    trace = []
    for hessian, methods in RELEASED.items():
        for method, released in methods.items():
            found, medians = trace_quadratic(hessian, method, seeds)
            row = {"hessian": hessian, "method": method, "quartiles": found, "released": released}
            trace.append({**row, "medians": medians})
    quadratic: list[Mapping[str, Any]] = []
    for method in ("Adam", "MAdam"):
        for beta2 in BETAS:
            losses = {lr: noisy_quadratic(method, lr, beta2) for lr in RATES}
            quadratic.append({"method": method, "beta2": beta2, "losses": losses})
    regimes = []
    for method in ("Adam", "AdaBelief", "MVNGrad"):
        for noise in NOISES:
            slope, size = low_variance(method, noise)
            regimes.append({"method": method, "noise": noise, "exponent": slope, "size": size})
    return {
        "machine": describe(torch.device("cpu")),
        "seeds": seeds,
        "rows": trace,
        "valley": [{"method": method, "values": valley(method)[::10]} for method in VALLEY],
        "quadratic": quadratic,
        "low_variance": regimes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()
    args.json.write_text(json.dumps(measured(args.seeds), indent=1) + "\n")


if __name__ == "__main__":
    main()
