"""Routing: golden tables for whole models, then one behaviour after the other.

``python tests/test_routing.py`` writes the golden tables anew; read every line that changed before you keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lightning_optim.models.networks import GPT, LSTM, GPTConfig, LSTMConfig
from lightning_optim.routing import Route, clean_name, route, routing_table

# --- models -----------------------------------------------------------------------------------------------------------


def gpt() -> GPT:
    return GPT(64, 32, GPTConfig(layers=2, heads=2, width=16))


class EncoderClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 16))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.decide = nn.Linear(16, 5)


def double_conv(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
        nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
        nn.GroupNorm(2, n_out),
        nn.ReLU(),
    )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = double_conv(3, 8), double_conv(8, 16), double_conv(16, 32)
        self.up2, self.merge2 = nn.ConvTranspose2d(32, 16, 2, stride=2), double_conv(32, 16)
        self.up1, self.merge1 = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2), double_conv(16, 8)
        self.final = nn.Conv2d(8, 1, 1)


class BertAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(16, 16), "LayerNorm": nn.LayerNorm(16)})


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = BertAttention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(16, 64)})
        self.output = nn.ModuleDict({"dense": nn.Linear(64, 16), "LayerNorm": nn.LayerNorm(16)})


class BertForSequenceClassification(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        embeddings = {name: nn.Embedding(8, 16) for name in ("word_embeddings", "position_embeddings")}
        self.embeddings = nn.ModuleDict({**embeddings, "LayerNorm": nn.LayerNorm(16)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer() for _ in range(2))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(16, 16)})
        self.classifier = nn.Linear(16, 2)


class Wrapper(pl.LightningModule):
    """A LightningModule around other modules, registered in the order given."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "convnext_atto": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 2)),
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", depth=2),
    "swin_tiny": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1)),
    "mixer_s32": lambda: timm.models.MlpMixer(patch_size=32, num_blocks=2),
    "mobilenetv3_small": lambda: timm.create_model("mobilenetv3_small_050"),
    "gpt_tied": gpt,
    "transformer_encoder": EncoderClassifier,
    "multihead_attention": lambda: nn.MultiheadAttention(16, 2, add_bias_kv=True),
    "multihead_attention_unpacked": lambda: nn.MultiheadAttention(16, 2, kdim=12, vdim=8),
    "lstm": lambda: LSTM(64, LSTMConfig(layers=2, width=16, hidden=32), tied_head=False),
    "unet": UNet,
    "mlp": mlp,
    "bert": BertForSequenceClassification,
}
TABLES = Path(__file__).parent / "routing_tables"


def table(name: str) -> str:
    with torch.device("meta"):
        module = MODELS[name]()
    return routing_table(route(module).values()) + "\n"


def heads(module: nn.Module) -> list[str]:
    return [r.name for r in route(module).values() if r.kind == "head"]


def kinds(module: nn.Module) -> dict[str, str]:
    return {r.name: r.kind for r in route(module).values()}


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_golden_table(name: str) -> None:
    assert table(name) == (TABLES / f"{name}.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_is_owned_once_and_fits_its_role(name: str) -> None:
    with torch.device("meta"):
        module = MODELS[name]()
    routes = route(module)
    parameters = dict(module.named_parameters())
    assert list(routes) == list(parameters)
    for r in routes.values():
        assert r.shape == parameters[r.name].shape
        assert r.transposed == (r.role == "matrix" and "transposed" in r.kind)
        if r.role == "matrix":
            assert len(r.shape) >= 2
            assert r.shape[0] % r.blocks == 0
        else:
            assert r.blocks == 1


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(4, 4),
    lambda: nn.Conv2d(4, 4, 3, bias=False),
    lambda: nn.Conv1d(4, 8, 3, groups=2),
    lambda: nn.Conv2d(4, 4, 3, groups=4),
    lambda: nn.ConvTranspose3d(4, 4, 2),
    lambda: nn.Embedding(5, 4),
    lambda: nn.LayerNorm(4),
    lambda: nn.BatchNorm2d(4),
    lambda: nn.PReLU(),
    nn.ReLU,
]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_random_sequential_nets(data: st.DataObject) -> None:
    picks = data.draw(st.lists(st.sampled_from(LAYERS), max_size=8))
    net = nn.Sequential(*(build() for build in picks))
    layers = [m for m in net if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose3d))]
    hidden = {id(m.weight) for m in layers[:-1] if getattr(m, "groups", 1) < 4}
    for p in net.parameters():
        p.requires_grad_(data.draw(st.booleans()))

    routes = route(net)
    assert list(routes) == [name for name, p in net.named_parameters() if p.requires_grad]
    for name, r in routes.items():
        assert (r.role == "matrix") == (id(net.get_parameter(name)) in hidden)


# --- what a parameter is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "weight", "kind", "blocks", "transposed"),
    [
        (nn.Conv2d(8, 12, 3, groups=2), "weight", "grouped convolution", 2, False),
        (nn.ConvTranspose1d(8, 12, 3, groups=4), "weight", "grouped transposed convolution", 4, True),
        (nn.ConvTranspose3d(8, 12, 3), "weight", "transposed convolution", 1, True),
        (nn.Bilinear(3, 4, 5), "weight", "bilinear", 1, False),
        (nn.LSTM(4, 6, bidirectional=True), "weight_hh_l0_reverse", "recurrent", 4, False),
        (nn.LSTM(4, 6, proj_size=5), "weight_hr_l0", "recurrent", 1, False),
        (nn.GRU(4, 6), "weight_ih_l0", "recurrent", 3, False),
        (nn.RNN(4, 6), "weight_hh_l0", "recurrent", 1, False),
        (nn.LSTMCell(4, 6), "weight_ih", "recurrent", 4, False),
        (nn.GRUCell(4, 6), "weight_hh", "recurrent", 3, False),
        (nn.RNNCell(4, 6), "weight_hh", "recurrent", 1, False),
    ],
)
def test_matrices(module: nn.Module, weight: str, kind: str, blocks: int, transposed: bool) -> None:
    r = route(nn.Sequential(module, nn.Linear(2, 2)))[f"0.{weight}"]
    assert (r.role, r.kind, r.blocks, r.transposed) == ("matrix", kind, blocks, transposed)


@pytest.mark.parametrize("conv", [nn.Conv2d(6, 9, 3, groups=3), nn.ConvTranspose2d(6, 9, 3, groups=3)])
def test_blocks_are_the_matrices_that_the_module_applies(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    r = route(nn.Sequential(conv, nn.Linear(2, 2)))["0.weight"]
    blocks = conv.weight.view(r.blocks, conv.weight.shape[0] // r.blocks, *conv.weight.shape[1:])
    apply = F.conv_transpose2d if r.transposed else F.conv2d
    x = torch.randn(2, 6, 5, 5)
    parts = zip(x.chunk(r.blocks, dim=1), blocks, conv.bias.chunk(r.blocks))
    separately = torch.cat([apply(part, block, bias) for part, block, bias in parts], dim=1)
    torch.testing.assert_close(separately, conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv1d(4, 8, 3, groups=4),
        nn.Conv2d(8, 4, 3, groups=4),  # one filter per group: a vector too
        nn.ConvTranspose2d(4, 8, 3, groups=4),
    ],
)
def test_depthwise_convolutions_are_not_matrices(conv: nn.Module) -> None:
    r = route(nn.Sequential(conv, nn.Linear(2, 2)))["0.weight"]
    assert (r.role, r.kind, r.blocks) == ("fallback", "depth-wise", 1)


def test_convolution_of_one_channel_is_not_depthwise() -> None:
    assert route(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(2, 2)))["0.weight"].role == "matrix"


@pytest.mark.parametrize(
    ("name", "rows", "blocks"),
    [
        ("qkv", 12, 3),
        ("Wqkv", 12, 3),
        ("c_attn", 12, 3),
        ("kv", 8, 2),
        ("kv", 12, 1),  # three times: not keys and values alone
        ("qkv", 8, 1),  # fewer key and value heads than query heads
        ("query_key_value", 12, 1),  # interleaved by head
        ("fc1", 12, 1),
    ],
)
@pytest.mark.parametrize("convolution", [False, True])
def test_fused_projections(name: str, rows: int, blocks: int, convolution: bool) -> None:
    attention = nn.Module()
    attention.register_module(name, nn.Conv2d(4, rows, 1) if convolution else nn.Linear(4, rows))
    net = nn.Sequential(attention, nn.Linear(4, 2))
    assert route(net)[f"0.{name}.weight"].blocks == blocks
    attention.head_first = True  # as in timm's MaxViT
    assert route(net)[f"0.{name}.weight"].blocks == 1


class RelativePositionBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(()))


class ManyParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "pos_embed": (1, 5, 4),
            "rel_pos_h": (5, 4),
            "cls_token": (1, 1, 4),
            "mask_tokens": (2, 4),
            "q_bias": (4,),
            "attention_biases": (2, 4),
            "gamma_1": (4,),
            "layer_scale": (4, 1, 1),
            "logit_scale": (),
            "A_log": (4, 2),
            "stack": (3, 4, 2),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.pos_embeds = nn.ParameterList([torch.zeros(5, 4)])
        self.bias_table = RelativePositionBias()
        self.norm = ScaleNorm()
        self.bag = nn.EmbeddingBag(5, 4)


def test_other_parameters_go_to_the_fallback_rule_with_an_honest_kind() -> None:
    module = ManyParameters()
    assert all(r.role == "fallback" for r in route(module).values())
    assert kinds(module) == {
        "pos_embed": "positional",
        "rel_pos_h": "positional",
        "cls_token": "token",
        "mask_tokens": "token",
        "q_bias": "bias",
        "attention_biases": "bias",
        "gamma_1": "vector",
        "layer_scale": "vector",
        "logit_scale": "vector",
        "A_log": "other",
        "stack": "other",
        "pos_embeds.0": "positional",
        "bias_table.weight": "positional",
        "norm.g": "norm",
        "bag.weight": "embedding",
    }


def experts(up: tuple[int, ...], down: tuple[int, ...], names: tuple[str, str], cls: str = "Experts") -> nn.Module:
    module = type(cls, (nn.Module,), {})()
    for name, shape in zip(names, (up, down)):
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


@pytest.mark.parametrize(
    ("module", "kind", "transposed"),
    [
        # Hugging Face: gate and up in one, (experts, out, in), and GPT-OSS and Llama 4, (experts, in, out)
        (experts((4, 32, 8), (4, 8, 16), ("gate_up_proj", "down_proj")), "experts", False),
        (experts((4, 8, 32), (4, 16, 8), ("gate_up_proj", "down_proj")), "transposed experts", True),
        (experts((4, 16, 8), (4, 8, 16), ("w1", "w2"), "GroupedExperts"), "experts", False),  # torchtitan
        (experts((4, 16, 8), (4, 8, 16), ("up", "down"), "SparseMoE"), "experts", False),
    ],
)
def test_experts_are_matrices_in_the_orientation_that_their_shapes_show(
    module: nn.Module, kind: str, transposed: bool
) -> None:
    routes = route(nn.Sequential(module, nn.Linear(2, 2)))
    for name, p in module.named_parameters():
        r = routes[f"0.{name}"]
        matrices = r.blocks * max(1, len(r.split))
        expected = p.shape[0] * (2 if name == "gate_up_proj" else 1)
        assert (r.role, r.kind, matrices, r.transposed) == ("matrix", kind, expected, transposed)


def test_experts_by_the_name_of_a_parameter_and_by_a_flag() -> None:
    layer = nn.Module()
    layer.expert_weights = nn.Parameter(torch.zeros(3, 4, 5))
    layer.expert_bias = nn.Parameter(torch.zeros(3, 1, 5))
    layer.is_transposed = True
    routes = route(nn.Sequential(layer, nn.Linear(2, 2)))
    assert routes["0.expert_weights"].kind == "transposed experts"
    assert (routes["0.expert_bias"].role, routes["0.expert_bias"].kind) == ("fallback", "bias")


class OtherLinear(nn.Module):
    """A Linear that is none of torch's."""

    def __init__(self, names: tuple[str, str], n_in: int, n_out: int, transposed: bool = False) -> None:
        super().__init__()
        setattr(self, names[0], n_in)
        setattr(self, names[1], n_out)
        self.weight = nn.Parameter(torch.zeros(*((n_in, n_out) if transposed else (n_out, n_in))))


@pytest.mark.parametrize(
    "names", [("in_features", "out_features"), ("in_channels", "out_channels"), ("input_size", "output_size")]
)
def test_linears_of_other_libraries_are_matrices_and_heads(names: tuple[str, str]) -> None:
    net = nn.Sequential(
        OtherLinear(names, 4, 8), nn.ReLU(), OtherLinear(names, 8, 6, transposed=True), OtherLinear(names, 6, 2)
    )
    routes = route(net)
    assert [(r.kind, r.transposed) for r in routes.values()] == [
        ("linear", False),
        ("transposed linear", True),
        ("head", False),
    ]


@pytest.mark.parametrize("name", ["target_net", "targetNet", "teacher", "ema_model", "momentum_encoder", "slow"])
@pytest.mark.parametrize("width", [3, 4])
def test_a_copy_of_the_network_does_not_take_the_place_of_its_head(name: str, width: int) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, width))

    assert heads(Wrapper(online=net(), **{name: net()})) == ["online.2.weight"]


def test_an_averaged_model_does_not_take_the_place_of_the_head() -> None:
    assert heads(Wrapper(net=mlp(), average_model=torch.optim.swa_utils.AveragedModel(mlp()))) == ["net.4.weight"]


def test_twin_networks_have_a_head_each_and_blocks_have_none() -> None:
    assert heads(Wrapper(q1=mlp(), q2=mlp())) == ["q1.4.weight", "q2.4.weight"]
    same = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
    assert heads(Wrapper(first=same[0], second=same[1])) == ["second.2.weight"]
    # A language's decoder is no copy of its encoder.
    translation = Wrapper(source_encoder=nn.Linear(4, 8), target_decoder=nn.Linear(8, 5))
    assert heads(translation) == ["target_decoder.weight"]


def test_linear_of_gpt2_is_stored_transposed() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.zeros(nx, nf))

    r = route(nn.Sequential(Conv1D(12, 4), nn.Linear(4, 2)))["0.weight"]
    assert (r.role, r.kind, r.blocks, r.transposed) == ("matrix", "transposed linear", 1, True)


@pytest.mark.parametrize("parametrise", [weight_norm, spectral_norm, orthogonal])
def test_parametrised_weights_are_the_weights_that_they_stand_for(parametrise: Callable[..., nn.Module]) -> None:
    lstm = parametrise(nn.LSTM(4, 4), "weight_hh_l0")
    net = nn.Sequential(parametrise(nn.Linear(4, 4)), nn.ModuleDict({"qkv": parametrise(nn.Linear(4, 12))}), lstm)
    net.append(parametrise(nn.Linear(4, 2)))
    routes = {name: r for name, r in route(net).items() if "parametrizations" in name}
    lengths = {name: r for name, r in routes.items() if name.endswith("original0")}
    weights = [r for name, r in routes.items() if name not in lengths]
    assert [(r.role, r.kind, r.blocks) for r in weights] == [
        ("matrix", "linear", 1),
        ("matrix", "fused qkv", 3),
        ("matrix", "recurrent", 4),
        ("fallback", "head", 1),
    ]
    assert len(lengths) == (4 if parametrise is weight_norm else 0)
    assert {r.kind for r in lengths.values()} <= {"norm"}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_pruned_weights_and_weight_norm_without_parametrisation() -> None:
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    normed = nn.utils.weight_norm(nn.Linear(4, 4))
    recurrent = nn.utils.weight_norm(nn.LSTM(4, 4, bias=False), "weight_hh_l0")
    routes = route(nn.Sequential(pruned, normed, recurrent, nn.Linear(4, 2)))
    assert routes["0.weight_orig"].role == "matrix"
    assert (routes["1.weight_v"].role, routes["1.weight_g"].kind) == ("matrix", "norm")
    assert (routes["2.weight_hh_l0_v"].blocks, routes["2.weight_hh_l0_g"].kind) == (4, "norm")


def test_low_rank_adapters_are_linear() -> None:
    layer = Wrapper(base_layer=nn.Linear(8, 8), lora_A=nn.Linear(8, 2, bias=False), lora_B=nn.Linear(2, 8, bias=False))
    layer.base_layer.requires_grad_(False)
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2, bias=False))
    assert [(r.name, r.kind, r.role) for r in route(net).values()] == [
        ("0.lora_A.weight", "linear", "matrix"),
        ("0.lora_B.weight", "linear", "matrix"),
        ("2.weight", "head", "fallback"),
    ]


def test_lazy_parameters_have_no_shape_yet() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet: run one batch through Sequential"):
        route(net)
    net(torch.zeros(1, 3))
    assert route(net)["0.weight"].role == "matrix"


def test_weights_that_were_flattened_for_sharding_are_no_matrices() -> None:
    net = mlp()
    net[2].weight = nn.Parameter(net[2].weight.detach().flatten())
    assert route(net)["2.weight"].role == "fallback"


def test_frozen_parameters_are_left_out() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    assert list(route(net)) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert route(nn.ReLU()) == {}


# --- shared parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding_first", [True, False])
def test_embedding_wins_wherever_it_stands(embedding_first: bool) -> None:
    parts = {"embed": nn.Embedding(6, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)}
    parts["head"].weight = parts["embed"].weight
    names = ["embed", "hidden", "head"] if embedding_first else ["head", "hidden", "embed"]
    routes = route(nn.ModuleDict({name: parts[name] for name in names}))
    assert list(routes) == [f"{names[0]}.weight", "hidden.weight", "hidden.bias"]
    assert (routes[f"{names[0]}.weight"].kind, routes["hidden.weight"].role) == ("tied embedding", "matrix")


def test_two_embeddings_that_share_their_weight_are_an_embedding() -> None:
    net = nn.ModuleDict({"encoder": nn.Embedding(6, 4), "decoder": nn.Embedding(6, 4)})
    net["decoder"].weight = net["encoder"].weight
    assert kinds(net) == {"encoder.weight": "embedding"}


def test_matrix_only_if_all_uses_are_hidden_matrices() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert route(net)["0.weight"].role == "matrix"
    net[2].weight = net[0].weight
    assert route(net)["0.weight"].kind == "head"


def test_a_module_used_twice() -> None:
    block = nn.Linear(4, 4)
    net = nn.Sequential(block, nn.ReLU(), block, nn.Linear(4, 2))
    assert list(route(net)) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert route(net)["0.weight"].role == "matrix"


# --- the output head --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm_models_are_asked(name: str) -> None:
    with torch.device("meta"):
        net, bare = timm.create_model(name, num_classes=7), timm.create_model(name, num_classes=0)
        features = timm.create_model(name, features_only=True)
    (head,) = heads(net)
    assert net.get_parameter(head).shape[0] == 7
    assert heads(Wrapper(loss=nn.CrossEntropyLoss(), model=net)) == [f"model.{head}"]
    assert heads(bare) == heads(features) == []
    assert heads(Wrapper(model=bare, projector=mlp())) == ["projector.4.weight"]
    assert heads(Wrapper(classify=nn.Linear(4, 4), model=bare)) == []  # nothing after the backbone


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, ["head.weight", "head_dist.weight"]),
        ("crossvit_9_240", {}, ["head.0.weight", "head.1.weight"]),
        ("shvit_s1", {"num_classes": 0}, []),  # its get_classifier() fails
    ],
)
def test_unusual_timm_heads(name: str, options: dict[str, int], expected: list[str]) -> None:
    with torch.device("meta"):
        assert heads(timm.create_model(name, **options)) == expected


class PretrainedModel(nn.Module):
    """What Hugging Face's models say of themselves."""

    base_model_prefix = "bert"

    @property
    def base_model(self) -> nn.Module:
        return getattr(self, self.base_model_prefix, self)

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "vocabulary", None)


class Bert(PretrainedModel):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(mlp() for _ in range(2))
        self.pooler = nn.Linear(4, 4)


class BertForTask(PretrainedModel):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.bert = Bert()
        for name, module in modules.items():
            self.add_module(name, module)


def test_hugging_face_models_are_asked() -> None:
    assert heads(Bert()) == []
    assert heads(BertForTask(vocabulary=nn.Linear(4, 6), transform=nn.Linear(4, 4))) == ["vocabulary.weight"]
    assert heads(BertForTask(scores=nn.Linear(4, 2))) == ["scores.weight"]
    with_value_head = Wrapper(model=BertForTask(vocabulary=nn.Linear(4, 6)), value_head=nn.Linear(4, 1))
    assert heads(with_value_head) == ["model.vocabulary.weight", "value_head.weight"]

    tied = BertForTask(vocabulary=nn.Linear(4, 6))
    tied.vocabulary.weight = tied.bert.embed.weight
    assert kinds(tied)["bert.embed.weight"] == "tied embedding"
    assert heads(tied) == []


def test_head_by_name_wherever_it_is_registered() -> None:
    net = Wrapper(classifier=nn.Linear(4, 2), aux_head=mlp(), backbone=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert heads(net) == ["classifier.weight", "aux_head.4.weight"]
    assert heads(Wrapper(model=net)) == ["model.classifier.weight", "model.aux_head.4.weight"]


def test_several_heads_in_a_container() -> None:
    tasks = nn.ModuleDict({"age": nn.Linear(4, 1), "mood": mlp()})
    assert heads(Wrapper(backbone=mlp(), heads=tasks)) == ["heads.age.weight", "heads.mood.4.weight"]


def test_a_head_that_was_taken_off() -> None:
    with torch.device("meta"):
        shufflenet = torchvision.models.shufflenet_v2_x0_5()  # ends in a plain convolution
        assert heads(shufflenet) == ["fc.weight"]
        shufflenet.fc = nn.Identity()
        assert heads(shufflenet) == []
        assert heads(Wrapper(backbone=shufflenet, probe=nn.Linear(1024, 2))) == ["probe.weight"]


class TinyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.output = nn.Linear(4, 4), nn.Linear(4, 4)


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(4, 2, 8),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1),
        nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
        nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)),
        nn.Sequential(nn.Linear(4, 4), TinyAttention(), TinyAttention()),
        nn.ModuleList(nn.ModuleList([TinyAttention(), mlp()]) for _ in range(2)),
        nn.Sequential(double_conv(4, 4), double_conv(4, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_stacks_of_blocks_without_a_head(module: nn.Module) -> None:
    assert heads(module) == []
    assert heads(nn.ModuleDict({"body": module, "top": nn.Linear(4, 2)})) == ["top.weight"]


def test_names_of_attention_heads_are_no_output_heads() -> None:
    net = Wrapper(embed=nn.Embedding(6, 4), sa_heads=nn.ModuleList(TinyAttention() for _ in range(2)), top=mlp())
    assert heads(net) == ["top.4.weight"]


def test_frozen_networks_are_not_searched_for_the_head() -> None:
    net = Wrapper(student=mlp(), perceptual_loss=mlp().requires_grad_(False))
    assert heads(net) == ["student.4.weight"]
    with torch.device("meta"):
        net = Wrapper(teacher=timm.create_model("resnet18").requires_grad_(False), student=mlp())
    assert heads(net) == ["student.4.weight"]


def test_a_frozen_last_layer_is_the_head_still() -> None:
    net = mlp()
    net[4].requires_grad_(False)
    assert route(net)["2.weight"].role == "matrix"


def test_adaptive_softmax_is_a_head() -> None:
    net = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "softmax": nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], div_value=2)})
    routes = route(net)
    assert {r.kind for name, r in routes.items() if name.startswith("softmax")} == {"head"}
    assert routes["lstm.weight_ih_l0"].role == "matrix"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_change_the_role_and_keep_the_kind() -> None:
    routes = route(gpt(), matrix=["head.weight"], fallback=["blocks.*.up.*", "*.1.attention.qkv.weight"])
    tied, up = routes["token_embedding.weight"], routes["blocks.1.up.weight"]
    assert (tied.role, tied.kind) == ("matrix", "tied embedding")  # by its other name
    assert (up.role, up.kind) == ("fallback", "linear")
    assert [routes[f"blocks.{i}.attention.qkv.weight"].blocks for i in (0, 1)] == [3, 1]


def test_what_is_forced_to_the_matrix_rule_keeps_its_structure() -> None:
    net = nn.Sequential(ManyParameters(), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2, groups=2))
    routes = route(net, matrix=["0.stack", "0.A_log", "1.weight", "2.weight"])
    structure = {name: (r.blocks, r.transposed) for name, r in routes.items() if r.role == "matrix"}
    assert structure == {"0.stack": (3, False), "0.A_log": (1, False), "1.weight": (8, False), "2.weight": (2, True)}


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"matrix: no parameter matches 'blocks.0.attn.\*'.* blocks\.0\.attention"):
        route(gpt(), matrix=["head.*", "blocks.0.attn.*"])
    with pytest.raises(ValueError, match=r"fallback: no parameter matches 'bocks'"):
        route(gpt(), fallback=["bocks"])


def test_a_pattern_may_match_frozen_parameters_only() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    assert "0.weight" not in route(net, matrix=["0.*"], fallback=["2.*"])


def test_contradicting_patterns() -> None:
    with pytest.raises(ValueError, match=r"both match 2\.weight, 2\.bias"):
        route(mlp(), matrix=["2.weight", "2.bias"], fallback=["2.*"])


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"matches '2\.bias', which has shape \(8,\)"):
        route(mlp(), matrix=["2.*"])


def test_one_string_is_not_a_list() -> None:
    with pytest.raises(TypeError, match=r"fallback='head\.\*' must be a list of patterns"):
        route(mlp(), fallback="head.*")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.module.fc._orig_mod.weight", "fc.weight"),
        ("net._fsdp_wrapped_module._checkpoint_wrapped_module.0.bias", "net.0.bias"),
        ("_forward_module.fc.weight", "fc.weight"),
        ("_forward_module.module._orig_mod.fc.weight", "fc.weight"),
        ("_orig_mod._forward_module._fsdp_wrapped_module.net._checkpoint_wrapped_module.0.bias", "net.0.bias"),
        ("net.module.fc.weight", "net.module.fc.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("submodule.weight", "submodule.weight"),
    ],
)
def test_clean_name(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


def test_compiled_modules_are_routed_like_others() -> None:
    plain, inner = gpt(), gpt()
    inner.blocks[0].attention.qkv = torch.compile(inner.blocks[0].attention.qkv)
    inner.head = torch.compile(inner.head)
    compiled = torch.compile(inner)
    routes = route(compiled, fallback=["blocks.0.up.*", "_orig_mod.blocks.1.up.*"])
    expected = route(plain, fallback=["blocks.*.up.*"])
    assert list(routes) == [name for name, _ in compiled.named_parameters()]
    assert [replace(r, name=clean_name(r.name)) for r in routes.values()] == list(expected.values())
    assert routing_table(routes.values()) == routing_table(expected.values())


def test_patterns_match_names_as_the_module_gives_them() -> None:
    net = Wrapper(module=mlp())
    assert route(net, fallback=["module.2.weight"])["module.2.weight"].role == "fallback"
    assert route(net, fallback=["2.weight"])["module.2.weight"].role == "fallback"


def test_table_counts_and_columns() -> None:
    text = routing_table(
        [Route("a.weight", (2000, 3), "matrix", "linear", blocks=2), Route("scale", (), "fallback", "vector")]
    )
    assert text.splitlines() == [
        "Tensors (parameters): matrix rule 1 (6,000), fallback rule 1 (1).",
        "",
        "| parameter  | shape    | role     | kind   | blocks |",
        "|------------|----------|----------|--------|--------|",
        "| `a.weight` | 2000 x 3 | matrix   | linear | 2      |",
        "| `scale`    |          | fallback | vector |        |",
    ]


if __name__ == "__main__":
    for name in MODELS:
        (TABLES / f"{name}.md").write_text(table(name))
