"""The GPT and the LSTM as plain modules."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_optim.models import GPT, LSTM, PRESETS, GPTConfig, LSTMConfig

VOCAB, LENGTH = 50, 12

SMALL = {
    "gpt": lambda tied=True, **kw: GPT(VOCAB, LENGTH, GPTConfig(layers=2, heads=2, width=16, **kw), tied),
    "lstm": lambda tied=True, **kw: LSTM(VOCAB, LSTMConfig(layers=2, width=16, hidden=24, **kw), tied),
}
both = pytest.mark.parametrize("name", SMALL)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape)


@pytest.mark.parametrize(("size", "parameters"), [("gpt2-124m", 124_439_808), ("gpt2-355m", 354_823_168)])
def test_gpt2_has_the_published_number_of_parameters(size: str, parameters: int) -> None:
    with torch.device("meta"):
        gpt = GPT(50257, 1024, PRESETS["gpt"][size])
    assert sum(p.numel() for p in gpt.parameters()) == parameters


@both
def test_every_position_gets_a_score_for_every_token(name: str) -> None:
    logits = SMALL[name]()(random_tokens(3, 7))
    assert logits.shape == (3, 7, VOCAB)
    assert logits.isfinite().all()


@both
@settings(max_examples=20, deadline=None)
@given(changed=st.integers(0, LENGTH - 1))
def test_a_token_changes_its_own_and_later_scores_only(name: str, changed: int) -> None:
    torch.manual_seed(0)
    network, tokens = SMALL[name](), random_tokens(2, LENGTH)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCAB
    with torch.no_grad():
        differs = (network(tokens) != network(other)).any(dim=-1)
    assert not differs[:, :changed].any()
    assert differs[:, changed:].all()


@both
def test_last_only_gives_the_last_scores(name: str) -> None:
    network, tokens = SMALL[name](), random_tokens(3, 9)
    last = network(tokens, last_only=True)
    assert last.shape == (3, 1, VOCAB)
    # Matrix products of another shape may sum in another order: a few units in the last place.
    torch.testing.assert_close(last, network(tokens)[:, -1:], rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding(name: str, tied: bool) -> None:
    network = SMALL[name](tied)
    assert (network.head.weight is network.token_embedding.weight) == tied
    names = [n for n, _ in network.named_parameters()]
    assert ("head.weight" in names) != tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda tied: GPT(256, 32, PRESETS["gpt"]["tiny"], tied),
        lambda tied: LSTM(256, PRESETS["lstm"]["tiny"], tied),
        lambda tied: LSTM(256, PRESETS["lstm"]["ptb-1-layer"], tied),
    ],
    ids=["gpt", "lstm", "ptb"],
)
def test_an_untrained_network_guesses(build, tied: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(256, (4, 33))
    with torch.no_grad():
        loss = F.cross_entropy(build(tied).eval()(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    # Small random logits add half their variance, far below 10 %, to the loss of the uniform distribution.
    assert loss.item() == pytest.approx(math.log(256), rel=0.1)


def test_gpt_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    gpt = GPT(256, 64, GPTConfig(layers=8, heads=4, width=128))
    stds = {n: p.std().item() for n, p in gpt.named_parameters() if p.ndim == 2}
    ends_of_branches = [n for n in stds if n.endswith(("attention.projection.weight", "down.weight"))]
    assert len(ends_of_branches) == 2 * 8
    for name, std in stds.items():
        # The standard deviation of n >= 8192 samples is off by about 1 / sqrt(2 n) < 1 %; 5 % is beyond chance.
        expected = 0.02 / math.sqrt(2 * 8) if name in ends_of_branches else 0.02
        assert std == pytest.approx(expected, rel=0.05), name
    assert all((p == 0).all() for n, p in gpt.named_parameters() if n.endswith("bias"))


def test_gpt_without_bias_has_none() -> None:
    network = SMALL["gpt"](bias=False)
    assert not [n for n, _ in network.named_parameters() if "bias" in n]
    assert network(random_tokens(1, 4)).isfinite().all()


@both
def test_dropout_acts_in_training_only(name: str) -> None:
    network, tokens = SMALL[name](dropout=0.5), random_tokens(2, 8)
    assert not torch.equal(network(tokens), network(tokens))
    network.eval()
    assert torch.equal(network(tokens), network(tokens))


@both
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(name: str, tied: bool) -> None:
    network = SMALL[name](tied)
    network(random_tokens(2, LENGTH)).logsumexp(-1).sum().backward()
    # Distributed training stops at a parameter without one.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@both
def test_compiles_without_graph_breaks(name: str) -> None:
    network, tokens = SMALL[name](), random_tokens(2, 8)
    expected = network(tokens)
    network.compile(backend="aot_eager", fullgraph=name == "gpt")  # torch leaves nn.LSTM out of its graphs
    names = list(network.state_dict())
    # The same operations, some of them decomposed: a few units in the last place.
    torch.testing.assert_close(network(tokens), expected, rtol=1e-5, atol=1e-6)
    assert names == list(network.state_dict())


@both
def test_overfits_a_batch(name: str) -> None:
    torch.manual_seed(0)
    network, tokens = SMALL[name](), random_tokens(2, LENGTH + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-2)
    for _ in range(150):
        loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # from ln 50 = 3.9


def test_gpt_refuses_more_tokens_than_positions() -> None:
    with pytest.raises(ValueError, match=rf"{LENGTH + 1} tokens .* sequence_length={LENGTH}"):
        SMALL["gpt"]()(random_tokens(1, LENGTH + 1))


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (GPTConfig, {"layers": 0, "heads": 1, "width": 8}, "layers=0"),
        (GPTConfig, {"layers": 1, "heads": 3, "width": 8}, "heads=3 must divide width=8"),
        (GPTConfig, {"layers": 1, "heads": 0, "width": 8}, "heads=0"),
        (GPTConfig, {"layers": 1, "heads": 1, "width": 8, "dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        (LSTMConfig, {"layers": 1, "width": 0, "hidden": 8}, "width=0"),
        (LSTMConfig, {"layers": 1, "width": 8, "hidden": 0}, "hidden=0"),
    ],
)
def test_wrong_dimensions_are_named(config, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments)


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    width, heads = 16, 4
    attention = GPT(VOCAB, LENGTH, GPTConfig(layers=1, heads=heads, width=width)).blocks[0].attention
    reference = nn.MultiheadAttention(width, heads, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias.normal_())
        reference.out_proj.weight.copy_(attention.projection.weight)
        reference.out_proj.bias.copy_(attention.projection.bias.normal_())
    x = torch.randn(3, LENGTH, width)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    expected, _ = reference(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    # Two orders of the same float32 sums.
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)
