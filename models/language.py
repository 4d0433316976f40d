"""Language models for training on next-token prediction."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_optim.factory import OptimizerMixin

from .networks import GPT, LSTM, PRESETS, GPTConfig, LSTMConfig


class LanguageModel(OptimizerMixin, pl.LightningModule):
    r"""Predicts the next token of a text, and continues texts.

    A batch is (inputs, targets), both int64 (batch, length), targets one token ahead, as ``TextData`` gives it.
    Logged are ``train/loss`` per step, and ``val/loss``, ``val/perplexity`` and ``val/bits_per_byte`` over all
    validation tokens, likewise ``test/...``:

    .. math::
        \mathrm{loss} = -\mathrm{mean} \ln p(\mathrm{target}), \quad
        \mathrm{perplexity} = e^\mathrm{loss}, \quad
        \mathrm{bits\_per\_byte} = \frac{\mathrm{loss}}{\ln 2 \cdot \mathrm{bytes\_per\_token}}

    Bits per byte, unlike the other two, compares models with different tokenizers. ``predict_step`` continues
    the prompts of a batch by ``max_new_tokens``.

    The network is ``self.network``; ``model.network.compile()`` compiles it in place.

    Sizes of ``gpt``, with layers x width: ``tiny`` 2 x 128, ``small`` 6 x 384, ``gpt2-124m`` 12 x 768,
    ``gpt2-355m`` 24 x 1024. Of ``lstm``, with layers x width/hidden: ``tiny`` 1 x 128/256, ``small`` 2 x 256/512,
    ``ptb-1-layer``, ``ptb-2-layer`` and ``ptb-3-layer`` x 400/1150.

    Args:
        vocab_size: Number of tokens.
        sequence_length: The most tokens that the network is given at once.
        architecture: ``gpt`` is a pre-norm transformer, see :class:`GPT`; ``lstm`` see :class:`LSTM`.
        size: Name of a preset of the architecture.
        layers: Number of layers. This and the other dimensions: None takes the preset's.
        heads: Attention heads of a layer; ``gpt`` only.
        width: Length of the vector that stands for a token.
        hidden: Length of the state of a layer; ``lstm`` only.
        dropout: Probability of dropout.
        bias: Whether linear layers and norms have biases; ``gpt`` only.
        tied_head: Whether the output layer is the transposed token embedding.
        bytes_per_token: UTF-8 bytes of the training and validation text per token.
        test_bytes_per_token: The same of the test text. None: ``bytes_per_token``.
        max_new_tokens: Tokens that ``predict_step`` adds.
        temperature: Divides the logits before sampling in ``predict_step``; 0 takes the most likely token.
        top_k: Number of most likely tokens that ``predict_step`` samples from; None for all.

    Raises:
        ValueError: An unknown architecture or size, a dimension that the architecture does not have, or a value
            out of range.

    Example:
        >>> model = LanguageModel(vocab_size=256, sequence_length=64, layers=2, width=32, temperature=0.0)
        >>> prompts = torch.zeros(2, 5, dtype=torch.long)
        >>> model(prompts).shape
        torch.Size([2, 5, 256])
        >>> model.generate(prompts, max_new_tokens=3).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        architecture: Literal["gpt", "lstm"] = "gpt",
        size: str = "tiny",
        layers: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        hidden: int | None = None,
        dropout: float | None = None,
        bias: bool | None = None,
        tied_head: bool = True,
        bytes_per_token: float = 1.0,
        test_bytes_per_token: float | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, value in (("vocab_size", vocab_size), ("sequence_length", sequence_length)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if bytes_per_token <= 0:
            raise ValueError(f"bytes_per_token={bytes_per_token} must be positive")
        self.sequence_length = sequence_length
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        dimensions = {
            "layers": layers,
            "heads": heads,
            "width": width,
            "hidden": hidden,
            "dropout": dropout,
            "bias": bias,
        }
        config = _configuration(architecture, size, dimensions)
        self.network = (
            GPT(vocab_size, sequence_length, config, tied_head)
            if isinstance(config, GPTConfig)
            else LSTM(vocab_size, config, tied_head)
        )
        self.val_metrics = _metrics("val/", bytes_per_token)
        self.test_metrics = _metrics("test/", test_bytes_per_token or bytes_per_token)
        self.example_input_array = torch.zeros(1, sequence_length, dtype=torch.long)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocab_size) of what follows each of ``tokens``, int64 (batch, length)."""
        return self.network(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._losses(batch).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_metrics.update(self._losses(batch))
        self.log_dict(self.val_metrics, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.test_metrics.update(self._losses(batch))
        self.log_dict(self.test_metrics)

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Prompts, int64 (batch, length), alone or with targets, followed by what :meth:`generate` adds."""
        prompts = batch if isinstance(batch, Tensor) else batch[0]
        return self.generate(prompts, self.max_new_tokens, self.temperature, self.top_k)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        """Continue each row of tokens, one token at a time, by what the network finds likely.

        The network sees the last ``sequence_length`` tokens at most. Random numbers come from torch's global
        generator. Call :meth:`eval` first if the model has dropout.

        Args:
            tokens: Ids, int64 (batch, length), length >= 1.
            max_new_tokens: Tokens to add to each row.
            temperature: Divides the logits before sampling; 0 takes the most likely token.
            top_k: Number of most likely tokens to sample from; None for all.

        Returns:
            Ids, int64 (batch, length + max_new_tokens), that start with ``tokens``.

        Raises:
            ValueError: For a negative temperature, a ``top_k`` below 1, or no token to continue.
        """
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be at least 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1, or None for all tokens")
        if tokens.shape[1] == 0:
            raise ValueError("there is no token to continue: give each row at least one")
        for _ in range(max_new_tokens):
            logits = self.network(tokens[:, -self.sequence_length :], last_only=True)[:, -1].float()
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                if top_k is not None and top_k < logits.shape[-1]:
                    smallest = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < smallest, -math.inf)
                chosen = torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1)
            tokens = torch.cat([tokens, chosen], dim=1)
        return tokens

    def _losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of each token of a batch in nats, float32."""
        inputs, targets = batch
        return F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten(), reduction="none")


class Perplexity(MeanMetric):
    """Exponential of a mean cross-entropy. Torchmetrics' own takes logits, and a second softmax over them."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(MeanMetric):
    """A mean cross-entropy per token, in nats, as bits per byte of text."""

    def __init__(self, bytes_per_token: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bytes_per_token = bytes_per_token

    def compute(self) -> Tensor:
        return super().compute() / (math.log(2) * self.bytes_per_token)


def _metrics(prefix: str, bytes_per_token: float) -> MetricCollection:
    # A loss that is not a number must show: the default strategy would leave it out of the mean.
    return MetricCollection(
        {
            "loss": MeanMetric(nan_strategy="disable"),
            "perplexity": Perplexity(nan_strategy="disable"),
            "bits_per_byte": BitsPerByte(bytes_per_token, nan_strategy="disable"),
        },
        prefix=prefix,
    )


def _configuration(architecture: str, size: str, dimensions: dict[str, Any]) -> GPTConfig | LSTMConfig:
    """The preset, with every dimension that is not None replacing the preset's own."""
    if architecture not in PRESETS:
        raise ValueError(f"architecture={architecture!r} must be one of {', '.join(PRESETS)}")
    presets = PRESETS[architecture]
    if size not in presets:
        nearest = difflib.get_close_matches(size, presets, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"size={size!r} is unknown; {hint}The sizes of {architecture} are {', '.join(presets)}")
    preset = presets[size]
    own = {field.name for field in fields(preset)}
    changes = {name: value for name, value in dimensions.items() if value is not None}
    for name, value in changes.items():
        if name not in own:
            raise ValueError(f"{name}={value} does not apply to architecture={architecture!r}: leave it out")
    return replace(preset, **changes)
