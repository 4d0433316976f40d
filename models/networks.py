"""The networks of :class:`lightning_optim.models.LanguageModel` as plain modules, and their sizes by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim.safe_classes import safe_in_checkpoints


@safe_in_checkpoints()
@dataclass(frozen=True)
class GPTConfig:
    """Dimensions of a :class:`GPT`."""

    layers: int
    """Transformer blocks."""

    heads: int
    """Attention heads of a block; divides `width`."""

    width: int
    """Length of the vector that stands for a token."""

    dropout: float = 0.0
    """Probability of dropping an entry of the embedding, of the attention and of what a block adds."""

    bias: bool = True
    """Whether linear layers and layer norms have biases."""

    def __post_init__(self) -> None:
        _check_common(self)
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")


@safe_in_checkpoints()
@dataclass(frozen=True)
class LSTMConfig:
    """Dimensions of an :class:`LSTM`."""

    layers: int
    """Stacked LSTM layers."""

    width: int
    """Length of the vector that stands for a token."""

    hidden: int
    """Length of the state of a layer."""

    dropout: float = 0.0
    """Probability of dropping an entry of the embedding and of the output of a layer."""

    def __post_init__(self) -> None:
        _check_common(self)
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden} must be at least 1")


def _check_common(config: GPTConfig | LSTMConfig) -> None:
    for name in ("layers", "width"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout={config.dropout} must be in [0, 1)")


#: Configurations by architecture and size. `small` is nanoGPT's model for Shakespeare; `gpt2-*` are the models
#: of Radford et al. 2019; `ptb-*` have the widths of AdaBelief's Penn Treebank experiments (arXiv 2010.07468).
PRESETS: dict[str, dict[str, GPTConfig] | dict[str, LSTMConfig]] = {
    "gpt": {
        "tiny": GPTConfig(layers=2, heads=4, width=128),
        "small": GPTConfig(layers=6, heads=6, width=384),
        "gpt2-124m": GPTConfig(layers=12, heads=12, width=768),
        "gpt2-355m": GPTConfig(layers=24, heads=16, width=1024),
    },
    "lstm": {
        "tiny": LSTMConfig(layers=1, width=128, hidden=256),
        "small": LSTMConfig(layers=2, width=256, hidden=512),
        "ptb-1-layer": LSTMConfig(layers=1, width=400, hidden=1150, dropout=0.4),
        "ptb-2-layer": LSTMConfig(layers=2, width=400, hidden=1150, dropout=0.4),
        "ptb-3-layer": LSTMConfig(layers=3, width=400, hidden=1150, dropout=0.4),
    },
}


class GPT(nn.Module):
    r"""A decoder-only transformer: GPT-2 (Radford et al. 2019).

    Each block computes :math:`x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x))` and then
    :math:`x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x))` with causal attention and a GELU layer four times as
    wide. Positions are learned. Weights start from a normal distribution of standard deviation 0.02; those that
    end a residual branch, of :math:`0.02 / \sqrt{2 \cdot \mathrm{layers}}`. Biases start from zero.

    Args:
        vocab_size: Number of tokens.
        sequence_length: The most tokens in a sequence.
        config: Dimensions.
        tied_head: Whether the output layer is the transposed token embedding.

    Example:
        >>> gpt = GPT(256, 32, GPTConfig(layers=2, heads=2, width=16))
        >>> gpt(torch.zeros(4, 10, dtype=torch.long)).shape
        torch.Size([4, 10, 256])
    """

    def __init__(self, vocab_size: int, sequence_length: int, config: GPTConfig, tied_head: bool = True) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Embedding(sequence_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        if tied_head:
            self.head.weight = self.token_embedding.weight
        self.apply(_init_gpt)
        for name, weight in self.named_parameters():
            if name.endswith(("projection.weight", "down.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, tokens: Tensor, last_only: bool = False) -> Tensor:
        """Scores of the token that follows each token.

        Args:
            tokens: Ids, int64 (batch, length), length <= sequence_length.
            last_only: Whether to score what follows the last token only, as generation needs.

        Returns:
            Logits (batch, length, vocab_size), or (batch, 1, vocab_size) with ``last_only``.

        Raises:
            ValueError: For more tokens than there are positions.
        """
        length = tokens.shape[1]
        if length > self.position_embedding.num_embeddings:
            raise ValueError(
                f"a sequence of {length} tokens is longer than sequence_length="
                f"{self.position_embedding.num_embeddings}: shorten it, or build the model for more"
            )
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding.weight[:length])
        for block in self.blocks:
            x = block(x)
        if last_only:
            x = x[:, -1:]
        return self.head(self.norm(x))


class Block(nn.Module):
    """A transformer block with its norms before attention and MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, bias = config.width, config.bias
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.attention = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.activation = nn.GELU(approximate="tanh")
        self.down = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(self.activation(self.up(self.norm2(x)))))


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.projection = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.projection(mixed.transpose(1, 2).flatten(2))


def _init_gpt(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class LSTM(nn.Module):
    """A recurrent language model: embedding, stacked LSTM layers, output layer.

    The state starts from zero in every sequence. Where the head is tied and the state has another width than the
    embedding, a linear layer without bias stands between. Embeddings start uniform in [-0.1, 0.1] and the bias of
    the head from zero, as in AWD-LSTM; the rest as torch has it.

    Args:
        vocab_size: Number of tokens.
        config: Dimensions.
        tied_head: Whether the output layer is the transposed token embedding.

    Example:
        >>> lstm = LSTM(256, LSTMConfig(layers=2, width=8, hidden=16))
        >>> lstm(torch.zeros(4, 10, dtype=torch.long)).shape
        torch.Size([4, 10, 256])
    """

    def __init__(self, vocab_size: int, config: LSTMConfig, tied_head: bool = True) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        between = config.dropout if config.layers > 1 else 0.0
        self.lstm = nn.LSTM(config.width, config.hidden, config.layers, batch_first=True, dropout=between)
        self.projection: nn.Module = nn.Identity()
        if tied_head and config.hidden != config.width:
            self.projection = nn.Linear(config.hidden, config.width, bias=False)
        self.head = nn.Linear(config.width if tied_head else config.hidden, vocab_size)
        nn.init.uniform_(self.token_embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        if tied_head:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, last_only: bool = False) -> Tensor:
        """Scores of the token that follows each token; see :meth:`GPT.forward`. Any length will do."""
        # Under autocast, torch's LSTM fails on processors without bfloat16 instructions.
        with torch.autocast("cpu", enabled=False):
            x, _ = self.lstm(self.dropout(self.token_embedding(tokens)))
        if last_only:
            x = x[:, -1:]
        return self.head(self.projection(self.dropout(x)))
