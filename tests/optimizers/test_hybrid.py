"""One optimizer object with a matrix rule and a fallback rule."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.engine.rule import OPTIONAL, RULES
from lightning_optim.engine.two_rules import fallbacks
from lightning_optim.registry import OPTIMIZERS

from .rows import MATRIX, ROWS, amplifies, build, gradients, run

each_matrix_optimizer = pytest.mark.parametrize("name", MATRIX)


def make(name: str, groups: Any, **arguments: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[name].cls(groups, **arguments)


@pytest.mark.parametrize("fallback", fallbacks())
@each_matrix_optimizer
def test_the_fallback_is_the_optimizer_of_that_name(name: str, fallback: str) -> None:
    """A fallback group moves exactly as under the fallback alone, with its own defaults."""
    ours, alone = [nn.Parameter(torch.ones(5))], [nn.Parameter(torch.ones(5))]
    matrix = nn.Parameter(torch.eye(3))
    hybrid = make(
        name,
        [{"params": [matrix], "role": "matrix"}, {"params": ours, "role": "fallback"}],
        fallback=fallback,
        fallback_lr=0.01,
        fallback_weight_decay=0.1,
    )
    own = getattr(OPTIMIZERS[fallback].cls, "as_fallback", {}) | {"lr": 0.01, "weight_decay": 0.1}
    single = OPTIMIZERS[fallback].cls(alone, **own)
    run(hybrid, [matrix, *ours], range(1, 1))
    for t in range(1, 20):
        g = gradients(alone, t)[0]
        ours[0].grad, alone[0].grad, matrix.grad = g, g.clone(), torch.ones(3, 3)
        hybrid.step()
        single.step()
    # torch.optim.AdamW multiplies in another order; our own are the same code.
    torch.testing.assert_close(ours[0], alone[0], rtol=0 if fallback != "AdamW" else 1e-6, atol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.03, 0.1])
@each_matrix_optimizer
def test_one_weight_decay_holds_for_both_rules(name: str, weight_decay: float) -> None:
    if "weight_decay" not in OPTIMIZERS[name].defaults:
        pytest.skip("it has no weight decay")

    def decays(**arguments: Any) -> list[float]:
        params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
        return [group["weight_decay"] for group in build(name, params, **arguments).param_groups]

    assert decays(weight_decay=weight_decay, fallback="AdamW") == [weight_decay, weight_decay]
    assert decays(weight_decay=weight_decay, fallback="DeVAVector") == [weight_decay, weight_decay]
    assert decays(weight_decay=weight_decay, fallback="MVNGrad", fallback_weight_decay=0.2) == [weight_decay, 0.2]
    # Anon's weight decay is a part of the gradient, which is another thing.
    assert decays(weight_decay=weight_decay, fallback="Anon") == [weight_decay, 0.0]
    assert len(set(decays())) == 1 or OPTIMIZERS[name].defaults["fallback"] == "Anon"


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("fallback", [x for x in sorted(fallbacks()) if not (x in ROWS and ROWS[x].proportional)])
@each_matrix_optimizer
def test_no_first_step_is_much_larger_than_the_learning_rate(name: str, fallback: str, size: float) -> None:
    """The bound is ten learning rates per entry, but for rules whose steps are proportional to the gradients."""
    if name == "SSO":
        pytest.skip("it brings the weights to a norm")
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(5))]
    decay = {"weight_decay": 0.0} if "weight_decay" in OPTIMIZERS[name].defaults else {}
    scale = {"initial_eigenvalue": size} if name == "KLShampoo" else {}  # Documented: it has to suit the gradients.
    optimizer = build(name, params, lr=1e-3, fallback=fallback, **decay, **scale)
    for _ in range(3):  # SOAP and DeVA move from the second step on.
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = size * torch.randn_like(p)
        optimizer.step()
        for p, old, group in zip(params, before, optimizer.param_groups):
            # 1 part in 1000 for the rounding of sums; DeVAVector reaches 10 in the limit of large gradients.
            assert (p - old).abs().max() <= 10.01 * group["lr"]


@each_matrix_optimizer
def test_groups_hold_their_own_rule_only(name: str) -> None:
    optimizer = build(name, [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))], fallback="LaProp")
    matrix, fallback = optimizer.param_groups
    assert (matrix["rule"], fallback["rule"]) == (name, "LaProp")
    assert set(fallback) - {"params", "role", "rule", "maximize"} == set(OPTIMIZERS["LaProp"].defaults) - {*OPTIONAL}
    assert fallback["lr"] == OPTIMIZERS["LaProp"].defaults["lr"]


@pytest.mark.parametrize("fallback", ["AdamW", "MVNGrad"])
@each_matrix_optimizer
def test_values_of_configuration_libraries_become_plain(name: str, fallback: str) -> None:
    """As NumPy, YAML 1.1 and JSON hand them over; checkpoints hold Python's own."""
    params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
    own = "weight_decay" if "weight_decay" in OPTIMIZERS[name].defaults else "fallback_weight_decay"
    arguments: dict[str, Any] = {"lr": "1e-3", own: np.float64(0.1), "fallback_betas": [0.8, 0.9]}
    optimizer = build(name, params, fallback=fallback, fallback_lr=np.float32(0.5), **arguments)
    matrix, other = optimizer.param_groups
    numbers = [g[key] for g in (matrix, other) for key in ("lr", "weight_decay") if key in g]
    assert {type(x) for x in numbers} == {float}
    assert (matrix["lr"], other["lr"], other["betas"]) == (1e-3, 0.5, (0.8, 0.9))
    assert type(other["betas"]) is tuple


@each_matrix_optimizer
def test_nameless_parameters_are_split_by_axes_with_one_warning(name: str) -> None:
    params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2, 3, 3))]
    with pytest.warns(UserWarning, match=r"2 of 3 tensors.*build_optimizer"):
        optimizer = make(name, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
    assert [g["role"] for g in optimizer.param_groups] == ["matrix", "fallback", "matrix"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(name, [{"params": params[:1], "role": "matrix"}])


@each_matrix_optimizer
def test_named_parameters_keep_their_names(name: str) -> None:
    model = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="without their modules"):
        optimizer = make(name, model.named_parameters())
    assert [g["param_names"] for g in optimizer.param_groups] == [["weight"], ["bias"]]


def test_wrong_roles_shapes_and_fallbacks_are_refused() -> None:
    with pytest.raises(ValueError, match="role must be"):
        lo.Muon([{"params": [nn.Parameter(torch.ones(2, 2))], "role": "hidden"}])
    with pytest.raises(ValueError, match="at least 2 axes"):
        lo.Muon([{"params": [nn.Parameter(torch.ones(2))], "role": "matrix"}])
    with pytest.raises(ValueError, match="blocks=3"):
        lo.Muon([{"params": [nn.Parameter(torch.ones(4, 2))], "role": "matrix", "blocks": 3}])
    with pytest.raises(ValueError, match="not one of AdaBelief"):
        lo.Muon([nn.Parameter(torch.ones(2, 2))], fallback="Muon")
    with pytest.raises(ValueError, match="fallback_eps=1e-08: DeVAVector has no eps"):
        lo.Muon([nn.Parameter(torch.ones(2, 2))], fallback="DeVAVector", fallback_eps=1e-8)


def follow(name: str, whole: Tensor, parts: list[Tensor], split: Any, join: Any, **group: Any) -> None:
    """Train ``whole`` in a group of the given layout and ``parts`` as plain matrices, on the same gradients."""
    # Which step refreshes a parameter's bases follows from its position, which parts have not in common.
    basis = {"precondition_frequency": 2, "stagger": False}
    arguments = basis if "precondition_frequency" in OPTIMIZERS[name].defaults else {}
    a = make(name, [{"params": [whole], "role": "matrix", **group}], **arguments)
    b = make(name, [{"params": parts, "role": "matrix"}], **arguments)
    for t in range(1, 6):
        (g,) = gradients([whole], t)
        whole.grad = g
        for part, g_part in zip(parts, split(g)):
            part.grad = g_part.clone()
        a.step()
        b.step()
    # Batched and single matrix products may sum in different orders; the orthogonal iteration and the
    # eigenvectors amplify that.
    torch.testing.assert_close(whole.detach(), join([p.detach() for p in parts]), rtol=1e-4, atol=1e-5)


@each_matrix_optimizer
def test_packed_projections_are_separate_matrices(name: str) -> None:
    whole = nn.Parameter(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)))
    parts = [nn.Parameter(x.clone()) for x in whole.detach().chunk(3)]
    follow(name, whole, parts, lambda g: g.chunk(3), torch.cat, blocks=3)


@each_matrix_optimizer
def test_stacked_experts_are_separate_matrices(name: str) -> None:
    whole = nn.Parameter(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)))
    parts = [nn.Parameter(x.clone()) for x in whole.detach()]
    follow(name, whole, parts, lambda g: list(g), torch.stack, blocks=3)


@each_matrix_optimizer
def test_transposed_weights_are_turned(name: str) -> None:
    whole = nn.Parameter(torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1)))
    parts = [nn.Parameter(whole.detach().transpose(0, 1).clone())]
    follow(name, whole, parts, lambda g: [g.transpose(0, 1)], lambda x: x[0].transpose(0, 1), transposed=True)


@each_matrix_optimizer
def test_grouped_transposed_convolutions(name: str) -> None:
    whole = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)))

    def split(x: Tensor) -> list[Tensor]:
        return [block.transpose(0, 1) for block in x.chunk(2)]

    parts = [nn.Parameter(x.clone()) for x in split(whole.detach())]
    follow(name, whole, parts, split, lambda xs: torch.cat([x.transpose(0, 1) for x in xs]), blocks=2, transposed=True)


@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (1, 1), (2, 1, 3), (4, 2, 1, 1)])
@each_matrix_optimizer
def test_axes_of_one_element_may_be_transposed(name: str, shape: tuple[int, ...]) -> None:
    """Views of such tensors have strides that say nothing, in which state and stack may differ."""
    found = []
    for backend in ("plain", "chunked"):
        p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        optimizer = make(name, [{"params": [p], "role": "matrix", "transposed": True}], backend=backend)
        run(optimizer, [p], range(1, 5))
        found.append([p.detach(), *optimizer.state[p].values()])
    for x, y in zip(*found):
        # A few roundings in another order, in float64; bases of axes of equal eigenvalues are the same, too.
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in MATRIX if RULES[name].flatten])
def test_convolutions_are_matrices_of_flattened_kernels(name: str) -> None:
    """But the shape factors, which released code takes from the kernel's own axes, are alike only for such a shape."""
    whole = nn.Parameter(torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(1)))
    parts = [nn.Parameter(whole.detach().flatten(1).clone())]
    a = make(name, [{"params": [whole], "role": "matrix"}])
    b = make(name, [{"params": parts, "role": "matrix"}])
    for t in range(1, 5):
        whole.grad = gradients([whole], t)[0]
        parts[0].grad = whole.grad.flatten(1).clone()
        a.step()
        b.step()
    torch.testing.assert_close(whole.detach().flatten(1), parts[0].detach(), rtol=1e-5, atol=1e-6)


@each_matrix_optimizer
def test_observers_see_what_the_rule_computed(name: str) -> None:
    weight, bias = nn.Parameter(torch.eye(4, 6)), nn.Parameter(torch.ones(4))
    arguments = {"form": "shampoo"} if name == "MARS" else {}  # The form that orthogonalises.
    optimizer = build(name, [weight, bias], **arguments)
    plain = build(name, copies := [nn.Parameter(torch.eye(4, 6)), nn.Parameter(torch.ones(4))], **arguments)
    seen: dict[str, Tensor] = {}

    def observer(p: Tensor, quantity: str, value: Tensor) -> None:
        assert p is weight
        seen[quantity] = value.clone()

    optimizer.observer = observer
    run(optimizer, [weight, bias], range(1, 4))
    run(plain, copies, range(1, 4))
    assert torch.equal(weight, copies[0])
    if "orthogonalizer" in OPTIMIZERS[name].defaults:
        singular_values = torch.linalg.svdvals(seen["orthogonal_factor"])
        # Five of Keller Jordan's steps map singular values into about [0.68, 1.13], not to 1.
        if amplifies(name, "factor"):  # Signs may be singular; rounding times 3.4 in each step stays far below this.
            singular_values = singular_values[singular_values > 1e-2]
        assert ((singular_values > 0.6) & (singular_values < 1.25)).all()
    if name.startswith("NAMO"):
        assert seen["adaptive_scale"].shape == {"NAMO": (1, 1, 1), "NAMOD": (1, 1, 6)}[name]
