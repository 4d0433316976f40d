"""The callback Diagnostics as users meet it: in somebody else's project, in TensorBoard, in a callback's place."""

from __future__ import annotations

import csv
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from lightning_optim import build_optimizer
from lightning_optim.callbacks import Diagnostics
from lightning_optim.callbacks.monitor import ProbingMonitor
from lightning_optim.diagnostics.charts import QUESTIONS
from lightning_optim.diagnostics.report import plot, read_runs

PROJECT = Path(__file__).parents[1] / "other_project" / "train.py"


def trainer(**kwargs) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **(quiet | {"max_steps": 6} | kwargs))


class Net(BoringModel):
    def __init__(self, dropout: float = 0.5, examples: int = 64, shuffle: bool = True):
        super().__init__()
        self.examples, self.shuffle = examples, shuffle
        self.layer = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 2))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(RandomDataset(32, self.examples), batch_size=4, shuffle=self.shuffle)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def other_project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    run = subprocess.run([sys.executable, str(PROJECT), str(folder)], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder, [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("EXPECTED")]


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SGD", "Clipped"])
def test_one_line_in_the_project_of_somebody_else(optimizer, other_project):
    folder, printed = other_project
    expected = [tuple(map(float, values)) for name, *values in printed if name == optimizer]
    with open(folder / optimizer / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["update/rms"]]
    assert len(rows) == len(expected) == 8
    for row, (rms, to_weight, norm) in zip(rows, expected):
        # Both are float32 sums over a few hundred elements.
        assert float(row["update/rms"]) == pytest.approx(rms, rel=1e-5)
        assert float(row["update/to_weight"]) == pytest.approx(to_weight, rel=1e-5)
        assert float(row["gradient/norm_clipped"]) == pytest.approx(norm, rel=1e-5)
        assert float(row["gradient/norm_clipped"]) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("tier", ["light", "standard", "full"])
def test_training_is_the_same_with_and_without(tier):
    def train(*callbacks):
        pl.seed_everything(1, verbose=False)
        model = Net()
        t = trainer(callbacks=list(callbacks), accumulate_grad_batches=2, gradient_clip_val=0.5)
        t.fit(model)
        return model.state_dict(), t.optimizers[0].state_dict()["state"], torch.get_rng_state()

    (weights, state, rng), (w, s, r) = train(), train(Diagnostics(tier, every_n_steps=2))
    assert all(torch.equal(weights[k], w[k]) for k in weights)
    assert all(torch.equal(state[i][k], s[i][k]) for i in state for k in state[i])
    assert torch.equal(rng, r)


def test_tiers_and_their_mistakes():
    assert Diagnostics("off").monitors == []
    assert len(Diagnostics("light").monitors) < len(Diagnostics("standard").monitors)
    with pytest.raises(ValueError, match="tier='all' is not one of 'off', 'light'"):
        Diagnostics("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        Diagnostics(every_n_steps=0)
    with pytest.raises(MisconfigurationException, match=r"layers: no parameter matches 'decoder\.\*'"):
        trainer(callbacks=[Diagnostics(layers=["decoder.*"])]).fit(Net())


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx)["loss"])
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.layer[i].parameters(), lr=1e-2) for i in (0, 1)]


class Streamed(Net):
    def train_dataloader(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from torch.ones(64, 32)

        return torch.utils.data.DataLoader(Stream(), batch_size=4)


class WithLBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)


@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        (Manual, {"UpdateVariance": "automatic optimization"}),
        (Streamed, {"UpdateVariance": "over Stream"}),
        (WithLBFGS, dict.fromkeys(("UpdateVariance", "SpikeResponse"), "LBFGS makes no steps on a copy")),
    ],
)
def test_a_run_that_cannot_be_probed_goes_on_without(module, left_out):
    diagnostics = Diagnostics("full", every_n_steps=1)
    for monitor in diagnostics.monitors:
        if isinstance(monitor, ProbingMonitor):
            monitor.probe_every_n_steps = 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[diagnostics], max_steps=20).fit(module(dropout=0) if module is not Manual else module())
    messages = [str(w.message) for w in caught if "leaves probes out of this run" in str(w.message)]
    assert len(messages) == len(left_out)
    for name, reason in left_out.items():
        assert any(m.startswith(name) and reason in m for m in messages)
    tags = {tag for monitor in diagnostics.monitors for tag in monitor.history}
    assert any(tag.endswith("update_variance/online") for tag in tags)
    assert not any("conditional" in tag for tag in tags)
    assert any("probe_amplification" in tag for tag in tags) == ("SpikeResponse" not in left_out)


def test_two_sets_with_different_settings_side_by_side():
    light, standard = Diagnostics("light", every_n_steps=1), Diagnostics("standard", every_n_steps=3)
    trainer(callbacks=[light, standard]).fit(Net())
    assert len(light.monitors[1].history["update/rms"]) == 6
    assert len(standard.monitors[1].history["update/rms"]) == 4  # the first two, too


def test_parameters_outside_of_the_module_are_measured():
    class Outside(Net):
        def __init__(self):
            super().__init__()
            self.outside, self.layer = [self.layer], None  # a list is no module

        def forward(self, x):
            return self.outside[0](x)

        def configure_optimizers(self):
            return torch.optim.SGD(self.outside[0].parameters(), lr=0.1)

    diagnostics = Diagnostics("standard", every_n_steps=1)
    trainer(callbacks=[diagnostics], limit_val_batches=0).fit(Outside())
    assert len(diagnostics.monitors[1].history["update/rms"]) == 6


def test_charts_of_several_optimizers_are_filled(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(callbacks=[Diagnostics("light", every_n_steps=1)], max_steps=8, logger=logger).fit(Manual())
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    content = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    tags = events.Tags()["scalars"]
    for category in layout_pb2.Layout.FromString(content).category:
        for chart in category.chart:
            # As TensorBoard does. The module validates and logs nothing of it.
            assert chart.title == "validation" or any(
                re.match(pattern, tag) for pattern in chart.multiline.tag for tag in tags
            ), chart.title


def test_every_chart_of_the_page_is_filled(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    # A spike is looked for from the 33rd gradient on.
    options = {"max_steps": 40, "accumulate_grad_batches": 2, "logger": logger}
    callbacks = [Diagnostics("standard", every_n_steps=1), pl.callbacks.LearningRateMonitor()]
    trainer(callbacks=callbacks, **options, log_every_n_steps=1).fit(Learner())
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    content = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    pages = layout_pb2.Layout.FromString(content).category
    assert [page.title for page in pages] == list(QUESTIONS)
    (run,) = read_runs([tmp_path])
    by_title = {chart.title: chart for page in pages for chart in page.chart}
    for title, chart in by_title.items():
        drawn = [
            re.escape(x) + "$" for series in chart.margin.series for x in (series.value, series.lower, series.upper)
        ]
        patterns = [*chart.multiline.tag, *drawn]
        # A spike has not happened.
        assert any(run.tags(pattern) for pattern in patterns) or "spikes: s" in title, f"{title} is empty"
    assert list(by_title)[:3] == ["training loss", "validation", "learning rate"]
    assert "gradient noise scale" in by_title
    (margin,) = by_title["update to weight"].margin.series
    bounds = [run.scalars[tag] for tag in (margin.lower, margin.upper)]
    # At the same steps as the value, or TensorBoard draws nothing.
    assert [steps for steps, _ in bounds] == [run.scalars["update/to_weight"][0]] * 2
    assert [values[-1] for _, values in bounds] == pytest.approx([1e-4, 1e-2])
    titles = [axes.get_title() for axes in plot([run]).axes]
    assert {"gradient norm", "update to weight"} <= set(titles)
    assert {"training/loss", "train_loss", "val_loss"} <= set(titles[:4])

    # Every value of ours has a description: what it is, its unit, and what to look for.
    families = {"update", "gradient", "update_variance", "spike", "sign_collapse", "orthogonality", "diagnostics"}
    ours = {tag for tag in run.scalars if tag.partition("/")[0] in families} - UNCHARTED
    assert len(ours) > 15
    for tag in ours:
        about = events.SummaryMetadata(tag).summary_description
        assert re.search(r"Unit: .+\. (Usually healthy: .+\. Otherwise|Look for): .+\.$", about), (tag, about)


#: Values without a chart: what a chart shows in another form, or next to nothing.
UNCHARTED = {
    "update_variance/online",
    "spike/score",
    "spike/zscore",
    "spike/count",
    "gradient/loss_scale",
    "diagnostics/overhead_ms",
}


class Learner(Net):
    """It logs what it learns."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().validation_step(batch, batch_idx)["x"])


def test_the_largest_gradient_between_two_samples_is_kept():
    class Spiked(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"] * (1e4 if self.global_step == 13 else 1.0)

    diagnostics = Diagnostics("standard", every_n_steps=10)
    trainer(callbacks=[diagnostics], max_steps=30, limit_val_batches=0).fit(Spiked(dropout=0))
    tags = {tag: values for monitor in diagnostics.monitors for tag, values in monitor.history.items()}
    calm, largest = tags["gradient/norm"], dict(tags["spike/norm_max"])
    assert [step for step, _ in calm] == [0, 1, 9, 19, 29]
    # The spike is in none of the sampled steps, and in the largest of its interval, which ends with step 20.
    assert all(value < 1e3 for _, value in calm)
    assert [step for step, value in largest.items() if value > 1e3] == [19]


@pytest.mark.parametrize(("optimizer", "most"), [("MVNGrad", 30), ("NAMO", 33)])
def test_globals_are_few(optimizer, most):
    class Ours(Net):
        def configure_optimizers(self):
            return build_optimizer(self, optimizer)

    diagnostics = Diagnostics(every_n_steps=1)
    # Until there are z-scores, and as long as nothing is clipped, accumulated, or hit by a spike.
    run = trainer(callbacks=[diagnostics], max_steps=45)
    run.fit(Ours(dropout=0))
    tags = {tag for tag in run.callback_metrics if "/" in tag}
    assert "spike/zscore" in tags
    assert most - 2 < len(tags) <= most


def test_layers_by_pattern():
    diagnostics = Diagnostics("light", every_n_steps=3, layers=["layer.*.weight"])
    trainer(callbacks=[diagnostics]).fit(Net())
    tags = {tag for monitor in diagnostics.monitors for tag in monitor.history}
    assert {"update_rms/layer.0.weight", "gradient_norm/layer.3.weight"} <= tags
    assert not any(tag.endswith(".bias") for tag in tags)


def test_state_goes_on_after_a_restart(tmp_path):
    def run(folder, max_steps, ckpt=None):
        pl.seed_everything(2, verbose=False)
        diagnostics = Diagnostics("standard", every_n_steps=3)
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=1)
        t = trainer(callbacks=[diagnostics, checkpoint], enable_checkpointing=True, max_steps=max_steps)
        t.fit(Net(dropout=0, examples=16, shuffle=False), ckpt_path=ckpt, weights_only=True)  # 4 steps an epoch
        return diagnostics

    whole = run("whole", 8).monitors[1].history["update/cosine_to_previous"]
    run("first", 4)
    second = run("second", 8, ckpt=tmp_path / "first" / "last.ckpt").monitors[1].history["update/cosine_to_previous"]
    # Steps 3 and 6: the second run measures step 6 only, against the update that the first one remembered.
    assert [step for step, _ in second] == [5]
    assert second[-1] == whole[-1]


def histories(diagnostics):
    return {tag: list(values) for monitor in diagnostics.monitors for tag, values in monitor.history.items()}


def test_another_module_is_not_compared_with_the_last():
    """One callback for several modules, as in cross-validation."""

    def fit(diagnostics):
        pl.seed_everything(3, verbose=False)
        trainer(callbacks=[diagnostics]).fit(Net())
        return histories(diagnostics)

    used = Diagnostics("standard", every_n_steps=1)
    once = fit(used)
    assert fit(used) == {tag: values * 2 for tag, values in once.items()}


def test_a_module_that_trains_on_is_compared_with_its_last_update():
    diagnostics = Diagnostics("standard", every_n_steps=1)
    t, net = trainer(callbacks=[diagnostics], max_steps=3), Net()
    t.fit(net)
    t.fit_loop.epoch_loop.max_steps = 6
    t.fit(net)
    copied = pickle.loads(pickle.dumps(diagnostics))
    assert histories(copied) == histories(diagnostics)
    assert [step for step, _ in histories(diagnostics)["update/cosine_to_previous"]] == [1, 2, 3, 4, 5]
