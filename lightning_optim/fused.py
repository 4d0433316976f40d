"""Fused projections: which tensors stack several matrices, and the rows of each, as their module says it.

A Linear or convolution is taken for a fused one by its name. The rows of its matrices follow from the sizes that the
module which holds it, or that module's configuration, has as attributes: numbers of heads, of key and value heads, the
size of a head, the width of a feed-forward layer, and so on. Where these do not add up, the parts are unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Fused", "fused", "head_size", "size"]


@dataclass(frozen=True)
class Fused:
    """What a fused projection is, and the rows of the matrices in it."""

    kind: str
    """Kind of the parameter in the routing table."""

    split: tuple[int, ...] = ()
    """Rows of each matrix, once or several times over; empty where they are unknown."""


#: What attributes call the sizes; the first that is found holds.
_HEADS = ("num_heads", "num_attention_heads", "num_q_heads", "n_heads", "n_head", "nhead", "num_query_heads", "heads")
_KV_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "n_query_groups"),
    *("num_query_groups", "num_kv", "kv_n_heads"),
)
_HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "qk_head_dim", "d_head", "dim_head", "attn_head_size")
_WIDTH = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_features")
_INNER = ("intermediate_size", "d_inner", "d_ssm", "mamba_intermediate_size")
_STATE = ("ssm_state_size", "d_state", "state_size")
_GROUPS = ("n_groups", "ngroups")
_SSM_HEADS = ("num_heads", "nheads", "n_heads")
_RANK = ("time_step_rank", "dt_rank")
_VALUE_HEAD = ("v_head_dim", "v_head_size")
_PLAIN_HEAD = ("qk_nope_head_dim",)
_LATENT = ("kv_lora_rank",)
_ROTARY = ("qk_rope_head_dim",)

_QKV = {"cattn", "wpack", "inprojqkv", "querykeyvalue"}
_KV = {"kv", "tokv", "kvproj", "wkv", "linearkv", "kvlinear", "keyvalue", "tokeyvalue", "kvlinears"}
_GATE_AND_UP = {"w13", "w31", "fc13", "gateup", "upgate", "gateupproj", "upgateproj", "gateandup", "wgu", "gateproj2"}
#: Names of Linears that are sometimes two: only where a sibling takes half of what they make.
_PERHAPS_GATE_AND_UP = {"wi", "w12", "inputlinear", "fc1", "linearin", "fcin", "wifused", "win", "proj"}
#: Classes whose projections are interleaved by attention head, whatever they call them.
_BY_HEAD = re.compile(r"CodeGenAttention|MiniMaxLightning|DisentangledSelfAttention|GPTBigCodeAttention")


def fused(name: str, rows: int, columns: int, parent: nn.Module) -> Fused | None:
    """What is known of a projection that may be fused.

    Args:
        name: What its module calls it.
        rows: How many outputs it has.
        columns: How many inputs.
        parent: Its module.

    Returns:
        ``None`` for a projection whose name is not that of a fused one.

    Example:
        >>> attention = nn.Module()
        >>> attention.num_heads, attention.num_key_value_heads, attention.head_dim = 4, 2, 16
        >>> fused("qkv_proj", 128, 64, attention)
        Fused(kind='fused qkv', split=(64, 32, 32))
        >>> fused("qkv_proj", 120, 64, attention)
        Fused(kind='fused qkv?', split=())
    """
    key = name.lower().replace("_", "")
    if "qkv" in key or key in _QKV:
        return _qkv(key, rows, columns, parent)
    if key.startswith(("kvb", "wkvb", "kva", "wkva")):
        return _latent(key, rows, parent)
    if key in _KV:
        return _by_head(rows, parent, "kv") if _is_by_head(key, parent) else _kv(rows, columns, parent)
    if key in ("inproj", "xproj") and _is_state_space(parent):
        return _state_space(key, rows, parent)
    if key == "inproj" and rows == 3 * columns:
        return _by_head(rows, parent) if _is_by_head(key, parent) else Fused("fused qkv", (columns,) * 3)
    if key in _GATE_AND_UP:
        known = rows % 2 == 0 and (rows // 2 in _widths_taken(parent) or 2 * size(parent, _WIDTH) == rows)
        return Fused("fused gate and up", (rows // 2,) * 2) if known else Fused("fused gate and up?")
    perhaps = key in _PERHAPS_GATE_AND_UP and rows % 2 == 0 and rows // 2 != columns and _is_gated(key, parent)
    if perhaps and rows // 2 in _widths_taken(parent):
        return Fused("fused gate and up", (rows // 2,) * 2)
    return None


def head_size(rows: int, parent: nn.Module, name: str = "") -> int:
    """Rows of one head in a projection with so many rows; 0 where its module does not say."""
    key = name.lower().replace("_", "")
    if key.startswith(("kvb", "wkvb")) and (sizes := _latent(key, rows, parent).split):
        return sum(sizes)
    names = (*_VALUE_HEAD, *_HEAD_SIZE) if re.match(r"v|wv|tov", key) else ("qk_head_dim", *_HEAD_SIZE)
    for found in (size(parent, (n,)) for n in names):
        if found and rows % found == 0:
            return found
    heads = size(parent, _HEADS)
    width = next((taken for taken in (size(parent, ("embed_dim", "hidden_size", "dim", "n_embd")),) if taken), rows)
    return width // heads if heads and width % heads == 0 and rows % (width // heads) == 0 else 0


def size(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first of some attributes that a module, or its configuration, has as a positive integer; 0 if none."""
    for owner in (module, *(getattr(module, name, None) for name in ("config", "cfg", "args"))):
        for name in names:
            value: Any = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _qkv(key: str, rows: int, columns: int, parent: nn.Module) -> Fused:
    if hasattr(parent, "q_attn") and rows == 2 * columns:  # GPT-2's cross-attention
        return Fused("fused kv", (columns,) * 2)
    if _is_by_head(key, parent):
        return _by_head(rows, parent)
    heads, kv_heads, head = size(parent, _HEADS), size(parent, _KV_HEADS), size(parent, _HEAD_SIZE)
    if heads and kv_heads and not head and rows % (heads + 2 * kv_heads) == 0:
        head = rows // (heads + 2 * kv_heads)
    if heads and kv_heads and (heads + 2 * kv_heads) * head == rows:
        return Fused("fused qkv", (heads * head, kv_heads * head, kv_heads * head))
    keys, values = size(parent, ("key_dim",)), size(parent, ("value_dim", "val_dim"))
    if keys and values and heads * (2 * keys + values) == rows:
        return Fused("fused qkv by head", (keys, keys, values))
    if keys and values and 2 * keys + values == rows:
        return Fused("fused qkv", (keys, keys, values))
    if rows == 3 * columns or 3 * heads * head == rows > 0:
        return Fused("fused qkv", (rows // 3,) * 3)
    return Fused("fused qkv?")


def _is_by_head(key: str, parent: nn.Module) -> bool:
    # timm's MaxViT says `head_first`.
    names = " ".join(cls.__name__ for cls in type(parent).__mro__)
    return key == "querykeyvalue" or bool(getattr(parent, "head_first", False)) or bool(_BY_HEAD.search(names))


def _by_head(rows: int, parent: nn.Module, what: str = "qkv") -> Fused:
    head, heads = size(parent, _HEAD_SIZE), size(parent, _HEADS)
    if not head and heads and rows % (len(what) * heads) == 0 and not size(parent, _KV_HEADS):
        head = rows // (len(what) * heads)
    known = head and rows % head == 0
    return Fused(f"fused {what} by head", (head,)) if known else Fused(f"fused {what} by head?")


def _kv(rows: int, columns: int, parent: nn.Module) -> Fused | None:
    heads, head = size(parent, _KV_HEADS) or size(parent, _HEADS), size(parent, _HEAD_SIZE)
    if rows == 2 * columns or (heads and 2 * heads * head == rows):
        return Fused("fused kv", (rows // 2,) * 2)
    if rows == head:  # keys that are values, too
        return None
    if heads and not head and rows % (2 * heads) == 0 and rows % 2 == 0 and rows // 2 in _widths_taken(parent):
        return Fused("fused kv", (rows // 2,) * 2)
    return Fused("fused kv?")


def _latent(key: str, rows: int, parent: nn.Module) -> Fused:
    """Multi-head latent attention: down to a latent and a rotary key, and up to keys and values, head by head."""
    if key.startswith(("kva", "wkva")):
        sizes = (size(parent, _LATENT), size(parent, _ROTARY))
        return Fused("fused latent and key", sizes) if all(sizes) and sum(sizes) == rows else Fused("fused latent?")
    sizes = (size(parent, _PLAIN_HEAD), size(parent, _VALUE_HEAD))
    known = all(sizes) and rows % sum(sizes) == 0
    return Fused("fused kv by head", sizes) if known else Fused("fused kv by head?")


def _is_state_space(parent: nn.Module) -> bool:
    return hasattr(parent, "A_log") or "Mamba" in type(parent).__name__


def _state_space(key: str, rows: int, parent: nn.Module) -> Fused:
    inner, state = size(parent, _INNER), size(parent, _STATE)
    if key == "xproj":
        sizes: tuple[int, ...] = (size(parent, _RANK), state, state)
        return Fused("fused state space", sizes) if all(sizes) and sum(sizes) == rows else Fused("fused state space?")
    if inner and rows == 2 * inner:
        return Fused("fused state space", (inner, inner))
    shared = size(parent, _GROUPS) * state
    sizes = (inner, inner, shared, shared, size(parent, _SSM_HEADS))
    return Fused("fused state space", sizes) if all(sizes) and sum(sizes) == rows else Fused("fused state space?")


def _is_gated(key: str, parent: nn.Module) -> bool:
    """Whether a name that other layers have, too, can be that of gate and up: some only where the class says so."""
    if key not in ("fc1", "fcin", "proj", "win"):
        return True
    return any(part in cls.__name__ for cls in type(parent).__mro__ for part in ("GLU", "Glu", "GEGLU", "Gated"))


def _widths_taken(parent: nn.Module) -> set[int]:
    """How many inputs the layers and weights beside a projection take."""
    found = set()
    for child in parent.modules():
        for name in ("in_features", "in_channels", "input_size"):
            if isinstance(width := getattr(child, name, None), int):
                found.add(width)
    return found
