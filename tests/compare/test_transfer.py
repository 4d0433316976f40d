"""Settings to start from with another optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim.cli import main
from lightning_optim.compare.transfer import suggest, update_sizes


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def loss(trained: nn.Module) -> torch.Tensor:
    return nn.functional.mse_loss(trained(torch.randn(64, 16)), torch.zeros(64, 4))


@pytest.mark.parametrize("name", ["AdamW", "MVNGrad", "NAMO", "SOAP", "HVAdam", "torch.optim.RMSprop", "DeVA"])
@pytest.mark.parametrize("measured", [False, True])
def test_there_and_back_is_the_same(name: str, measured: bool) -> None:
    """The rate of A that is suggested for a rate of B is the one that was suggested for B from A."""
    given = {"module": module(), "loss": loss} if measured else {}
    torch.manual_seed(1)
    there = suggest("AdamW", name, 1e-3, 0.1, **given)  # type: ignore[arg-type]
    if name == "AdamW":
        assert (there.lr, there.weight_decay) == (1e-3, 0.1)
        return
    sizes = update_sizes(module(), loss if measured else None, {name: there.lr, "AdamW": 1e-3})
    part = "matrix" if there.fallback_lr else "all"
    if not measured:
        torch.manual_seed(1)
        # Rounding to three digits; the modules are not the same, but the law of large numbers is.
        assert there.lr * sizes[name][part] == pytest.approx(1e-3 * sizes["AdamW"][part], rel=0.2)
    assert there.weight_decay * there.lr == pytest.approx(1e-4, rel=0.01)


def test_known_sizes() -> None:
    """Updates of SGD are the gradient, those of RMSprop about its sign, those of Adam smaller."""
    sizes = update_sizes(
        nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)), None, {"SGD": 0.1}
    )
    assert sizes["SGD"]["all"] == pytest.approx(1.0, rel=0.05)
    assert suggest("SGD", "torch.optim.RMSprop:alpha=0.999", 0.1).lr == pytest.approx(0.1, rel=0.9)
    assert suggest("AdamW", "torch.optim.Adam", 3e-4).lr == pytest.approx(3e-4, rel=0.01)
    assert suggest("AdamW", "LaProp", 1e-3).lr < 1e-2


def test_the_module_is_left_alone() -> None:
    net = module()
    before = {name: p.clone() for name, p in net.named_parameters()}
    suggest("AdamW", "NAMO", 1e-3, module=net, loss=loss)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["transfer", "--lr", "1e-3", "--weight_decay", "0.1", "--to", "NAMO", "MVNGrad"])
    shown = capsys.readouterr().out
    assert "--optimizer NAMO --optimizer.lr" in shown
    assert "--optimizer.fallback_lr 0.001 " in shown
    assert "--optimizer MVNGrad --optimizer.lr" in shown
    for args, message in (
        (["--lr", "0", "--to", "NAMO"], "lr=0.0 must be above 0"),
        (["--lr", "1e-3", "--to", "Namo"], "Did you mean NAMO"),
        (["--lr", "1e-3", "--to", "NAMO", "--steps", "1"], "--steps must be at least 3"),
    ):
        with pytest.raises(SystemExit):
            main(["transfer", *args])
        assert message in capsys.readouterr().err
