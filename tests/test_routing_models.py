"""Routing of today's architectures: tiny models of Hugging Face and PEFT, and modules as other libraries have them.

``python tests/test_routing_models.py`` writes the golden tables anew; read every line that changed before you keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim.engine.layout import matrices_in
from lightning_optim.routing import route, routing_table

TABLES = Path(__file__).parent / "routing_tables" / "models"

# --- Hugging Face -----------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
GROUPED = TEXT | {"num_key_value_heads": 2}
#: Prefix of the names of the classes, and settings.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Mixtral": GROUPED | {"intermediate_size": 24, "num_local_experts": 3},
    "Qwen3Moe": GROUPED
    | {"intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "GptOss": GROUPED | {"intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "Llama4": GROUPED | {"intermediate_size": 24, "intermediate_size_mlp": 32, "num_local_experts": 3, "head_dim": 8},
    "Olmoe": GROUPED | {"intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2},
    "JetMoe": {**TEXT, "intermediate_size": 24, "num_key_value_heads": 2, "kv_channels": 4, "num_local_experts": 3},
    "DeepseekV3": TEXT
    | {"intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8}
    | {"q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 6, "qk_nope_head_dim": 8},
    "Phi3": GROUPED | {"intermediate_size": 24},
    "GPTNeoX": TEXT | {"intermediate_size": 32},
    "Falcon": TEXT | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "Mamba": {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "Mamba2": {**TEXT, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2},
    "GPT2": {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "add_cross_attention": True},
}


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5")
    settings = dict(TRANSFORMERS[name])
    if name == "JetMoe":
        del settings["num_attention_heads"]
    if name == "Mamba2":
        del settings["num_attention_heads"]
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")(**settings)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    with torch.device("meta"):
        return getattr(transformers, f"{name}{suffix}")(config)


def adapted() -> nn.Module:
    """A Llama with low-rank adapters and a head that is trained, too."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, intermediate_size=24))
    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"]))


# --- others -----------------------------------------------------------------------------------------------------------


def named(name: str, base: type[nn.Module] = nn.Module, **attributes: Any) -> nn.Module:
    """A module of a class of the given name; attributes that are modules become its children."""
    module = type(name, (base,), {})()
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def litgpt() -> nn.Module:
    """A block as litgpt has it, whose sizes are in its configuration."""
    config = SimpleNamespace(n_embd=16, n_head=4, n_query_groups=2, head_size=8, intermediate_size=24)
    attention = named(
        "CausalSelfAttention", qkv=nn.Linear(16, 64, bias=False), proj=nn.Linear(32, 16, bias=False), config=config
    )
    mlp = named("LLaMAMLP", fc_1=nn.Linear(16, 24), fc_2=nn.Linear(16, 24), proj=nn.Linear(24, 16), config=config)
    block = named("Block", norm_1=nn.RMSNorm(16), attn=attention, norm_2=nn.RMSNorm(16), mlp=mlp)
    transformer = nn.ModuleDict({"wte": nn.Embedding(64, 16), "h": nn.ModuleList([block]), "ln_f": nn.RMSNorm(16)})
    return named("GPT", lm_head=nn.Linear(16, 64, bias=False), transformer=transformer)


def packed_ensemble() -> nn.Module:
    """LeNet as an ensemble of four packed into one, as torch-uncertainty has it."""

    def conv(n_in: int, n_out: int, groups: int) -> nn.Module:
        return named("PackedConv2d", conv=nn.Conv2d(n_in, n_out, 5, groups=groups))

    def linear(n_in: int, n_out: int) -> nn.Module:
        weight = parameter(4, n_out // 4, n_in // 4)
        return named("PackedLinear", in_features=n_in, out_features=n_out, weight=weight, bias=parameter(n_out))

    return named(
        "PackedLeNet",
        conv1=conv(4, 24, 4),
        conv2=conv(24, 64, 4),
        fc1=linear(1024, 480),
        fc2=linear(480, 336),
        fc3=linear(336, 40),
    )


def bayesian() -> nn.Module:
    def linear(n_in: int, n_out: int) -> nn.Module:
        parameters = {name: parameter(n_out, n_in) for name in ("weight_mu", "weight_sigma")}
        return named("BayesLinear", in_features=n_in, out_features=n_out, **parameters, bias_mu=parameter(n_out))

    return nn.Sequential(linear(4, 8), linear(8, 8), linear(8, 2))


def einsum_attention() -> nn.Module:
    """As TransformerLens has it."""
    shapes = {"W_Q": (2, 16, 8), "W_K": (2, 16, 8), "W_V": (2, 16, 8), "W_O": (2, 8, 16), "b_Q": (2, 8)}
    attention = named("Attention", **{name: parameter(*shape) for name, shape in shapes.items()})
    return nn.Sequential(attention, nn.Linear(16, 4))


def detector() -> nn.Module:
    """Heads as torchvision's RetinaNet has them: hidden convolutions, and one that makes the output."""

    def head(name: str, n_out: int) -> nn.Module:
        layers = {"conv": nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), name: nn.Conv2d(8, n_out, 3)}
        return named("RetinaNetHead", **layers)

    heads = named("Heads", classification_head=head("cls_logits", 18), regression_head=head("bbox_reg", 4))
    return named("RetinaNet", backbone=nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), head=heads)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: hugging_face(name) for name in TRANSFORMERS},  # type: ignore[misc]
    "PEFT": adapted,
    "litgpt": litgpt,
    "PackedLeNet": packed_ensemble,
    "Bayesian": bayesian,
    "einsum": einsum_attention,
    "detector": detector,
}


@pytest.mark.parametrize("name", MODELS)
def test_golden_table(name: str) -> None:
    assert routing_table(route(MODELS[name]()).values()) + "\n" == (TABLES / f"{name}.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_all_of_each_parameter(name: str) -> None:
    model = MODELS[name]()
    for r in route(model).values():
        if r.role == "matrix":
            found = matrices_in(torch.empty(r.shape, device="meta"), r.layout)
            assert sum(x.numel() for x in found) == math.prod(r.shape)
            assert "?" not in r.kind


# --- what a module says of its sizes ----------------------------------------------------------------------------------


def layout(name: str, rows: int, cls: str = "Attention", config: bool = False, **sizes: int) -> tuple[Any, ...]:
    said = {"config": SimpleNamespace(**sizes)} if config else sizes
    module = named(cls, **{name: nn.Linear(16, rows, bias=False)}, **said)
    (r, _) = route(nn.Sequential(module, nn.Linear(2, 2, bias=False))).values()
    return r.kind, r.blocks, r.split


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize(
    ("name", "rows", "sizes", "expected"),
    [
        ("qkv_proj", 40, {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4}, ("fused qkv", 1, (24, 8, 8))),
        ("Wqkv", 32, {"num_attention_heads": 4, "num_key_value_heads": 2}, ("fused qkv", 1, (16, 8, 8))),
        ("qkv", 48, {"num_heads": 4}, ("fused qkv", 3, ())),
        ("qkv", 96, {"num_heads": 4, "head_dim": 8}, ("fused qkv", 3, ())),
        ("to_kv", 24, {"num_heads": 3, "head_dim": 4}, ("fused kv", 2, ())),
        ("kv_proj", 32, {}, ("fused kv", 2, ())),
        ("kv_proj", 24, {}, ("fused kv?", 1, ())),
        ("qkv", 40, {}, ("fused qkv?", 1, ())),
        ("qkv_proj", 40, {"num_heads": 5, "num_kv_heads": 2, "head_dim": 4}, ("fused qkv?", 1, ())),
        ("query_key_value", 48, {"num_heads": 4}, ("fused qkv by head", 12, ())),
        ("query_key_value", 48, {}, ("fused qkv by head?", 1, ())),
        ("kv_b_proj", 40, {"qk_nope_head_dim": 6, "v_head_dim": 4}, ("fused kv by head", 4, (6, 4))),
        ("kv_b_proj", 40, {"qk_nope_head_dim": 6, "v_head_dim": 5}, ("fused kv by head?", 1, ())),
        ("kv_a_proj_with_mqa", 12, {"kv_lora_rank": 8, "qk_rope_head_dim": 4}, ("fused latent and key", 1, (8, 4))),
        ("gate_up_proj", 24, {"intermediate_size": 12}, ("fused gate and up", 2, ())),
        ("w13", 24, {"intermediate_size": 10}, ("fused gate and up?", 1, ())),
        ("in_proj", 64, {}, ("linear", 1, ())),
    ],
)
def test_parts_follow_from_sizes(
    name: str, rows: int, sizes: dict[str, int], expected: tuple[Any, ...], config: bool
) -> None:
    assert layout(name, rows, config=config, **sizes) == expected


def test_gate_and_up_where_another_layer_takes_half() -> None:
    for name in ("w13", "Wi", "gate_up_proj"):
        mlp = named("MLP", **{name: nn.Linear(16, 24, bias=False), "out_layer": nn.Linear(12, 16, bias=False)})
        assert next(iter(route(nn.Sequential(mlp, nn.Linear(16, 2))).values())).blocks == 2
    plain = named("MLP", fc1=nn.Linear(16, 24, bias=False), fc2=nn.Linear(12, 16, bias=False))
    assert next(iter(route(nn.Sequential(plain, nn.Linear(16, 2))).values())).blocks == 1  # nothing says it is gated


class GroupedAttention(nn.Module):
    """Fused as Llama's, by a view of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 4
        self.qkv_proj = nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv_proj(x).split((16, 8, 8), dim=-1)


def test_parts_are_the_matrices_that_the_module_applies() -> None:
    attention = GroupedAttention()
    r = route(nn.Sequential(attention, nn.Linear(2, 2)))["0.qkv_proj.weight"]
    x = torch.randn(3, 16)
    parts = [part[0] for part in matrices_in(attention.qkv_proj.weight, r.layout)]
    for expected, weight in zip(attention(x), parts):
        torch.testing.assert_close(F.linear(x, weight), expected)


# --- overrides --------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    attention = named("Attention", qkv_proj=nn.Linear(16, 40), q_proj=nn.Linear(16, 16), o=nn.Linear(16, 16))
    attention.num_heads = 4
    experts = named("Experts", up=parameter(3, 12, 8), down=parameter(3, 8, 12), b_in=parameter(3, 12))
    return nn.ModuleDict({"attention": attention, "experts": experts, "head": nn.Linear(16, 2)})


@pytest.mark.parametrize("pattern", ["*.qkv_proj", "*.qkv_proj.weight", "attention.qkv*"])
def test_rows_of_parts_can_be_given(pattern: str) -> None:
    r = route(net(), split={pattern: [24, 8, 8]})["attention.qkv_proj.weight"]
    assert (r.role, r.blocks, r.split) == ("matrix", 1, (24, 8, 8))


def test_rows_of_one_head_are_repeated() -> None:
    routes = route(net(), split={"*.qkv_proj": [4], "*.q_proj": [5, 3], "*.up": [3, 9], "*.down": [4]})
    assert routes["attention.qkv_proj.weight"].layout == {"blocks": 10, "transposed": False}
    assert routes["attention.q_proj.weight"].layout == {"blocks": 2, "transposed": False, "split": (5, 3)}
    assert routes["experts.up"].layout == {"blocks": 3, "transposed": False, "split": (3, 9)}
    assert routes["experts.down"].layout == {"blocks": 6, "transposed": False}
    whole = route(net(), split={"*.qkv_proj": [40]})["attention.qkv_proj.weight"]
    assert (whole.blocks, whole.split) == (1, ())


def test_heads_are_matrices_of_the_size_that_the_module_says() -> None:
    assert route(net(), heads=["*.q_proj"])["attention.q_proj.weight"].blocks == 4
    with pytest.raises(ValueError, match=r"heads: ModuleDict, which holds 'head\.weight', does not say how large"):
        route(net(), heads=["head"])


def test_what_is_given_replaces_what_was_found() -> None:
    model = hugging_face("Phi3")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert route(model)[name].split == (16, 8, 8)
    assert route(model, heads=["*.qkv_proj"])[name].layout == {"blocks": 8, "transposed": False}
    packed = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 2)})
    assert route(packed, split={"a.in_proj_weight": [4]})["a.in_proj_weight"].blocks == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"split": {"*.qkv_proj": [24, 8]}},
            r"'attention\.qkv_proj\.weight' has 40 rows, which 24 \+ 8 does not divide",
        ),
        ({"split": {"*.up": [5]}}, r"'experts\.up' has 12 rows in each of 3 matrices"),
        ({"split": {"*.wqkv": [8]}}, r"split: no parameter matches '\*\.wqkv'; the nearest are attention\.qkv_proj"),
        ({"split": {"*.q_proj": [8]}, "heads": ["*.q_*"]}, r"both match attention\.q_proj\.weight"),
    ],
)
def test_overrides_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(net(), **arguments)


def test_a_network_that_is_not_trained_does_not_take_the_heads_place() -> None:
    trained, other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    both = named("Agent", policy=trained, reward=other)
    assert route(both)["reward.1.weight"].kind == "head"
    assert route(both, trained=set(trained.parameters()))["policy.1.weight"].kind == "head"


if __name__ == "__main__":
    TABLES.mkdir(exist_ok=True)
    for model_name, build in MODELS.items():
        (TABLES / f"{model_name}.md").write_text(routing_table(route(build()).values()) + "\n")
