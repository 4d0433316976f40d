"""Which rule owns which parameter, decided by the type and the role of the module that uses it.

A matrix rule (Muon, NAMO, SOAP, ...) is meant for hidden matrices only. :func:`route` finds them, and says of every
other trainable parameter what it is and that it goes to the fallback rule; :func:`routing_table` shows the result.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from .names import clean_name

__all__ = ["Route", "clean_name", "route", "routing_table"]


@dataclass(frozen=True)
class Route:
    """Where one parameter goes, and why.

    With ``blocks > 1`` the parameter is that many equal matrices, stacked along its first axis: block ``i`` is
    ``p.view(blocks, p.shape[0] // blocks, *p.shape[1:])[i]``, without its first axis if this has length one and at
    least two follow, as in experts (E, out, in). All axes of a block after its first are one axis of the matrix, as
    in a convolution (out, in, height, width); with ``transposed`` blocks are stored (in, out, ...).
    """

    name: str
    """The parameter's first name in ``module.named_parameters()``."""

    shape: tuple[int, ...]
    """Its shape."""

    role: Literal["matrix", "fallback"]
    """The rule that owns it."""

    kind: str
    """What it is, whichever rule owns it; :func:`route` lists the kinds."""

    blocks: int = 1
    """How many equal matrices are stacked along its first axis; 1 for the fallback rule."""

    transposed: bool = False
    """Whether it is stored (in, out, ...), as in transposed convolutions; false for the fallback rule."""


def route(
    module: nn.Module,
    matrix: Sequence[str] = (),
    fallback: Sequence[str] = (),
    parameters: Collection[Tensor] | None = None,
) -> dict[str, Route]:
    """Decide for each trainable parameter of a module whether the matrix rule or the fallback rule owns it.

    Each parameter appears once, under its first name. What it is depends on the module that uses it; shared by
    several modules, it goes to the matrix rule only if all of them use it as a hidden matrix.

    ========================================= ============================= ======== ==================
    parameter                                 kind                          role     blocks
    ========================================= ============================= ======== ==================
    weight of `nn.Linear`                     linear                        matrix   1
    the same, fused (see below)               fused qkv, fused kv           matrix   3, 2
    weights of `nn.MultiheadAttention`        fused qkv if packed, linear   matrix   3, 1
    weights of `nn.LSTM`, `nn.GRU`, `nn.RNN`  recurrent                     matrix   4, 3, 1
    projection of `nn.LSTM` (`weight_hr`)     recurrent                     matrix   1
    weight of a convolution                   [transposed] convolution      matrix   1
    the same, with groups                     grouped [...] convolution     matrix   one per group
    the same, one channel in or out per group depth-wise                    fallback
    weight of `nn.Bilinear`                   bilinear                      matrix   1
    three axes, named after experts           [transposed] experts          matrix   one per expert
    any of these in the output head           head                          fallback
    weight of `nn.Embedding`, `EmbeddingBag`  embedding                     fallback
    the same, used elsewhere too              tied embedding                fallback
    others, with a telling name               positional, token, bias       fallback
    others, in a class with Norm in its name  norm                          fallback
    others, at most one axis longer than one  vector                        fallback
    others                                    other                         fallback
    ========================================= ============================= ======== ==================

    Subclasses count as their base class. A class of another library counts as Linear if it has a `weight` of two axes
    and attributes `in_features` and `out_features`, or `in_channels` and `out_channels`, or `input_size` and
    `output_size`. Parameters (experts, out, in) are found by `expert` or `moe` in their name or in the name of their
    class; they are *transposed*, (experts, in, out), where their module has `is_transposed`, or where the shapes of its
    up and down projections only fit so. Gate and up of a `gate_up` are one matrix. A Linear or convolution is *fused*
    if it is called `qkv`, `to_qkv`, `qkv_proj`, `Wqkv`, `c_attn` or `in_proj` and its weight has three times as many
    rows as columns, or `kv`, `to_kv` or `kv_proj`, and two times. A parametrised or pruned weight is the weight that it
    stands for. The `Conv1D` of GPT-2 and Hugging Face is a Linear stored transposed, and never split.

    The output head consists of *layers*: Linear, convolution and Bilinear modules.

    1. Models that know their head are asked: timm's `get_classifier()`, Hugging Face's `get_output_embeddings()`.
       All of `nn.AdaptiveLogSoftmaxWithLoss` is a head.
    2. A search starts at the module and goes on to its last registered child, again and again. Children without any
       layer, attention or recurrent module do not count, nor do frozen ones except layers. At each module on the way,
       children called `head`, `classifier`, `*_head`, `*_classifier`, the plurals of these, `cls`, `fc`, `fc_out`,
       `logits`, `to_logits`, `out` or `output` are heads. If one of these is `nn.Identity`, and the others hold no
       layer, the head was taken off. Names of attention heads (`attn_heads`, `multi_head`, ...) do not count.
    3. If 1 and 2 find nothing, the layer at which the search ends is the head.

    The search passes over copies of a network: children whose names say so (`target`, `teacher`, `ema`, `momentum`,
    ...) beside one with parameters of the same shapes, and averaged models. Where the last child stands beside others
    of the same class and shapes, with another number of outputs than inputs, as in twin critics, it goes into each of
    them.

    In a head that is not a layer itself, the layer is where a search from there ends; an `nn.ModuleList` or
    `nn.ModuleDict` is several heads. A search ends without a layer at a timm model, a Hugging Face base model (one
    without a task), `nn.MultiheadAttention`, torch's transformer layers and recurrent modules, and at the last entry of
    an `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict` that has another block like it: of the same class, or, if
    they are such containers themselves, with the same classes of children. So `attention.output` in a stack of blocks
    is not a head, nor is the last Linear of a backbone without one. Where several networks that differ stand side by
    side, as in a GAN or an object detector, the search sees only the last; name the heads of the others in
    ``fallback``.

    Args:
        module: The module, after `configure_model` and after lazy modules have created their parameters.
        matrix: Shell-style patterns of full parameter names, with or without the prefixes that :func:`clean_name`
            removes: parameters that the matrix rule must own. One with three axes that no module of the table uses
            is taken for a stack (experts, out, in), one block per expert.
        fallback: The same for parameters that the fallback rule must own.
        parameters: A set of the parameters to decide on. Default: the trainable ones.

    Returns:
        One route per parameter, by name, in the order of ``module.named_parameters()``.

    Raises:
        ValueError: A pattern matches no parameter; a parameter matches patterns of both lists; a parameter with fewer
            than two axes matches one of ``matrix``; a lazy parameter has no shape yet.
        TypeError: ``matrix`` or ``fallback`` is one string instead of several.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9, bias=False))
        >>> for r in route(net).values():
        ...     print(r.name, r.role, r.kind)
        0.weight fallback embedding
        1.weight matrix linear
        1.bias fallback bias
        2.weight fallback norm
        2.bias fallback norm
        3.weight fallback head
        >>> route(net, matrix=["3.*"])["3.weight"].role
        'matrix'
    """
    uses = _uses(module)
    to_matrix = _matching("matrix", matrix, uses)
    to_fallback = _matching("fallback", fallback, uses)
    if twice := [places[0].name for p, places in uses.items() if p in to_matrix & to_fallback]:
        raise ValueError(f"matrix={matrix!r} and fallback={fallback!r} both match {', '.join(twice[:3])}")
    heads = _heads(module)

    routes = {}
    for p, places in uses.items():
        if p not in parameters if parameters is not None else not p.requires_grad:
            continue
        if is_lazy(p):
            raise ValueError(
                f"{places[0].name!r} has no shape yet: run one batch through {type(module).__name__}, "
                "which creates its lazy parameters, before building the optimizer"
            )
        r = _route(p, places, heads)
        if p in to_matrix:
            if p.ndim < 2:
                raise ValueError(
                    f"matrix={matrix!r} matches {r.name!r}, which has shape {r.shape} and so is no matrix; "
                    "end the pattern in '.weight', or name the parameters"
                )
            r = replace(r, role="matrix")
        elif p in to_fallback:
            r = replace(r, role="fallback")
        if r.role == "fallback":
            r = replace(r, blocks=1, transposed=False)
        routes[r.name] = r
    return routes


def routing_table(routes: Iterable[Route]) -> str:
    """Show routes as a Markdown table that is also readable in a terminal.

    Example:
        >>> print(routing_table(route(nn.MultiheadAttention(8, 2)).values()))
        Tensors (parameters): matrix rule 2 (256), fallback rule 2 (32).
        <BLANKLINE>
        | parameter         | shape  | role     | kind      | blocks |
        |-------------------|--------|----------|-----------|--------|
        | `in_proj_weight`  | 24 x 8 | matrix   | fused qkv | 3      |
        | `in_proj_bias`    | 24     | fallback | bias      |        |
        | `out_proj.weight` | 8 x 8  | matrix   | linear    | 1      |
        | `out_proj.bias`   | 8      | fallback | bias      |        |
    """
    routes = list(routes)
    rows = [("parameter", "shape", "role", "kind", "blocks")]
    for r in routes:
        blocks = str(r.blocks) if r.role == "matrix" else ""
        rows.append((f"`{clean_name(r.name)}`", " x ".join(map(str, r.shape)), r.role, r.kind, blocks))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")

    def count(role: str) -> str:
        shapes = [r.shape for r in routes if r.role == role]
        return f"{role} rule {len(shapes)} ({sum(math.prod(shape) for shape in shapes):,})"

    summary = f"Tensors (parameters): {count('matrix')}, {count('fallback')}."
    return "\n".join([summary, "", *lines])


# --- what a parameter is --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Use:
    """One place in the tree of modules at which a parameter is registered."""

    name: str
    """The parameter's full name there."""

    owner: nn.Module
    """The module that uses it."""

    owner_name: str
    """The last part of the owner's name."""

    parent: nn.Module
    """The owner's parent."""

    leaf: str
    """What the owner calls the parameter, or the one that is made of it by a parametrisation or by pruning."""


def _uses(module: nn.Module) -> dict[nn.Parameter, list[_Use]]:
    """All places of all parameters, frozen ones too, in the order of ``module.named_parameters()``."""
    modules = dict(module.named_modules(remove_duplicate=False))
    uses: dict[nn.Parameter, list[_Use]] = {}
    for path, registrar in modules.items():
        for leaf, p in registrar.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{leaf}" if path else leaf
            owner, owner_path = registrar, path
            if isinstance(registrar, ParametrizationList):
                # x.weight is made of x.parametrizations.weight.original, or, by weight norm, of a length (original0)
                # and a direction (original1).
                owner = registrar[0]
                if leaf == "original" or (leaf == "original1" and isinstance(owner, _WeightNorm)):
                    owner_path, _, leaf = path.rpartition("parametrizations.")
                    owner_path = owner_path.removesuffix(".")
                    owner = modules[owner_path]
            leaf = leaf.removesuffix("_orig").removesuffix("_v")  # pruning; weight norm without a parametrisation
            owner_name = clean_name(f"{owner_path}.").removesuffix(".").rpartition(".")[2]
            parent = modules[owner_path.rpartition(".")[0]]
            uses.setdefault(p, []).append(_Use(name, owner, owner_name, parent, leaf))
    return uses


def _route(p: nn.Parameter, uses: list[_Use], heads: set[nn.Module]) -> Route:
    """Where a parameter goes if nobody says otherwise.

    Those for the fallback rule have blocks and transposition too, for the case that somebody does.
    """
    routes = [_route_of_use(p, use, heads) for use in uses]
    # An embedding wins over other uses that are no hidden matrix, these over hidden matrices, then the first place.
    r = min(routes, key=lambda r: (r.kind != "embedding", r.role == "matrix"))
    if r.kind == "embedding" and any(other.kind != "embedding" for other in routes):
        r = replace(r, kind="tied embedding")
    return replace(r, name=uses[0].name)


def _route_of_use(p: nn.Parameter, use: _Use, heads: set[nn.Module]) -> Route:
    shape = tuple(p.shape)
    # FSDP1 cuts weights into pieces with one axis, which are no matrices.
    if p.ndim >= 2 and (matrix := _matrix(shape, use)):
        kind, blocks, transposed = matrix
        if use.owner in heads:
            return Route(use.name, shape, "fallback", "head", blocks, transposed)
        return Route(use.name, shape, "fallback" if kind == "depth-wise" else "matrix", kind, blocks, transposed)
    return Route(use.name, shape, "fallback", _other_kind(p, use), blocks=shape[0] if p.ndim == 3 else 1)


# Names of layers that stack several projections. Not among them is the `query_key_value` of GPT-NeoX and others,
# which interleaves the projections by attention head.
_FUSED = dict.fromkeys(("qkv", "to_qkv", "qkv_proj", "Wqkv", "c_attn", "in_proj"), 3)
_FUSED |= dict.fromkeys(("kv", "to_kv", "kv_proj"), 2)
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
_POSITIONAL = {"pos", "position", "positions", "positional", "posemb", "pe", "rel", "relative", "rpe"}


def _matrix(shape: tuple[int, ...], use: _Use) -> tuple[str, int, bool] | None:
    """Kind, blocks and transposition of a weight that acts as a matrix; None for all other parameters."""
    owner, leaf = use.owner, use.leaf
    if isinstance(owner, nn.MultiheadAttention):
        if leaf == "in_proj_weight":
            return "fused qkv", 3, False
        return ("linear", 1, False) if leaf.endswith("_proj_weight") else None
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        if not leaf.startswith("weight_") or leaf.endswith("_g"):
            return None
        gates = next((n for cls, n in _GATES.items() if isinstance(owner, cls)), 1)
        return "recurrent", 1 if leaf.startswith("weight_hr") else gates, False
    if _are_experts(shape, use):
        transposed = _are_transposed(owner)
        return "transposed experts" if transposed else "experts", shape[0], transposed
    if leaf != "weight" or not _is_layer(owner):
        return None
    if _is_linear_like(owner) and shape == _widths(owner) != shape[::-1]:
        return "transposed linear", 1, True
    if isinstance(owner, nn.Bilinear):
        return "bilinear", 1, False
    if _is_transposed_linear(owner):
        return "transposed linear", 1, True
    if isinstance(owner, _ConvNd) and (owner.transposed or owner.groups > 1):
        if owner.groups > 1 and owner.groups in (owner.in_channels, owner.out_channels):
            return "depth-wise", owner.groups, owner.transposed
        words = ["grouped"] * (owner.groups > 1) + ["transposed"] * owner.transposed + ["convolution"]
        return " ".join(words), owner.groups, owner.transposed
    parts = _FUSED.get(use.owner_name)
    # timm's MaxViT interleaves q, k and v by attention head where it says `head_first`.
    if parts and shape[0] == parts * shape[1] and not getattr(use.parent, "head_first", False):
        return "fused qkv" if parts == 3 else "fused kv", parts, False
    return "convolution" if isinstance(owner, _ConvNd) else "linear", 1, False


def _other_kind(p: nn.Parameter, use: _Use) -> str:
    if isinstance(use.owner, (nn.Embedding, nn.EmbeddingBag)) and use.leaf == "weight":
        return "embedding"
    return _kind_by_name(use) or ("vector" if sum(length > 1 for length in p.shape) < 2 else "other")


def _kind_by_name(use: _Use) -> str | None:
    name = use.owner_name if use.leaf.isdigit() else use.leaf  # the entries of an nn.ParameterList are numbered
    words = set(re.findall("[a-z]+", name.lower()))
    if words & _POSITIONAL or _is_called(use.owner, "Position"):
        return "positional"
    if words & {"token", "tokens"}:
        return "token"
    if _is_called(use.owner, "Norm") or re.fullmatch(r"weight\w*_g", use.leaf):  # the latter by torch's weight_norm
        return "norm"
    if words & {"bias", "biases"}:
        return "bias"
    return None


def _are_experts(shape: tuple[int, ...], use: _Use) -> bool:
    """Whether a parameter is a stack of matrices, one per expert."""
    says_so = re.search(r"expert|(\b|_)moe(\b|_)", clean_name(use.name).lower()) or any(
        _is_called(use.owner, part) for part in ("Expert", "MoE", "MixtureOf")
    )
    return bool(says_so) and len(shape) == 3 and min(shape[1:]) > 1 and _kind_by_name(use) is None


def _are_transposed(experts: nn.Module) -> bool:
    """Whether experts are stored (in, out)."""
    if isinstance(flag := getattr(experts, "is_transposed", None), bool):  # Hugging Face
        return flag
    shapes = {name: p.shape[1:] for name, p in experts.named_parameters(recurse=False) if p.ndim == 3}
    up = next((shape for name, shape in shapes.items() if "up" in name), None)
    down = next((shape for name, shape in shapes.items() if "down" in name), None)
    if up is None or down is None:
        return False

    def fits(out: int, width: int, out_of_down: int, hidden: int) -> bool:
        return width == out_of_down and out in (hidden, 2 * hidden)  # twice: gate and up in one

    return fits(*up[::-1], *down[::-1]) and not fits(*up, *down)


def _is_layer(module: nn.Module) -> bool:
    layers = (nn.Linear, _ConvNd, nn.Bilinear)
    return isinstance(module, layers) or _is_transposed_linear(module) or _is_linear_like(module)


def _is_linear_like(module: nn.Module) -> bool:
    """Whether this looks like another library's Linear."""
    weight = module._parameters.get("weight")
    known = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag)
    return weight is not None and weight.ndim == 2 and not isinstance(module, known) and _widths(module) is not None


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """How many numbers a layer takes and makes, as its attributes say."""
    for names in (("in_features", "out_features"), ("in_channels", "out_channels"), ("input_size", "output_size")):
        widths = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the Linear of OpenAI's GPT-2 and of Hugging Face, with `nf` outputs."""
    return _is_called(module, "Conv1D") and hasattr(module, "nf")


def _is_called(module: nn.Module, part: str) -> bool:
    return any(part in cls.__name__ for cls in type(module).__mro__)


# --- the output head ------------------------------------------------------------------------------------------

_HEAD = re.compile(r"(.+_)?(head|classifier)s?|cls|fc|fc_out|logits|to_logits|out|output")
_ATTENTION_HEAD = re.compile(r"(.*_)?(attn|attention|sa|multi)_heads?")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NO_HEAD_INSIDE = (
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.MultiheadAttention,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoderLayer,
)


def _heads(module: nn.Module) -> set[nn.Module]:
    """The layers that make the output, as the docstring of :func:`route` defines them."""
    heads: set[nn.Module] = set()
    m: Any
    for m in module.modules():
        if isinstance(m, nn.AdaptiveLogSoftmaxWithLoss):
            heads.update(filter(_is_layer, m.modules()))
        if hasattr(m, "get_classifier") and _is_trained(m):
            # A few timm models without a head look for its layer in the nn.Identity that took its place.
            with suppress(AttributeError):
                classifier = m.get_classifier()
                for head in classifier if isinstance(classifier, tuple) else (classifier,):
                    heads |= _layers_of_head(head)
        if hasattr(m, "get_output_embeddings") and _is_trained(m):
            head = m.get_output_embeddings()
            heads |= _layers_of_head(head) if head is not None else set()
    return heads | _search(module, only_named=bool(heads))


def _layers_of_head(head: nn.Module) -> set[nn.Module]:
    heads = head.children() if isinstance(head, (nn.ModuleList, nn.ModuleDict)) else [head]
    return set().union(*map(_search, heads))


def _search(module: nn.Module, only_named: bool = False) -> set[nn.Module]:
    """Go down to the layers that make the output; with ``only_named``, to those whose names say that they do."""
    if _is_layer(module):
        return set() if only_named else {module}
    if _is_headless(module):
        return set()

    named = [child for name, child in module.named_children() if _is_head_name(name)]
    if layers := set().union(*map(_layers_of_head, named)):
        return layers
    if any(isinstance(child, nn.Identity) for child in named):
        return set()

    children = {name: c for name, c in module.named_children() if _has_matrices(c) and (_is_layer(c) or _is_trained(c))}
    names = [name for name, child in children.items() if not _is_copy(name, child, children)]
    if not names:
        return set()
    *others, last = (children[name] for name in names)
    if isinstance(module, _CONTAINERS):
        if not _is_layer(last) and _make(last) in map(_make, others):
            return set()
    elif not _is_layer(last) and not _STACK.fullmatch(names[-1]) and _is_a_network(last):
        twins = [other for other in others if type(other) is type(last) and _shapes(other) == _shapes(last)]
        return set().union(*(_search(network, only_named) for network in (*twins, last)))
    return _search(last, only_named)


_COPIES = {"target", "targets", "teacher", "ema", "momentum", "shadow", "averaged", "average", "slow", "old", "frozen"}
_STACK = re.compile(r"\w*(block|layer|stage|level|cell|conv|down|up)\w*\d+")


def _is_copy(name: str, module: nn.Module, siblings: dict[str, nn.Module]) -> bool:
    """Whether this is a copy of one of its siblings that is not trained by gradients."""
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+", name)}
    others = [sibling for sibling in siblings.values() if sibling is not module]
    if not others:
        return False
    if words & {"teacher", "ema"} or any(_is_called(module, part) for part in ("AveragedModel", "ModelEma", "EMA")):
        return True
    return bool(words & _COPIES) and any(_shapes(other) == _shapes(module) for other in others)


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters()]


def _is_a_network(module: nn.Module) -> bool:
    """Whether a module makes another number of outputs than it takes inputs, so that copies of it cannot be a stack."""
    layers = [m for m in module.modules() if _is_layer(m)]
    first, last = _widths(layers[0]) if layers else None, _widths(layers[-1]) if layers else None
    return first is not None and last is not None and first[0] != last[1]


def _is_headless(module: nn.Module) -> bool:
    """Whether the search ends here: the module has no head, or was asked for it."""
    is_timm = hasattr(module, "get_classifier") or hasattr(module, "feature_info")
    is_hugging_face_base = getattr(module, "base_model", None) is module
    return is_timm or is_hugging_face_base or isinstance(module, _NO_HEAD_INSIDE)


def _is_head_name(name: str) -> bool:
    return bool(_HEAD.fullmatch(name)) and not _ATTENTION_HEAD.fullmatch(name)


def _make(module: nn.Module) -> Any:
    """What the blocks of a stack have in common."""
    return [type(child) for child in module.children()] if isinstance(module, _CONTAINERS) else type(module)


def _has_matrices(module: nn.Module) -> bool:
    others = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    return any(_is_layer(m) or isinstance(m, others) for m in module.modules())


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


# --- overrides ------------------------------------------------------------------------------------------------


def _matching(argument: str, patterns: Sequence[str], uses: dict[nn.Parameter, list[_Use]]) -> set[nn.Parameter]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument}={patterns!r} must be a list of patterns, such as [{patterns!r}]")
    names = {
        p: {name for place in places for name in (place.name, clean_name(place.name))} for p, places in uses.items()
    }
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        matched = {p for p, spellings in names.items() if any(fnmatchcase(name, pattern) for name in spellings)}
        if not matched:
            known = [clean_name(places[0].name) for places in uses.values()]
            nearest = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise ValueError(f"{argument}: no parameter matches {pattern!r}; the nearest are {', '.join(nearest)}")
        found |= matched
    return found
