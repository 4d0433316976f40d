"""Which rule owns which parameter, decided by the type and the role of the module that uses it.

A matrix rule (Muon, NAMO, SOAP, ...) is meant for hidden matrices only. :func:`route` finds them, and says of every
other trainable parameter what it is and that it goes to the fallback rule; :func:`routing_table` shows the result.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from .fused import fused, head_size, size
from .names import clean_name

__all__ = ["Route", "Share", "clean_name", "matrix_rows", "route", "routing_table", "shares", "shares_line"]


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

    split: tuple[int, ...] = ()
    """Rows of the several matrices that each block stacks along its output axis, such as those of queries, keys and
    values; empty where a block is one matrix."""

    interleaved: bool = False
    """Whether the rows of these alternate: row ``i`` belongs to matrix ``i % len(split)``."""

    @property
    def layout(self) -> dict[str, Any]:
        """Where its matrices are, as entries of a parameter group."""
        layout: dict[str, Any] = {"blocks": self.blocks, "transposed": self.transposed}
        if self.split:
            layout["split"] = self.split
        if self.interleaved:
            layout["interleaved"] = True
        return layout


def route(
    module: nn.Module,
    matrix: Sequence[str] = (),
    fallback: Sequence[str] = (),
    parameters: Collection[Tensor] | None = None,
    *,
    split: Mapping[str, Sequence[int]] | None = None,
    heads: Sequence[str] = (),
    transposed: Sequence[str] = (),
    trained: Collection[Tensor] | None = None,
) -> dict[str, Route]:
    """Decide for each trainable parameter of a module whether the matrix rule or the fallback rule owns it.

    Each parameter appears once, under its first name. What it is depends on the module that uses it; shared by
    several modules, it goes to the matrix rule only if all of them use it as a hidden matrix.

    ========================================= ============================= ======== ==================
    parameter                                 kind                          role     blocks
    ========================================= ============================= ======== ==================
    weight of a Linear                        [transposed] linear           matrix   1
    the same, fused (see below)               fused ...                     matrix   one per part
    the same, fused, parts unknown            fused ...?                    matrix   1
    weights of `nn.MultiheadAttention`        fused qkv if packed, linear   matrix   3, 1
    weights of `nn.LSTM`, `nn.GRU`, `nn.RNN`  recurrent                     matrix   4, 3, 1
    projection of `nn.LSTM` (`weight_hr`)     recurrent                     matrix   1
    weight of a convolution                   [transposed] convolution      matrix   1
    the same, with groups                     grouped [...] convolution     matrix   one per group
    the same, one channel in or out per group depth-wise                    fallback
    weight of a grouped Linear                grouped linear                matrix   one per group
    weight of `nn.Bilinear`                   bilinear                      matrix   1
    experts of a mixture, three axes          [transposed] experts          matrix   one per expert
    the same, gate and up in one              [transposed] experts          matrix   two per expert
    attention weights of three axes           [transposed] heads            matrix   one per head
    scores of experts                         router                        fallback
    any of these in the output head           head                          fallback
    weight of `nn.Embedding`, `EmbeddingBag`  embedding                     fallback
    the same, used elsewhere too              tied embedding                fallback
    others, with a telling name               positional, token, bias,      fallback
                                              deviation
    others, in a class with Norm in its name  norm                          fallback
    others, at most one axis longer than one  vector                        fallback
    others                                    other                         fallback
    ========================================= ============================= ======== ==================

    Subclasses count as their base class. A class of another library counts as a Linear or a convolution if it has a
    `weight` (or `weight_mu`, as Bayesian layers do, whose deviations are no matrices) and says its widths: attributes
    `in_features` and `out_features`, or `in_channels` and `out_channels`, or `input_size` and `output_size`. With three
    axes, and no `kernel_size`, it is a grouped Linear, (groups, out, in). A parametrised or pruned weight is the weight
    that it stands for. The `Conv1D` of GPT-2 and Hugging Face is a Linear stored transposed. The matrices A and B of
    low-rank adapters are Linears: both are orthogonalised.

    *Fused* projections are known by their names, and the rows of their parts by the sizes that the module which holds
    them, or its `config`, says (:mod:`lightning_optim.fused`): queries, keys and values (`qkv`, `qkv_proj`, `Wqkv`,
    `c_attn`, ...) with any number of key and value heads; keys and values (`kv`, `kv_proj`, ...); gate and up
    (`gate_up_proj`, `w13`, ...); the `kv_a_proj` and `kv_b_proj` of latent attention; the `in_proj` and `x_proj` of
    Mamba. Those that are interleaved by attention head (`query_key_value`, `kv_b_proj`, ...) are split head by head. If
    the sizes are not said or do not add up, the tensor is one matrix, and its kind ends in a question mark.

    Experts are found by `expert` or `moe` in their name or in the name of their class. They are *transposed*,
    (experts, in, out), where their module has `is_transposed`, or where the shapes of its up and down projections only
    fit so. A *router* is called so by its class, or is a `gate` or `router` with as many outputs as there are experts
    beside it: like a head, each of its rows scores one of them. Attention weights of three axes are called `W_Q`, `wk`,
    `o_proj`, ...; their longer axis is the width of the model.

    The output head consists of *layers*: Linear, convolution and Bilinear modules.

    1. Models that know their head are asked: timm's `get_classifier()`, Hugging Face's `get_output_embeddings()`.
       All of `nn.AdaptiveLogSoftmaxWithLoss` is a head.
    2. A search starts at the module and goes on to its last registered child, again and again. Children without any
       layer, attention or recurrent module do not count, nor do frozen ones except layers, nor those of which nothing
       is in ``trained``. At each module on the way, children called `head`, `classifier`, `predictor`, `logit`,
       `*_head`, `*_classifier`, ... the plurals of these, `cls`, `fc`, `fc_out`, `out`, `output`, or as detectors
       call theirs (`bbox_pred`, `class_embed`, `cls_score`, ...) are heads. If one of these is `nn.Identity`, and the
       others hold no layer, the head was taken off. Names of attention heads (`attn_heads`, `multi_head`, ...) do not
       count.
    3. If 1 and 2 find nothing, the layer at which the search ends is the head.

    The search passes over copies of a network: children whose names say so (`target`, `teacher`, `ema`, `momentum`,
    ...) beside one with parameters of the same shapes, and averaged models. Where the last child stands beside others
    of the same class and shapes, with another number of outputs than inputs, as in twin critics, it goes into each of
    them.

    In a head that is not a layer itself, the layer is where a search from there ends: hidden layers of a classifier are
    hidden matrices. An `nn.ModuleList` or `nn.ModuleDict` is several heads. A search ends without a layer at a timm
    model, a Hugging Face base model (one without a task) or one of the classes in its `_no_split_modules`,
    `nn.MultiheadAttention`, torch's transformer layers and recurrent modules, and at the last entry of an
    `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict` that has another block like it: of the same class, or, if they
    are such containers themselves, with the same classes of children. So `attention.output` in a stack of blocks is not
    a head, nor is the last Linear of a backbone without one. Where several networks that differ stand side by side, as
    in a GAN or an object detector, the search sees only the last; name the heads of the others in ``fallback``.

    Args:
        module: The module, after `configure_model` and after lazy modules have created their parameters.
        matrix: Shell-style patterns of full parameter names, with or without the prefixes that :func:`clean_name`
            removes: parameters that the matrix rule must own. One with three axes that no module of the table uses
            is taken for a stack (experts, out, in), one block per expert.
        fallback: The same for parameters that the fallback rule must own.
        parameters: A set of the parameters to decide on. Default: the trainable ones.
        split: For each pattern, the rows of the matrices that a parameter stacks along its output axis, such as those
            of queries, keys and values, once or several times over. A pattern matches a parameter's name, or that of
            its module; of what it matches, parameters with fewer than two axes are left alone. The first match wins.
        heads: Patterns, likewise, of projections whose attention heads are matrices of their own, of as many rows as
            their module says that a head has.
        transposed: Patterns, likewise, of weights that are stored (in, out).
        trained: A set of the parameters that are trained at all; networks without any are passed over in the search
            for the head. Default: the trainable ones.

    Returns:
        One route per parameter, by name, in the order of ``module.named_parameters()``.

    Raises:
        ValueError: A pattern matches no parameter; a parameter matches patterns of both lists; a parameter with fewer
            than two axes matches one of ``matrix``; rows do not add up; no module says how large a head is; a lazy
            parameter has no shape yet.
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
    sizes = _first_matching("split", split or {}, uses)
    for argument, patterns in (("heads", heads), ("transposed", transposed)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument}={patterns!r} must be a list of patterns, such as [{patterns!r}]")
    by_head = _first_matching("heads", dict.fromkeys(heads, ()), uses)
    turned = _first_matching("transposed", dict.fromkeys(transposed, ()), uses)
    if both := [places[0].name for p, places in uses.items() if p in sizes and p in by_head]:
        raise ValueError(f"split={split!r} and heads={heads!r} both match {', '.join(both[:3])}")
    output = _heads(module, trained)

    routes = {}
    for p, places in uses.items():
        if p not in parameters if parameters is not None else not p.requires_grad:
            continue
        if is_lazy(p):
            raise ValueError(
                f"{places[0].name!r} has no shape yet: run one batch through {type(module).__name__}, "
                "which creates its lazy parameters, before building the optimizer"
            )
        said = p in sizes or p in by_head
        r = _route(p, places, output, fused_too=not said and p not in turned)
        if p in turned:
            r = replace(r, transposed=True)
        if said:
            r = _with_rows(r, sizes[p] if p in sizes else _rows_of_a_head(r, places[0]))
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
            r = replace(r, blocks=1, transposed=False, split=(), interleaved=False)
        routes[r.name] = r
    return routes


def routing_table(routes: Iterable[Route], seen: Mapping[str, str] | None = None) -> str:
    """Show routes as a Markdown table that is also readable in a terminal.

    Args:
        routes: The routes.
        seen: How parameters were seen to be used, in words by name, for a column of its own.

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
    rows: list[tuple[str, ...]] = [("parameter", "shape", "role", "kind", "blocks")]
    for r in routes:
        blocks = _matrices_of(r) if r.role == "matrix" else ""
        rows.append((f"`{clean_name(r.name)}`", " x ".join(map(str, r.shape)), r.role, r.kind, blocks))
    if seen is not None:
        words = ["seen as", *(seen.get(r.name, "") for r in routes)]
        rows = [(*row, word) for row, word in zip(rows, words)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")

    def count(role: str) -> str:
        shapes = [r.shape for r in routes if r.role == role]
        return f"{role} rule {len(shapes)} ({sum(math.prod(shape) for shape in shapes):,})"

    summary = f"Tensors (parameters): {count('matrix')}, {count('fallback')}."
    return "\n".join([summary, "", *lines])


def _matrices_of(r: Route) -> str:
    """The matrices of a parameter: their number, or where they differ their rows."""
    if not r.split:
        return str(r.blocks)
    rows = " + ".join(map(str, r.split))
    return rows if r.blocks == 1 else f"{r.blocks} x ({rows})"


@dataclass(frozen=True)
class Share:
    """What parameters of one kind come to."""

    role: str
    """The rule that owns them: matrix or fallback."""

    kind: str
    """Their kind."""

    tensors: int
    """How many they are."""

    parameters: int
    """How many elements they have."""

    fraction: float
    """The fraction of all elements."""


def shares(routes: Iterable[Route]) -> list[Share]:
    """How many parameters of which kind go to which rule: those of the matrix rule first, then by size.

    Example:
        >>> for share in shares(route(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))).values()):
        ...     print(share.role, share.kind, share.tensors, f"{share.fraction:.0%}")
        matrix linear 1 71%
        fallback head 1 18%
        fallback bias 2 11%
    """
    counts: dict[tuple[str, str], list[int]] = {}
    for r in routes:
        counts.setdefault((r.role, r.kind), []).append(math.prod(r.shape))
    total = sum(map(sum, counts.values())) or 1
    found = [Share(role, kind, len(x), sum(x), sum(x) / total) for (role, kind), x in counts.items()]
    return sorted(found, key=lambda x: (x.role != "matrix", -x.parameters, x.kind))


def shares_line(routes: Iterable[Route], rules: Mapping[str, str]) -> str:
    """Which rule has which share of the parameters, in one line.

    Args:
        routes: The routes of all parameters.
        rules: The name of the rule of each role.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> print(shares_line(route(net).values(), {"matrix": "NAMO", "fallback": "AdamW"}))
        NAMO trains 60% of 106 parameters (linear 60%), AdamW 40% (head 15%, norm 15%, bias 9%).
    """
    found = shares(routes)
    parts = []
    for role, rule in sorted(rules.items(), key=lambda x: x[0] != "matrix"):
        own = [share for share in found if share.role == role]
        kinds = ", ".join(f"{share.kind} {_percent(share.fraction)}" for share in own[:6]) + ", ..." * (len(own) > 6)
        parts.append(f"{rule} {_percent(sum(share.fraction for share in own))} ({kinds or 'nothing'})")
    total = sum(share.parameters for share in found)
    first = parts[0].replace(" ", " trains ", 1).replace(" (", f" of {total:,} parameters (", 1)
    return ", ".join([first, *parts[1:]]) + "."


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.005 else "under 1%"


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


def _route(p: nn.Parameter, uses: list[_Use], heads: set[nn.Module], fused_too: bool = True) -> Route:
    """Where a parameter goes without overrides.

    Those for the fallback rule have blocks and transposition too, for the case that an override sends them to the
    other.

    Args:
        p: The parameter.
        uses: The places at which it is registered.
        heads: The layers that make the output.
        fused_too: Whether fused projections are split.
    """
    routes = [_route_of_use(p, use, heads, fused_too) for use in uses]
    # An embedding wins over other uses that are no hidden matrix, these over hidden matrices, then the first place.
    r = min(routes, key=lambda r: (r.kind != "embedding", r.role == "matrix"))
    if r.kind == "embedding" and any(other.kind != "embedding" for other in routes):
        r = replace(r, kind="tied embedding")
    return replace(r, name=uses[0].name)


def _route_of_use(p: nn.Parameter, use: _Use, heads: set[nn.Module], fused_too: bool) -> Route:
    shape = tuple(p.shape)
    # FSDP1 cuts weights into pieces with one axis, which are no matrices.
    if p.ndim >= 2 and (found := _matrix(shape, use)):
        if not fused_too:
            one = isinstance(use.owner, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase))
            found = found._replace(split=(), interleaved=False, blocks=1 if one else found.blocks)
        r = Route(use.name, shape, "matrix", found.kind, found.blocks, found.transposed, (), found.interleaved)
        if use.owner in heads:
            return replace(r, role="fallback", kind="head")
        if found.split:
            r = _with_rows(r, found.split)
        return replace(r, role="fallback") if found.kind in ("depth-wise", "router") else r
    return Route(use.name, shape, "fallback", _other_kind(p, use), blocks=shape[0] if p.ndim == 3 else 1)


_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
_POSITIONAL = {"pos", "position", "positions", "positional", "posemb", "pe", "rel", "relative", "rpe"}


class _Found(NamedTuple):
    """What a weight that acts as a matrix is."""

    kind: str
    blocks: int = 1
    transposed: bool = False
    split: tuple[int, ...] = ()
    interleaved: bool = False


def _matrix(shape: tuple[int, ...], use: _Use) -> _Found | None:
    """What a weight that acts as a matrix is; None for all other parameters."""
    owner, leaf = use.owner, use.leaf
    if isinstance(owner, nn.MultiheadAttention):
        if leaf == "in_proj_weight":
            return _Found("fused qkv", 3)
        return _Found("linear") if leaf.endswith("_proj_weight") else None
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        if not leaf.startswith("weight_") or leaf.endswith("_g"):
            return None
        gates = next((n for cls, n in _GATES.items() if isinstance(owner, cls)), 1)
        return _Found("recurrent", 1 if leaf.startswith("weight_hr") else gates)
    if len(shape) == 2 and _is_router(shape[0], use):
        return _Found("router")
    if _are_experts(shape, use):
        return _experts(shape, use)
    if len(shape) == 2 and (experts := _stacked_experts(shape, use)):
        return experts
    if len(shape) == 3 and (transposed := _are_attention_heads(shape, use)) is not None:
        return _Found("transposed heads" if transposed else "heads", shape[0], transposed)
    if leaf not in _WEIGHTS or not _is_layer(owner):
        return None
    if isinstance(owner, nn.Bilinear):
        return _Found("bilinear")
    found = _layer(shape, owner)
    if found.kind not in ("linear", "transposed linear", "convolution"):
        return found
    rows, columns = shape[:2][::-1] if found.transposed else shape[:2]
    if projection := fused(use.owner_name, rows, columns, use.parent):
        return found._replace(kind=projection.kind, split=projection.split)
    return found


#: What layers call their weights; the mean in Bayesian ones, whose deviations are no matrices.
_WEIGHTS = ("weight", "weight_mu", "mu_weight", "weight_mean", "kernel")


def _layer(shape: tuple[int, ...], owner: Any) -> _Found:
    """The weight of a Linear or a convolution, torch's or another library's."""
    kernel = getattr(owner, "kernel_size", None)
    widths, groups = _widths(owner), getattr(owner, "groups", 1)
    if isinstance(owner, _ConvNd) or (kernel is not None and len(shape) > 2):
        if (transposed := getattr(owner, "transposed", False)) or groups > 1:
            if groups > 1 and widths and groups in widths:
                return _Found("depth-wise", groups, transposed)
            words = ["grouped"] * (groups > 1) + ["transposed"] * transposed + ["convolution"]
            return _Found(" ".join(words), groups, transposed)
        return _Found("convolution")
    if _is_transposed_linear(owner) or (len(shape) == 2 and shape == widths != shape[::-1]):
        return _Found("transposed linear", 1, True)
    if len(shape) == 3 and shape[2] == 1 and isinstance(groups, int):  # a grouped Linear as a convolution
        return _Found("grouped linear" if groups > 1 else "linear", groups)
    if len(shape) == 3:
        transposed = widths is not None and (shape[0] * shape[1], shape[0] * shape[2]) == widths != widths[::-1]
        return _Found("transposed grouped linear" if transposed else "grouped linear", shape[0], transposed)
    return _Found("linear")


def _experts(shape: tuple[int, ...], use: _Use) -> _Found:
    """Matrices of the experts of a mixture, gate and up of each apart."""
    owner: Any = use.owner
    transposed = _are_transposed(owner)
    kind = "transposed experts" if transposed else "experts"
    rows, columns = shape[:0:-1] if transposed else shape[1:]
    key = use.leaf.lower().replace("_", "")
    if rows % 2 == 0 and (("gate" in key and "up" in key) or key in ("w13", "w31")):
        interleaved = getattr(owner, "is_concatenated", True) is False  # Hugging Face
        return _Found(kind, shape[0], transposed, (rows // 2, rows // 2), interleaved)
    name = use.owner_name if use.leaf in _WEIGHTS else use.leaf
    projection = fused(name, rows, columns, use.parent if use.leaf in _WEIGHTS else owner)
    return _Found(kind, shape[0], transposed, projection.split if projection else ())


def _stacked_experts(shape: tuple[int, ...], use: _Use) -> _Found | None:
    """Matrices of experts that are stacked along the first of two axes, as (width, outputs of the model) each."""
    number = size(use.owner, _NUMBERS_OF_EXPERTS) if _is_called(use.owner, "Expert") else 0
    width = size(use.owner, ("ffn_hidden_size", "intermediate_size", "hidden_features"))
    if not number or number * width != shape[0] or _kind_by_name(use):
        return None
    # What makes the experts' output is stored as it is multiplied, (in, out).
    down = use.leaf in ("w2", "w_2") or "down" in use.leaf
    return _Found("transposed experts" if down else "experts", number, down)


_NUMBERS_OF_EXPERTS = ("num_experts", "n_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")


def _is_router(rows: int, use: _Use) -> bool:
    """Whether a parameter scores experts: it decides on which of them work, and its rows are one for each."""
    if use.leaf.removesuffix("_proj") not in (*_WEIGHTS, "gate", "router", "wg") or _kind_by_name(use):
        return False
    if any(_is_called(use.owner, part) for part in ("Router", "TopKGat", "Gating")):
        return True
    numbers = {size(use.parent, (name,)) for name in _NUMBERS_OF_EXPERTS}
    experts = getattr(use.parent, "experts", None)
    if isinstance(experts, nn.ModuleList):
        numbers.add(len(experts))
    elif isinstance(experts, nn.Module):
        numbers |= {len(p) for p in experts.parameters() if p.ndim == 3}
    numbers -= {0}
    if any(_is_called(use.parent, part) for part in ("Router", "TopKGat")):
        return not numbers or rows in numbers
    named = {"router", "gate", "gating", "wg"} & {*re.findall("[a-z]+", use.owner_name.lower())}
    return bool(named and numbers) and rows in (1, *numbers)  # one row: the gate of a shared expert


def _are_attention_heads(shape: tuple[int, ...], use: _Use) -> bool | None:
    """Whether a weight of three axes holds a matrix for each attention head, and if so, whether it is (in, out)."""
    found = re.fullmatch(r"w_?([qkvo])(_proj|_proj_weight)?|([qkvo])_proj(_weight)?", use.leaf.lower())
    if not found or not (_is_called(use.owner, "Attention") or _is_called(use.owner, "Attn")):
        return None
    out = "o" in (found[1], found[3])
    # The model's width is the longer axis. It is the input of queries, keys and values, and the output of the rest.
    return shape[1] >= shape[2] if not out else shape[1] < shape[2]


def _rows_of_block(r: Route) -> int:
    """How many outputs each block of a parameter has."""
    stacked = r.blocks > 1 and len(r.shape) > 2 and r.shape[0] == r.blocks
    axis = int(stacked) + r.transposed
    return r.shape[axis] if stacked or r.transposed else r.shape[0] // r.blocks


def matrix_rows(r: Route) -> tuple[int, ...]:
    """How many rows each of a parameter's matrices has, in their order along its output axis, block by block.

    >>> matrix_rows(Route("qkv.weight", (16, 4), "matrix", "fused qkv", split=(8, 4, 4)))
    (8, 4, 4)
    """
    if not r.split and r.blocks > r.shape[0]:  # several in each of a stack
        return (r.shape[0] * r.shape[1] // r.blocks,) * r.blocks
    return (r.split or (_rows_of_block(r),)) * r.blocks


def _with_rows(r: Route, sizes: Sequence[int]) -> Route:
    """A route whose blocks are split into matrices of so many rows, once or several times over."""
    sizes, rows = tuple(sizes), _rows_of_block(r) if len(r.shape) > 1 else 0
    if not sizes or min(sizes) < 1 or not rows or rows % sum(sizes):
        raise ValueError(
            f"split: {clean_name(r.name)!r} has {rows} rows"
            + (f" in each of {r.blocks} matrices" if r.blocks > 1 else "")
            + f", which {' + '.join(map(str, sizes))} does not divide; give the rows of each of its matrices, or of "
            "those of one head"
        )
    times = rows // sum(sizes)
    r = replace(r, kind=r.kind.removesuffix("?"))  # The rows are known now.
    if len(set(sizes)) == 1 and not r.transposed and not r.interleaved:
        return replace(r, blocks=r.blocks * times * len(sizes))
    if times > 1 and r.blocks == 1 and not r.transposed:
        return replace(r, blocks=times, split=sizes)
    return replace(r, split=sizes * times if times * len(sizes) > 1 else ())


def _rows_of_a_head(r: Route, use: _Use) -> tuple[int, ...]:
    rows = _rows_of_block(r) if len(r.shape) > 1 else 0
    if size := head_size(rows, use.parent, use.owner_name):
        return (size,)
    raise ValueError(
        f"heads: {type(use.parent).__name__}, which holds {clean_name(r.name)!r}, does not say how large a head is "
        f"(num_heads, head_dim, ... of it or its config); give the rows of a head by split={{{clean_name(r.name)!r}: "
        "[...]}"
    )


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
    if words & {"bias", "biases"} or re.fullmatch(r"b_?([qkvo]|in|out|\d)", name.lower()):
        return "bias"
    if use.leaf.startswith("weight_") and words & {"sigma", "rho", "std", "logvar"}:
        return "deviation"
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
    """Whether this looks like another library's Linear or convolution."""
    own = module._parameters  # which has no `get` in a TorchScript module
    weight = next((w for name in _WEIGHTS if name in own and (w := own[name]) is not None), None)
    known = (nn.Linear, _ConvNd, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)
    if weight is None or isinstance(module, known) or _widths(module) is None or _is_called(module, "Norm"):
        return False
    if _is_called(module, "Expert"):
        return False
    return weight.ndim == 2 or (weight.ndim > 2 and (hasattr(module, "kernel_size") or weight.ndim == 3))


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

_HEAD = re.compile(
    r"(.+_)?(head|classifier|logit|predictor)s?|cls|fc|fc_out|out|output|lm_?head"
    r"|(cls|class|bbox|box|mask)_?(score|pred|reg|embed|out)s?|bbox_ctrness"
)
_ATTENTION_HEAD = re.compile(r"(.*_)?(attn|attention|sa|multi)_heads?")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NO_HEAD_INSIDE = (
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.MultiheadAttention,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoderLayer,
)


def _heads(module: nn.Module, trained: Collection[Tensor] | None = None) -> set[nn.Module]:
    """The layers that make the output, as the docstring of :func:`route` defines them."""
    return _HeadSearch(module, None if trained is None else set(trained)).heads()


class _HeadSearch:
    """The search for the layers that make the output.

    Args:
        module: The module.
        trained: The parameters that are trained; ``None`` for all that require a gradient.
    """

    def __init__(self, module: nn.Module, trained: Collection[Tensor] | None) -> None:
        self.module = module
        self.trained = trained
        #: Classes that Hugging Face models declare to be blocks of theirs: no head is inside one.
        self.blocks = {name for m in module.modules() for name in getattr(m, "_no_split_modules", None) or ()}

    def heads(self) -> set[nn.Module]:
        """The layers."""
        heads: set[nn.Module] = set()
        m: Any
        for m in self.module.modules():
            if isinstance(m, nn.AdaptiveLogSoftmaxWithLoss):
                heads.update(filter(_is_layer, m.modules()))
            if hasattr(m, "get_classifier") and self._is_trained(m):
                # A few timm models without a head look for its layer in the nn.Identity that took its place.
                with suppress(AttributeError):
                    classifier = m.get_classifier()
                    for head in classifier if isinstance(classifier, tuple) else (classifier,):
                        heads |= self._layers_of_head(head)
            if hasattr(m, "get_output_embeddings") and self._is_trained(m):
                head = m.get_output_embeddings()
                heads |= self._layers_of_head(head) if head is not None else set()
        return heads | self._search(self.module, only_named=bool(heads))

    def _layers_of_head(self, head: nn.Module) -> set[nn.Module]:
        heads = head.children() if isinstance(head, (nn.ModuleList, nn.ModuleDict)) else [head]
        return set().union(*map(self._search, heads))

    def _search(self, module: nn.Module, only_named: bool = False) -> set[nn.Module]:
        """Go down to the layers that make the output; with ``only_named``, to those whose names say that they do."""
        if _is_layer(module):
            return set() if only_named else {module}
        if _is_headless(module) or type(module).__name__ in self.blocks:
            return set()

        named = [child for name, child in module.named_children() if _is_head_name(name)]
        if layers := set().union(*map(self._layers_of_head, named)):
            return layers
        if any(isinstance(child, nn.Identity) for child in named):
            return set()

        children = {name: c for name, c in module.named_children() if _has_matrices(c) and self._counts(c)}
        names = [name for name, child in children.items() if not _is_copy(name, child, children)]
        if not names:
            return set()
        *others, last = (children[name] for name in names)
        if isinstance(module, _CONTAINERS):
            if not _is_layer(last) and _make(last) in map(_make, others):
                return set()
        elif not _is_layer(last) and not _STACK.fullmatch(names[-1]) and _is_a_network(last):
            twins = [other for other in others if type(other) is type(last) and _shapes(other) == _shapes(last)]
            return set().union(*(self._search(network, only_named) for network in (*twins, last)))
        return self._search(last, only_named)

    def _counts(self, module: nn.Module) -> bool:
        """Whether a child can hold the head: a frozen layer can, a frozen network or one trained elsewhere cannot."""
        return self._is_trained(module) or (_is_layer(module) and not any(p.requires_grad for p in module.parameters()))

    def _is_trained(self, module: nn.Module) -> bool:
        if self.trained is None:
            return any(p.requires_grad for p in module.parameters())
        return any(p in self.trained for p in module.parameters())


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


# --- overrides ------------------------------------------------------------------------------------------------


def _spellings(places: list[_Use]) -> set[str]:
    return {name for place in places for name in (place.name, clean_name(place.name))}


def _matching(argument: str, patterns: Sequence[str], uses: dict[nn.Parameter, list[_Use]]) -> set[nn.Parameter]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument}={patterns!r} must be a list of patterns, such as [{patterns!r}]")
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        matched = {p for p, places in uses.items() if any(fnmatchcase(name, pattern) for name in _spellings(places))}
        if not matched:
            raise _no_match(argument, pattern, uses)
        found |= matched
    return found


_Value = TypeVar("_Value")


def _first_matching(
    argument: str, patterns: Mapping[str, _Value], uses: dict[nn.Parameter, list[_Use]]
) -> dict[nn.Parameter, _Value]:
    """The value of the first pattern that matches each weight's name, or that of its module."""
    if isinstance(patterns, str) or not isinstance(patterns, Mapping):
        raise TypeError(
            f"{argument}={patterns!r} must be a dictionary from patterns to rows, such as {{'*.qkv': [64, 32, 32]}}"
        )
    found: dict[nn.Parameter, _Value] = {}
    for pattern, value in patterns.items():
        matched = False
        for p, places in uses.items():
            names = {name for full in _spellings(places) for name in (full, full.rpartition(".")[0])}
            if p.ndim > 1 and any(fnmatchcase(name, pattern) for name in names):
                matched = True
                found.setdefault(p, value)
        if not matched:
            raise _no_match(argument, pattern, {p: places for p, places in uses.items() if p.ndim > 1})
    return found


def _no_match(argument: str, pattern: str, uses: dict[nn.Parameter, list[_Use]]) -> ValueError:
    known = [clean_name(places[0].name) for places in uses.values()]
    nearest = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
    return ValueError(f"{argument}: no parameter matches {pattern!r}; the nearest are {', '.join(nearest)}")
