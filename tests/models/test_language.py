"""The LightningModule of language models: what it logs, saves and generates."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.models import LanguageModel

VOCAB, LENGTH = 40, 10

DIMENSIONS = {
    "gpt": {"architecture": "gpt", "layers": 2, "heads": 2, "width": 16},
    "lstm": {"architecture": "lstm", "layers": 1, "width": 16, "hidden": 24},
}
both = pytest.mark.parametrize("name", DIMENSIONS)


def small_model(name: str = "gpt", **arguments) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(VOCAB, LENGTH, **DIMENSIONS[name], **arguments)


def loader(rows: int = 10, batch_size: int = 4) -> DataLoader:
    tokens = torch.randint(VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=batch_size)


def quiet_trainer(tmp_path, **arguments) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )


def lengths_given_to(network: torch.nn.Module) -> list[int]:
    lengths: list[int] = []
    network.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    return lengths


# --- measures -----------------------------------------------------------------------------------------------------


@both
def test_measures_are_over_all_tokens(name: str, tmp_path) -> None:
    model = small_model(name, bytes_per_token=2.5, test_bytes_per_token=4.0)
    with torch.no_grad():  # away from the uniform distribution, so that batches differ
        model.network.head.weight.mul_(20)
    data = loader(rows=10, batch_size=4)  # the last batch is a smaller one
    trainer = quiet_trainer(tmp_path)
    (val,) = trainer.validate(model, data, verbose=False)
    (test,) = trainer.test(model, data, verbose=False)

    inputs, targets = data.dataset.tensors
    with torch.no_grad():
        log_p = model.eval()(inputs).double().log_softmax(-1)
    loss = -log_p.gather(-1, targets[..., None]).mean().item()
    expected = {"loss": loss, "perplexity": math.exp(loss)}
    # Sums of a hundred float32 numbers.
    assert val == pytest.approx(
        {
            **{f"val/{k}": v for k, v in expected.items()},
            "val/bits_per_byte": loss / math.log(2) / 2.5,
        },
        rel=1e-5,
    )
    assert test == pytest.approx(
        {
            **{f"test/{k}": v for k, v in expected.items()},
            "test/bits_per_byte": loss / math.log(2) / 4.0,
        },
        rel=1e-5,
    )


def test_a_loss_that_is_not_a_number_shows(tmp_path) -> None:
    model = small_model(tied_head=False)
    with torch.no_grad():
        model.network.token_embedding.weight[0] = math.nan  # sequences without this token keep their loss
    (val,) = quiet_trainer(tmp_path).validate(model, loader(), verbose=False)
    assert all(math.isnan(v) for v in val.values())


def test_measures_start_anew_in_every_validation(tmp_path) -> None:
    model, trainer = small_model(), quiet_trainer(tmp_path)
    first = trainer.validate(model, loader(), verbose=False)
    assert trainer.validate(model, loader(), verbose=False) == first


# --- training -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_trains_validates_tests_and_predicts(name: str, precision: str, tmp_path) -> None:
    model = small_model(name, dropout=0.1, max_new_tokens=3)
    model.optimizer = "AdamW"
    before = [p.detach().clone() for p in model.parameters()]
    trainer = quiet_trainer(tmp_path, fast_dev_run=2, precision=precision)
    trainer.fit(model, loader(), loader())
    assert {"train/loss", "val/loss", "val/perplexity", "val/bits_per_byte"} <= trainer.callback_metrics.keys()
    assert all(v.isfinite() for v in trainer.callback_metrics.values())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
    trainer.test(model, loader(), verbose=False)
    for prediction in trainer.predict(model, loader()):
        assert prediction.shape == (4, LENGTH + 3)


@both
def test_model_summary_shows_shapes(name: str, tmp_path) -> None:
    summary = pl.utilities.model_summary.summarize(small_model(name))
    assert [1, LENGTH, VOCAB] in summary.out_sizes


@both
def test_a_checkpoint_holds_all_that_is_needed(name: str, tmp_path) -> None:
    model = small_model(name, bytes_per_token=2.0, temperature=0.0, top_k=3)
    model.optimizer = "AdamW"
    trainer = quiet_trainer(tmp_path, fast_dev_run=1)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    prompts = next(iter(loader()))[0]
    assert torch.equal(loaded.eval()(prompts), model.eval()(prompts))
    assert torch.equal(loaded.predict_step(prompts, 0), model.predict_step(prompts, 0))


# --- generation -----------------------------------------------------------------------------------------------------


@both
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 2 * LENGTH), new=st.integers(0, LENGTH + 5), temperature=st.sampled_from([0.0, 1.0]))
def test_generation_continues_the_prompt_within_the_window(
    name: str, length: int, new: int, temperature: float
) -> None:
    model = small_model(name).eval()
    lengths = lengths_given_to(model.network)
    prompts = torch.randint(VOCAB, (3, length))
    ids = model.generate(prompts, new, temperature)
    assert ids.shape == (3, length + new)
    assert torch.equal(ids[:, :length], prompts)
    assert ((ids >= 0) & (ids < VOCAB)).all()
    assert lengths == [min(length + i, LENGTH) for i in range(new)]


@both
def test_temperature_zero_takes_the_most_likely_token(name: str) -> None:
    model = small_model(name, max_new_tokens=2 * LENGTH, temperature=0.0).eval()
    with torch.no_grad():
        model.network.head.weight.normal_()  # decisive logits
    prompts = torch.randint(VOCAB, (2, 4))
    ids = model.predict_step((prompts, prompts), 0)
    for end in range(4, ids.shape[1]):
        logits = model(ids[:, max(0, end - LENGTH) : end])[:, -1]
        assert torch.equal(ids[:, end], logits.argmax(-1))
    assert torch.equal(model.predict_step(prompts, 0), ids)
    # Only one token is left to choose from, at any temperature.
    assert torch.equal(model.generate(prompts, 2 * LENGTH, temperature=5.0, top_k=1), ids)


def test_sampling_follows_torchs_generator() -> None:
    model = small_model().eval()
    prompts = torch.zeros(4, 2, dtype=torch.long)
    torch.manual_seed(5)
    ids = model.generate(prompts, 8)
    other = model.generate(prompts, 8)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompts, 8), ids)
    assert not torch.equal(other, ids)


class KnownScores(torch.nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor, last_only: bool) -> Tensor:
        return self.logits.expand(len(tokens), 1, -1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 100)])
def test_tokens_are_drawn_in_proportion(temperature: float, top_k: int | None) -> None:
    model = small_model()
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    model.network = KnownScores(logits)
    draws = 20_000
    torch.manual_seed(0)
    ids = model.generate(torch.zeros(draws, 1, dtype=torch.long), 1, temperature, top_k)[:, 1]
    expected = logits / temperature
    for token in logits.argsort(descending=True)[top_k:] if top_k else []:
        expected[token] = -math.inf
    frequencies = torch.bincount(ids, minlength=5) / draws
    # Five standard errors of a frequency are at most 5 * 0.5 / sqrt(20000) = 0.018.
    torch.testing.assert_close(frequencies, F.softmax(expected, -1), rtol=0, atol=0.018)
    assert ((frequencies > 0) == (expected > -math.inf)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_generation_refuses_wrong_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model().generate(torch.zeros(1, 1, dtype=torch.long), 1, **arguments)


def test_generation_needs_a_token_to_continue() -> None:
    with pytest.raises(ValueError, match="at least one"):
        small_model().generate(torch.zeros(1, 0, dtype=torch.long), 1)


# --- arguments ------------------------------------------------------------------------------------------------------


def test_dimensions_replace_those_of_the_preset() -> None:
    with torch.device("meta"):
        model = LanguageModel(VOCAB, LENGTH, size="gpt2-124m", layers=2, width=96, bias=False)
    assert len(model.network.blocks) == 2
    assert model.network.blocks[0].attention.heads == 12
    assert model.network.token_embedding.weight.shape == (VOCAB, 96)
    assert model.network.norm.bias is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gtp"}, "architecture='gtp' must be one of gpt, lstm"),
        ({"size": "gpt2-125m"}, "did you mean 'gpt2-124m'"),
        ({"architecture": "lstm", "size": "gpt2-124m"}, "sizes of lstm are tiny"),
        ({"architecture": "lstm", "heads": 4}, "heads=4 does not apply to architecture='lstm'"),
        ({"hidden": 4}, "hidden=4 does not apply to architecture='gpt'"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"bytes_per_token": 0.0}, "bytes_per_token=0.0"),
        ({"width": 10, "heads": 4}, "heads=4 must divide width=10"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(**{"vocab_size": VOCAB, "sequence_length": LENGTH, **arguments})
