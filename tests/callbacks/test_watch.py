"""A loop of one's own measures what the callbacks measure in Lightning's Trainer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision as TrainerPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_optim import Watch, build_optimizer
from lightning_optim.callbacks import Diagnostics, GradientHealth, RunRecord
from lightning_optim.diagnostics.diagnosis import diagnose
from lightning_optim.diagnostics.run import read_runs

STEPS, BATCH = 12, 8


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(n: int = STEPS, size: int = BATCH, distance: float = 2.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (n, size), generator=g)
    means = distance * torch.randn(3, 6, generator=g)
    return [(means[y] + torch.randn(size, 6, generator=g), y) for y in labels]


class Module(pl.LightningModule):
    def __init__(self, make) -> None:
        super().__init__()
        self.net = network()
        self.make = make

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(batches(), batch_size=None)

    def configure_optimizers(self):
        return self.make(self)


def by_lightning(make, **settings) -> Diagnostics:
    diagnostics = Diagnostics(every_n_steps=3, quiet=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[diagnostics], enable_model_summary=False, **quiet, **settings
    )
    trainer.fit(Module(make))
    return diagnostics


def plain(make, accumulate=1, clip=None, **settings) -> Watch:
    """A loop of one's own over the same data."""
    model = Module(make)
    optimizer = make(model)
    diagnostics = Diagnostics(every_n_steps=3, quiet=True)
    with Watch(model, optimizer, diagnostics=diagnostics, accumulate=accumulate, **settings) as watch:
        for i, (x, y) in enumerate(batches()):
            loss = nn.functional.cross_entropy(model(x), y)
            watch.loss(loss, len(x))
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    watch.before_clipping()
                    # In the optimizer's order, as Lightning does: the norm is a sum of float32 numbers.
                    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
                optimizer.step()
                optimizer.zero_grad()
    return watch


def of_another_library(module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer as others write them, which works in the gradient."""

    class Theirs(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 0.05})

        @torch.no_grad()
        def step(self, closure=None):
            if closure is not None:
                with torch.enable_grad():
                    closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.div_(p.grad.norm() + 1).mul_(0.05))

    return Theirs(module.parameters())


OPTIMIZERS = {
    "SGD": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2),
    "NAMO": lambda module: build_optimizer(module, "NAMO", lr=0.02),
    "Theirs": of_another_library,
}


def values(diagnostics: Diagnostics) -> dict[str, list[tuple[int, float]]]:
    """All but what says how long things took. (The settings of both runs are compared elsewhere.)"""
    scalars = diagnostics.run().scalars
    return {tag: list(zip(*of)) for tag, of in scalars.items() if "overhead" not in tag}


def courses(diagnostics: Diagnostics) -> list:
    return [record["course"] for _, record in diagnostics.run().records if "course" in record]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.1), (2, 0.1)])
def test_a_plain_loop_logs_what_lightning_does(name, accumulate, clip):
    expected = by_lightning(OPTIMIZERS[name], accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    seen = plain(OPTIMIZERS[name], accumulate, clip).diagnostics
    assert values(seen) == values(expected)  # bit for bit: the same tensors are measured by the same code
    assert courses(seen) == courses(expected)
    assert seen.diagnosis().coverage == expected.diagnosis().coverage
    if accumulate > 1:
        assert "gradient/noise_scale" in values(seen)


@pytest.mark.parametrize("name", ["AdamW", "NAMO"])
def test_watching_changes_nothing(name):
    ends = []
    for watched in (True, False):
        model = network()
        optimizer = OPTIMIZERS[name](model)
        hooks = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
        watch = Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=2, quiet=True)) if watched else None
        for x, y in batches():
            loss = nn.functional.cross_entropy(model(x), y)
            if watch is not None:
                watch.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if watch is not None:
            watch.close()
            assert [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks] == hooks
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_closures_and_lbfgs_are_measured_once_a_step():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    with Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=1, quiet=True)) as watch:
        for x, y in batches(5):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                watch.loss(loss)
                loss.backward()
                return loss

            optimizer.step(closure)
    scalars = watch.diagnostics.run().scalars
    assert scalars["update/rms"][0] == [0, 1, 2, 3, 4]
    assert scalars["gradient/skipped_steps"][1] == [0] * 5
    assert scalars["training/loss"][0] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("announced", [False, True])
def test_steps_that_the_scaler_skips_are_counted_and_not_measured(announced):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    watch = Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=1, quiet=True), scaler=scaler)
    for i, (x, y) in enumerate(batches(6)):
        loss = nn.functional.cross_entropy(model(x), y)
        watch.loss(loss)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if i in (2, 3):
            model[0].weight.grad[0, 0] = float("inf")
        if announced:
            scaler.unscale_(optimizer)
            watch.before_clipping()
        scaler.step(optimizer)
        scaler.update()
    watch.close()
    scalars = watch.diagnostics.run().scalars
    assert scalars["update/rms"][0] == [0, 1, 4, 5]
    assert scalars["gradient/skipped_steps"] == ([0, 1, 4, 5], [0, 0, 2, 2])
    assert scalars["gradient/loss_scale"] == ([0, 1, 4, 5], [64, 64, 16, 16])
    at = [step for course in courses(watch.diagnostics) for step in course[0]]
    assert at == list(range(6))  # each step has its loss, be it skipped or not


def fitted(model, optimizer, folder, steps=200, break_at=None, **settings):
    """A run that logs to a folder, as a user's would."""
    diagnostics = Diagnostics(every_n_steps=10, quiet=True)
    with Watch(model, optimizer, folder, diagnostics=diagnostics, max_steps=steps, **settings) as watch:
        for i, (x, y) in enumerate(batches(steps, 64, 0.7)):
            loss = nn.functional.cross_entropy(model(x), y)
            if i == break_at:
                loss = loss * float("nan")
            watch.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if i % 50 == 49:
                watch.validation({"val/loss": loss})
    (run,) = read_runs([folder])
    return run


def dead(model: nn.Sequential) -> nn.Sequential:
    model[1], model[3] = nn.ReLU(), nn.ReLU()
    nn.init.constant_(model[0].bias, -100)
    nn.init.constant_(model[2].bias, -100)
    return model


@pytest.mark.parametrize(
    ("cause", "make", "lr", "settings"),
    [
        (None, network, 1e-3, {}),
        ("lr_too_high", network, 0.3, {}),
        ("nonfinite_loss", network, 1e-3, {"break_at": 80}),
        ("dead_units", lambda: dead(network()), 1e-3, {}),
    ],
    ids=["healthy", "rate", "nan", "dead"],
)
def test_the_verdict_on_the_folder_names_the_cause(cause, make, lr, settings, tmp_path):
    model = make()
    run = fitted(model, torch.optim.AdamW(model.parameters(), lr=lr), tmp_path, **settings)
    found = diagnose(run)
    causes = [finding.cause for finding in found.findings]
    assert causes[:1] == ([] if cause is None else [cause]), found.line
    assert {"training/loss", "update/to_weight", "val/loss"} <= set(run.scalars)
    assert (tmp_path / "pictures.json").is_file()


def test_resuming_goes_on_counting():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watches = [Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=4, quiet=True)) for _ in range(1)]
    for x, y in batches(6):
        watches[0].loss(loss := nn.functional.cross_entropy(model(x), y))
        loss.backward()
        optimizer.step()
    state = watches[0].state_dict()
    watches[0].close()
    again = Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=4, quiet=True))
    again.load_state_dict(state)
    for x, y in batches(6):
        again.loss(loss := nn.functional.cross_entropy(model(x), y))
        loss.backward()
        optimizer.step()
    again.close()
    assert again.diagnostics.run().scalars["update/rms"][0] == [7, 11]


def test_bad_input_is_said_at_once():
    model, other = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD has no parameter of Sequential"):
        Watch(other, optimizer)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        Watch(model, optimizer, accumulate=0)
    with pytest.raises(ValueError, match=r"must be a torch.optim.Optimizer, got StepLR"):
        Watch(model, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    watch = Watch(model, optimizer, diagnostics=Diagnostics(quiet=True))
    with pytest.raises(ValueError, match="one number"):
        watch.loss(torch.zeros(3))
    with pytest.raises(ValueError, match="'accuracy' must begin with one of val, eval, test"):
        watch.validation({"accuracy": 1.0})


def test_probes_that_need_the_trainer_are_left_out_with_a_warning():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="leaves probes out of this run: a probe of update variance repeats"):
        watch = Watch(model, optimizer, diagnostics=Diagnostics("full", every_n_steps=1, quiet=True))
    for x, y in batches(24):
        watch.loss(loss := nn.functional.cross_entropy(model(x), y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    watch.close()
    scalars = watch.diagnostics.run().scalars
    assert "spike/probe_recovery_steps/1e+03" in scalars  # needs the optimizer only
    assert "update_variance/conditional" not in scalars


# --- wrappers -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*precision='16-mixed'.*not supported on CPU")  # which makes it bf16-mixed
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fabric_logs_what_the_trainer_does(name, precision):
    expected = by_lightning(OPTIMIZERS[name], precision=precision)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    module = Module(OPTIMIZERS[name])
    model, optimizer = fabric.setup(module, OPTIMIZERS[name](module))
    with Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=3, quiet=True)) as watch:
        for x, y in batches():
            loss = nn.functional.cross_entropy(model(x), y)
            watch.loss(loss)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
    seen = watch.diagnostics
    if precision == "32-true":
        assert values(seen) == values(expected)
    else:  # The loss is computed outside of autocast here.
        assert values(seen).keys() == values(expected).keys()
        for tag in ("training/loss", "update/rms", "gradient/norm"):
            # One rounding to bf16 is 2^-9, and differences add up over twelve steps.
            torch.testing.assert_close(
                [y for _, y in values(seen)[tag]], [y for _, y in values(expected)[tag]], rtol=0.05, atol=0.0
            )
    assert seen.diagnosis().coverage == expected.diagnosis().coverage


@pytest.mark.parametrize("init_scale", [2.0**10, 2.0**20])
def test_fabric_with_a_loss_scaler(init_scale):
    """16-mixed on a CPU, which Fabric and the Trainer make bf16-mixed unless they are given a loss scaler."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)

    make = OPTIMIZERS["AdamW"]
    expected = by_lightning(make, plugins=[TrainerPrecision("16-mixed", "cpu", scaler())])
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricPrecision("16-mixed", "cpu", scaler())])
    module = Module(make)
    model, optimizer = fabric.setup(module, make(module))
    with Watch(model, optimizer, diagnostics=Diagnostics(every_n_steps=3, quiet=True)) as watch:
        for x, y in batches():
            with fabric.autocast():
                loss = nn.functional.cross_entropy(model(x), y)
            watch.loss(loss)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
    seen = watch.diagnostics
    assert values(seen).keys() == values(expected).keys()
    for tag, pairs in values(expected).items():
        # Fabric hands out outputs in float32, and the Trainer in float16: a rounding of 2^-11, over twelve steps.
        torch.testing.assert_close(values(seen)[tag], pairs, rtol=0.02, atol=1e-3, msg=tag)
    skipped = values(seen)["gradient/skipped_steps"]
    assert (skipped[-1][1] > 0) == (init_scale > 2**10)
    assert seen.diagnosis().coverage == expected.diagnosis().coverage
    (record,) = (r["run"] for _, r in seen.run().records if "run" in r)
    assert record["precision"] == "16-mixed"


@pytest.mark.parametrize("callback", [Diagnostics, RunRecord, partial(GradientHealth, every_n_steps=2)])
def test_fabric_says_that_it_never_calls_a_callback(callback):
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback()])
    with pytest.raises(MisconfigurationException, match=r"Leave it out .* lightning_optim.Watch"):
        fabric.setup(network())


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_logs_what_the_trainer_does(accumulate):
    from accelerate import Accelerator

    expected = by_lightning(OPTIMIZERS["NAMO"], accumulate_grad_batches=accumulate)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    module = Module(OPTIMIZERS["NAMO"])
    model, optimizer = accelerator.prepare(module, OPTIMIZERS["NAMO"](module))
    diagnostics = Diagnostics(every_n_steps=3, quiet=True)
    with Watch(model, optimizer, diagnostics=diagnostics, accumulate=accumulate) as watch:
        for x, y in batches():
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                watch.loss(loss, len(x))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    assert values(diagnostics) == values(expected)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face(accumulate, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    data = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(16, (96, 8))]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
        report_to=[], use_cpu=True, save_strategy="no", eval_strategy="steps", eval_steps=6, logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    callback = Watch.transformers_callback(tmp_path / "run", Diagnostics(every_n_steps=3, quiet=True))
    optimizer = build_optimizer(model, "NAMO", lr=0.01)
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:8], optimizers=(optimizer, None), callbacks=[callback]
    )
    trainer.train()
    (run,) = read_runs([tmp_path / "run"])
    assert run.scalars["update/rms"][0] == [0, 1, 2, 5, 8, 11]
    assert "eval_loss" in run.scalars
    course = [list(zip(*record["course"][:2])) for _, record in run.records if "course" in record]
    losses = dict(pair for part in course for pair in part)
    theirs = {entry["step"] - 1: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert losses == pytest.approx(theirs, rel=1e-3)  # records have four digits
    covered = diagnose(run).coverage
    assert covered is not None
    assert all(p.moved for p in covered.parameters)
    assert {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= {p.name for p in covered.parameters}


# --- two processes: this module is their program ------------------------------------------------------------------

KINDS = ("DDP", "Fabric", "FSDP2")


def main(out: Path) -> None:
    """The same training by loops with DDP and with FSDP2, by Fabric, and by Lightning's Trainer."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    name = "NAMO"

    def mine() -> list:
        return [batch for i, batch in enumerate(batches(2 * STEPS)) if i % 2 == rank]

    class Shared(Module):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(mine(), batch_size=None)

    results = {}
    expected = Diagnostics(every_n_steps=3, quiet=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[expected], enable_model_summary=False,
        use_distributed_sampler=False, **quiet,
    ).fit(Shared(OPTIMIZERS[name]))  # fmt: skip
    results["Trainer"] = values(expected)
    for kind in KINDS:
        module = Module(OPTIMIZERS[name])
        if kind == "FSDP2":
            mesh = init_device_mesh("cpu", (2,))
            for layer in module.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(module, mesh=mesh)
        optimizer = OPTIMIZERS[name](module)
        if kind == "FSDP2":
            model, backward = module, torch.Tensor.backward
        elif kind == "DDP":
            model, backward = nn.parallel.DistributedDataParallel(module), torch.Tensor.backward
        else:
            fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
            fabric.launch()
            model, optimizer = fabric.setup(module, optimizer)
            backward = fabric.backward
        diagnostics = Diagnostics(every_n_steps=3, quiet=True)
        with Watch(model, optimizer, out / kind, diagnostics=diagnostics) as watch:
            for x, y in mine():
                loss = nn.functional.cross_entropy(model(x), y)
                watch.loss(loss, len(x))
                optimizer.zero_grad()
                backward(loss)
                optimizer.step()
        results[kind] = values(diagnostics)
        if rank == 0:
            names = [p.name for p in diagnostics.diagnosis().coverage.parameters]
            assert names == [n for n, _ in module.named_parameters()], names
    torch.save(results, out / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_log_what_they_do_with_the_trainer(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert "gradient/noise_scale" in results["Trainer"]
        # Work is shared between ranks in the Trainer only, where matrices are stacked otherwise: float32 rounding.
        for kind in KINDS:
            # The gradients of single ranks, from which the noise scale is computed, are not whole under FSDP2.
            missing = {"gradient/noise_scale"} if kind == "FSDP2" else set()
            assert results[kind].keys() == results["Trainer"].keys() - missing
            for tag, pairs in results[kind].items():
                expected = results["Trainer"][tag]
                torch.testing.assert_close(pairs, expected, rtol=1e-3, atol=1e-6, msg=f"{kind} {tag}")
    for kind in KINDS:
        assert len(list((tmp_path / kind).glob("events*"))) == 1  # of the first rank


if __name__ == "__main__":
    main(Path(sys.argv[1]))
