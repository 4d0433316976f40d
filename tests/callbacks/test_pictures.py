"""Heat maps, spectra and histograms: what is drawn, when, and from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_optim import build_optimizer
from lightning_optim.callbacks import Diagnostics
from lightning_optim.callbacks.pictures import Pictures
from lightning_optim.diagnostics.layer_maps import Pictures as Drawn


class Net(BoringModel):
    def __init__(self, optimizer: str = "NAMO") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.layer = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 2))

    def configure_optimizers(self) -> Any:
        return build_optimizer(self, self.optimizer)


def fit(logger: Any, *callbacks: pl.Callback, steps: int = 6, module: pl.LightningModule | None = None) -> pl.Trainer:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, limit_val_batches=0, logger=logger, callbacks=list(callbacks), **quiet
    )
    trainer.fit(module or Net())
    return trainer


@pytest.mark.parametrize("tier", ["standard", "full"])
def test_tiers_fill_the_pages_of_tensorboard(tier: Any, tmp_path: Path) -> None:
    fit(TensorBoardLogger(tmp_path, name="", version=""), Diagnostics(tier, every_n_steps=2))
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    maps = {"layers/update to weight", "layers/gradient norm", "layers/noise in updates", "layers/stalled elements"}
    few = maps | {"spectra/updates", "spectra/weights"}
    histograms = {"all layers/weight", "all layers/update over its RMS"}
    if tier == "standard":
        assert set(tags["images"]) == few
        assert set(tags["histograms"]) == histograms
    else:
        assert set(tags["images"]) > few
        assert "weight/layer.1.weight" in set(tags["histograms"]) - histograms
    # Standard logs no values of single layers.
    assert any(tag.startswith("update_rms/") for tag in tags["scalars"]) == (tier == "full")


def test_maps_hold_what_the_monitors_measure(tmp_path: Path) -> None:
    diagnostics = Diagnostics("full", every_n_steps=2)
    fit(CSVLogger(tmp_path, name="", version=""), diagnostics)
    history = {tag: values for monitor in diagnostics.monitors for tag, values in monitor.history.items()}
    maps = Drawn.read(tmp_path).maps
    for name, tag in (("update/to_weight", "update_to_weight"), ("gradient/norm", "gradient_norm")):
        layers, steps, matrix = maps.matrix(name)
        assert len(layers) == 8
        for layer, row in zip(layers, matrix):
            expected = list(history[f"{tag}/{layer}"])
            assert steps == [step for step, _ in expected] == [0, 1, 3, 5]
            # Written with four digits.
            assert row.tolist() == pytest.approx([value for _, value in expected], rel=1e-3)


def test_spectra_are_those_of_an_svd(tmp_path: Path) -> None:
    class Kept(Net):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.before = self.layer[1].weight.detach().clone()

    module = Kept("MVNGrad")
    fit(CSVLogger(tmp_path, name="", version=""), Diagnostics("standard", every_n_steps=1), module=module)
    drawn = Drawn.read(tmp_path)
    after = module.layer[1].weight.detach()
    # The smaller ones are square roots of differences, in float32: relative to the largest, 1e-3.
    expected = torch.linalg.svdvals(after)
    assert drawn.spectra["weights"]["layer.1.weight"] == pytest.approx(expected.tolist(), abs=1e-3 * float(expected[0]))
    change = torch.linalg.svdvals(after - module.before)
    assert drawn.spectra["updates"]["layer.1.weight"] == pytest.approx(change.tolist(), abs=1e-3 * float(change[0]))
    assert drawn.spectra_step == 5


def test_drawing_waits_until_it_fits_into_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("lightning_optim.callbacks.pictures.time.perf_counter", lambda: now[0])
    drawn_at: list[float] = []

    def draw(self: Pictures, writer: Any) -> None:
        drawn_at.append(now[0])
        now[0] += 2.0  # as long as a figure takes

    monkeypatch.setattr(Pictures, "_show", draw)

    class Slow(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            now[0] += 100.0

    fit(TensorBoardLogger(tmp_path, name="", version=""), Pictures(every_n_steps=1), steps=60, module=Slow())
    *during, last = drawn_at
    assert during, "a run of 6,000 seconds has time for pictures"
    for i, at in enumerate(during):
        # 0.3 % of the time until then, the picture itself included, whose length is a guess of 1 s at first.
        assert 2.0 * i + (2.0 if i else 1.0) <= 0.003 * at
    assert last >= 6000
    assert len(during) <= 0.003 * 6000 / 2 + 1


def test_a_picture_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Pictures, writer: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Pictures, "_show", fail)
    with pytest.warns(UserWarning, match=r"Pictures could not be drawn \(OSError: no space left\)"):
        trainer = fit(TensorBoardLogger(tmp_path, name="", version=""), Pictures(every_n_steps=1))
    assert trainer.global_step == 6


def test_nothing_is_drawn_without_a_folder() -> None:
    pictures = Pictures(every_n_steps=1)
    fit(False, pictures)
    assert pictures.drawn.spectra == {}


def test_a_run_that_goes_on_has_one_map(tmp_path: Path) -> None:
    def run(steps: int, ckpt: str | None = None) -> None:
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, limit_val_batches=0, enable_progress_bar=False,
            enable_model_summary=False, logger=TensorBoardLogger(tmp_path, name="", version=""),
            callbacks=[Diagnostics("standard", every_n_steps=1)], enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Net(), ckpt_path=ckpt, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")

    run(3)
    run(6, str(tmp_path / "3.ckpt"))
    assert Drawn.read(tmp_path).maps.steps == [0, 1, 2, 3, 4, 5]


# --- notebooks ----------------------------------------------------------------------------------------------------


def test_what_a_notebook_shows() -> None:
    diagnostics = Diagnostics("standard", every_n_steps=2)
    assert "nothing has been measured" in diagnostics._repr_html_()
    with pytest.raises(ValueError, match="nothing to plot"):
        diagnostics.plot()
    fit(False, diagnostics, steps=8)
    figure = diagnostics.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "train/loss"
    assert "update to weight" in titles
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "update/to_weight" in diagnostics.summary() or "healthy" in diagnostics.summary()
    shown = diagnostics._repr_html_()
    assert shown.startswith("<pre>")
    assert 'src="data:image/png;base64,' in shown


def test_to_frame() -> None:
    pandas = pytest.importorskip("pandas")
    diagnostics = Diagnostics("light", every_n_steps=2)
    fit(False, diagnostics, steps=8)
    frame = diagnostics.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    history = diagnostics.monitors[1].history["update/rms"]
    series = frame["update/rms"].dropna()
    assert list(series.items()) == list(history)
    assert frame.index.name == "step"
    assert np.isfinite(frame["train/loss"].dropna()).all()


NOTEBOOK = """
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_optim.callbacks import Diagnostics
diagnostics = Diagnostics(every_n_steps=2)
trainer = pl.Trainer(max_steps=8, callbacks=[diagnostics], accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(BoringModel())
"""


@pytest.mark.slow
def test_a_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbconvert")
    pytest.importorskip("ipykernel")
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    cells = [NOTEBOOK, "diagnostics.plot()", "diagnostics.summary()", "diagnostics.to_frame().tail(2)", "diagnostics"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    ExecutePreprocessor(timeout=200).preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    outputs = [[output for output in cell.outputs if "data" in output] for cell in notebook.cells]
    assert "image/png" in outputs[1][0]["data"]
    assert "\\n" not in outputs[2][0]["data"]["text/plain"], "words, not the text of a string"
    assert "text/html" in outputs[3][0]["data"]
    assert "base64" in outputs[4][0]["data"]["text/html"]
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert page.count("data:image/png;base64") >= 2
