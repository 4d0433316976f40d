"""What is tried, kept, gone on with, and concluded, with a task that is a formula."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_optim.compare import ledger as ledger_module
from lightning_optim.compare import study as study_module
from lightning_optim.compare.design import Contender, Design, Rates, Run, contenders
from lightning_optim.compare.ledger import Ledger
from lightning_optim.compare.result import Comparison, words
from lightning_optim.compare.search import Tuning, as_key, next_trials
from lightning_optim.compare.statistics import difference
from lightning_optim.compare.study import StudyError, run_study
from lightning_optim.compare.workers import WorkerDied, executor

from .fakes import BEST, Formula, inline, outcome


def design(*names: str, **settings: Any) -> Design:
    return Design(tuple(contenders(names or ("MVNGrad", "NAMO"), 0.01, "decoupled")), **settings)


def tuned(d: Design, costs: Any) -> list[Tuning]:
    """What has been tried at the end of the search."""
    tunings = [Tuning(contender) for contender in d.contenders]
    rounds = 0
    while trials := next_trials(d, tunings):
        rounds += 1
        assert rounds < 50
        for tuning, chosen in trials:
            tuning.costs[as_key(chosen)] = costs(tuning.contender.name, chosen)
    return tunings


def parabola(name: str, chosen: dict[str, float]) -> float:
    best, lowest = BEST[name]
    return lowest + math.log10(chosen["lr"] / best) ** 2


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["grid", "tpe"])
@pytest.mark.parametrize(
    ("names", "rates"),
    [
        (("MVNGrad", "NAMO"), None),
        (("MVNGrad", "NAMO"), Rates(1e-5, 1e-4)),
        (("torch.optim.RMSprop",), Rates(0.1, 1.0, 3)),
    ],
)
def test_all_get_equally_many_trials_and_find_their_best(
    search: Any, names: tuple[str, ...], rates: Rates | None
) -> None:
    d = design(*names, rates=rates, search=search, most_trials=30)
    tunings = tuned(d, parabola)
    assert len({len(t.tried) for t in tunings}) == 1
    for t in tunings:
        assert len({as_key(chosen) for chosen in t.tried}) == len(t.tried)
        assert t.best is not None
        assert not t.edge
        # The grid has a rate within a factor of sqrt(2) of any; TPE's extensions have one within 2.
        assert abs(math.log2(t.best["lr"] / BEST[t.contender.name][0])) <= (0.51 if search == "grid" else 1.01)
        rates_tried = [chosen["lr"] for chosen in t.tried]
        assert min(rates_tried) < t.best["lr"] < max(rates_tried)


def test_the_bound_of_extensions_is_said() -> None:
    tunings = tuned(design(most_trials=9), lambda name, chosen: -math.log(chosen["lr"]))
    assert [t.edge for t in tunings] == ["upper"] * 3
    assert {len(t.tried) for t in tunings} == {9}
    lost = tuned(design(most_trials=9), lambda name, chosen: math.inf)
    assert [t.best for t in lost] == [None] * 3


def test_the_search_is_a_function_of_the_costs() -> None:
    """Whatever the order in which results come in, the same is tried: a study that goes on does what it would have."""
    for search in ("grid", "tpe"):
        also = {"weight_decay": (1e-3, 1.0)} if search == "tpe" else {}
        d = design(search=search, also=also)
        first, second = tuned(d, parabola), tuned(d, parabola)
        assert [t.tried for t in first] == [t.tried for t in second]
        assert all(set(chosen) == {"lr", *also} for t in first for chosen in t.tried)


# --- contenders -------------------------------------------------------------------------------------------------------


def test_the_baseline_is_always_there_and_first() -> None:
    for names in ((), ("NAMO",), ("NAMO", "AdamW"), ("MVNGrad", "torch.optim.AdamW"), ("AdamW:betas=[0.9,0.95]",)):
        made = contenders(names, 0.01, "decoupled")
        assert "AdamW" in made[0].name
        assert sum("AdamW" in c.name for c in made) == 1
    with pytest.raises(ValueError, match="NAMO twice"):
        contenders(["NAMO", "NAMO"], 0.01, "decoupled")
    with pytest.raises(ValueError, match=r"Did you mean NAMO"):
        contenders(["Namo"], 0.01, "decoupled")
    with pytest.raises(ValueError, match=r"not a torch\.optim\.Optimizer"):
        contenders(["torch.nn.Linear"], 0.01, "decoupled")
    with pytest.raises(ValueError, match="cannot be imported"):
        contenders(["nowhere.Optimizer"], 0.01, "decoupled")


@pytest.mark.parametrize(
    ("name", "amount", "decay", "expected", "form"),
    [
        ("HVAdam", 0.1, "decoupled", {"weight_decay": 0.1, "decay": "decoupled"}, "0.1 decoupled"),
        ("HVAdam", 0.1, "own", {"weight_decay": 0.1}, "0.1 coupled (L2)"),
        ("Anon", 0.1, "decoupled", {"weight_decay": 0.1, "decay": "decoupled"}, "0.1 decoupled"),
        ("LaMAdam:decoupled=false", 0.1, "decoupled", {"weight_decay": 0.1, "decoupled": False}, "0.1 coupled (L2)"),
        ("LaMAdam:decay=cautious", 0.1, "decoupled", {"weight_decay": 0.1, "decay": "cautious"}, "0.1 cautious"),
        ("NAMO", None, "decoupled", {"decay": "decoupled"}, "0.1 decoupled"),
        ("NAMO", None, "own", {}, "0.1 adaptive"),
        ("LaProp", 0.1, "own", {"weight_decay": 0.1}, "0.1 independent"),
        ("AdamW", 0.1, "decoupled", {"weight_decay": 0.1}, "0.1 decoupled"),
        ("torch.optim.NAdam", 0.1, "decoupled", {"weight_decay": 0.1, "decoupled_weight_decay": True}, "0.1 decoupled"),
        ("torch.optim.RMSprop", 0.1, "decoupled", {"weight_decay": 0.1}, "0.1 coupled (L2)"),
        ("SGD:momentum=0.9", 0.0, "decoupled", {"weight_decay": 0.0, "momentum": 0.9}, "none"),
        ("torch.optim.Rprop", 0.1, "decoupled", {}, ""),
    ],
)
def test_weight_decay_has_one_form(name: str, amount: float | None, decay: Any, expected: Any, form: str) -> None:
    contender = Contender.of(name, amount, decay)
    assert contender.args == expected
    assert contender.decay == form


def test_the_fallback_keeps_its_ratio() -> None:
    contender = Contender.of("NAMO", 0.01, "decoupled")
    assert contender.fallback_ratio == 0.1  # AdamW's 1e-3 over 1e-2
    assert contender.arguments({"lr": 0.04})["fallback_lr"] == 0.004
    assert contender.arguments({"lr": 0.04, "fallback_ratio": 0.5})["fallback_lr"] == 0.02
    assert Contender.of("NAMO:fallback_ratio=1", 0.01, "decoupled").arguments({"lr": 0.04})["fallback_lr"] == 0.04
    fixed = Contender.of("NAMO:fallback_lr=0.003", 0.01, "decoupled")
    assert fixed.arguments({"lr": 0.04})["fallback_lr"] == 0.003
    assert "fallback_lr" not in Contender.of("MVNGrad", 0.01, "decoupled").arguments({"lr": 0.04})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 2}, "trials must be .* got 2"),
        ({"seeds": 0}, "seeds must be"),
        ({"mode": "low"}, "mode must be"),
        ({"also": {"beta": (0.1, 1.0)}, "search": "tpe"}, "no contender has"),
        ({"also": {"weight_decay": (0.1, 1.0)}}, "search='tpe'"),
        ({"also": {"weight_decay": (1.0, 0.1)}, "search": "tpe"}, "from low to high"),
    ],
)
def test_wrong_designs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        design(**settings)


@pytest.mark.parametrize("text", ["1e-3", "1:2:3:4", "a:b", "1e-1:1e-3", "0:1", "1e-3:1:x1"])
def test_wrong_rates(text: str) -> None:
    with pytest.raises(ValueError, match="lr="):
        Rates.parse(text)


def test_what_a_run_is_found_by() -> None:
    d = design()
    run = d.first(d.baseline, {"lr": 0.001})
    assert run.key("task") == d.first(d.baseline, {"lr": 0.001}).key("task")
    others = [d.first(d.baseline, {"lr": 0.002}), d.runs(d.baseline, {"lr": 0.001}, "reporting")[0]]
    others += [design(steps=5).first(d.baseline, {"lr": 0.001}), d.first(d.contenders[1], {"lr": 0.001})]
    assert len({run.key("task"), run.key("other task"), *(other.key("task") for other in others)}) == 6
    # Tuning and reporting never share a seed.
    assert not {*Design(d.contenders, seeds=1000).report_seeds} & {*d.tune_seeds}


# --- studies ----------------------------------------------------------------------------------------------------------


def make(folder: Path, d: Design, monkeypatch: Any, fail: Any = lambda run: None, **more: Any) -> tuple[Any, list[Run]]:
    made: list[Run] = []
    monkeypatch.setattr(study_module, "executor", inline(made, fail))
    if not more.pop("report", False):
        monkeypatch.setattr(Comparison, "write", lambda self, folder: folder)
    task = more.pop("task", Formula())
    return run_study(task, d, folder, console=Console(quiet=True), **more), made


def test_verdicts_and_every_form_of_the_report(tmp_path: Path, monkeypatch: Any) -> None:
    d = design("MVNGrad", "NAMO", "torch.optim.RMSprop")
    comparison, made = make(tmp_path, d, monkeypatch, report=True)
    words = {s.name: s.words for s in comparison.standings}
    assert words["MVNGrad"].startswith("better than AdamW by 0.2 +- ")
    assert words["torch.optim.RMSprop"].startswith("worse than AdamW by 1 +- ")
    assert words["NAMO"].startswith("not distinguishable from AdamW at 5 seeds")
    assert comparison.noise.startswith("Noise: between 5 seeds, AdamW ends at val/loss 0.998 ")
    assert {run.seed for run in made if run.phase == "reporting"} == {1, 2, 3, 4, 5}
    assert len({s.runs for s in comparison.standings}) == 1  # as many runs of each
    for name in ("report.html", "report.md", "study.json", "runs.csv"):
        text = (tmp_path / name).read_text()
        assert "torch.optim.RMSprop" in text
    kept = json.loads((tmp_path / "study.json").read_text())
    assert [s["words"] for s in kept["standings"]] == [s.words for s in comparison.standings]
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + len(comparison.runs)
    assert len([*(tmp_path / "tensorboard").rglob("events.*")]) >= len(comparison.runs)
    assert comparison.table() in str(comparison)
    assert "<table>" in comparison._repr_html_()
    assert comparison.plot().axes
    assert comparison.standing("NAMO").scores
    with pytest.raises(KeyError, match="NAMO"):
        comparison.standing("Namo")


@pytest.mark.parametrize(
    ("mean", "tuning", "hint"),
    [
        (-0.05, 0.2, "which learning rate is best is too uncertain: more tuning seeds would be needed"),
        (-0.0001, 0.2, "if there is a difference, it is too small for more seeds to show"),
        (-0.0001, 0.0, "if there is a difference, it is too small for more seeds to show"),
        (-0.05, 0.0, "about 9 would be needed"),
    ],
)
def test_what_would_be_needed(mean: float, tuning: float, hint: str) -> None:
    d = difference([mean + 0.04 * x for x in (-1, -0.5, 0, 0.5, 1)], [0.0] * 5, 2, tuning)
    assert d.verdict == "unclear"
    said = words(d, "NAMO", "AdamW", design())
    assert said.endswith(f"; {hint}")


def test_the_same_command_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    """Ended after any number of runs and begun again, a study makes only what is left, and ends with the same table."""
    d = design()
    whole, made = make(tmp_path / "whole", d, monkeypatch)
    parts: list[Run] = []
    for count in (1, 9, 20):
        calls = iter(range(10_000))

        def interrupt(run: Run, calls: Any = calls, count: int = count) -> None:
            if next(calls) == count:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "parts", d, monkeypatch, interrupt)
    last, parts = make(tmp_path / "parts", d, monkeypatch)
    assert last.table() == whole.table()
    real = [run for run in made if run.steps is None]  # without the short ones that are timed
    assert len(parts) < len(real) - 20
    again, none = make(tmp_path / "parts", d, monkeypatch)
    assert none == []
    assert again.table() == whole.table()
    # A further optimizer and more seeds cost only themselves; another version of the code begins anew.
    _, more = make(tmp_path / "parts", design("MVNGrad", "NAMO", "torch.optim.RMSprop"), monkeypatch)
    assert {run.contender for run in more} == {"torch.optim.RMSprop"}
    _, new = make(tmp_path / "parts", d, monkeypatch, task=Formula(version="2"))
    assert len(new) == len(real)


def test_diverged_runs_count_as_infinitely_bad(tmp_path: Path, monkeypatch: Any) -> None:
    class Fragile(Formula):
        def train(self, run: Run) -> dict[str, Any]:
            if run.contender == "NAMO" and run.seed == 3:
                return outcome(None)
            return super().train(run)

    comparison, _ = make(tmp_path, design(), monkeypatch, task=Fragile())
    namo = comparison.standing("NAMO")
    assert namo.words == "no verdict: NAMO diverged in 1 of 5 runs"
    assert namo.scores[2] is None
    assert any("infinitely bad" in remark for remark in comparison.remarks)
    assert comparison.standing("MVNGrad").words.startswith("better")


def test_an_optimizer_that_fails_is_out_and_tried_again_next_time(tmp_path: Path, monkeypatch: Any) -> None:
    class Broken(Formula):
        broken = True

        def train(self, run: Run) -> dict[str, Any]:
            if run.contender == "NAMO" and self.broken:
                return {"status": "failed", "score": None, "message": "ValueError: no matrices", "seconds": 0.1}
            return super().train(run)

    task = Broken()
    comparison, _ = make(tmp_path, design(), monkeypatch, task=task)
    assert comparison.standing("NAMO").words == "out: ValueError: no matrices"
    assert comparison.standing("MVNGrad").words.startswith("better")
    task.broken = False
    comparison, made = make(tmp_path, design(), monkeypatch, task=task)
    assert {run.contender for run in made} == {"NAMO"}
    assert not comparison.standing("NAMO").dropped
    with pytest.raises(StudyError, match="AdamW cannot be trained: it is broken"):
        make(tmp_path / "b", design(), monkeypatch, task=_AllBroken())


class _AllBroken(Formula):
    def train(self, run: Run) -> dict[str, Any]:
        return {"status": "failed", "score": None, "message": "it is broken", "seconds": 0.1}


def test_a_crash_is_tried_once_more(tmp_path: Path, monkeypatch: Any) -> None:
    crashed: list[str] = []

    def once(run: Run) -> None:
        if run.label not in crashed and run.steps is None and len(crashed) < 5:
            crashed.append(run.label)
            raise WorkerDied("killed")

    comparison, _ = make(tmp_path, design(), monkeypatch, once)
    assert comparison.table() == make(tmp_path / "whole", design(), monkeypatch)[0].table()
    assert len(crashed) == 5

    def always(run: Run) -> None:
        if run.contender == "NAMO" and run.steps is None:
            raise WorkerDied("killed")

    comparison, _ = make(tmp_path / "always", design(), monkeypatch, always)
    assert comparison.standing("NAMO").words.startswith("out: it crashed twice: killed")


def test_the_largest_design_that_fits(tmp_path: Path, monkeypatch: Any) -> None:
    """Runs of the formula say that they take a second, and there are two jobs."""
    comparison, _ = make(tmp_path, design(), monkeypatch, budget=25.0)
    used = comparison.design
    assert (used.trials, used.seeds) != (7, 5)
    assert 1.25 * sum(map(used.count, used.contenders)) / 2 <= 25
    again, none = make(tmp_path, design(), monkeypatch, budget=25.0)
    assert none == []  # The same budget is the same design.
    assert again.table() == comparison.table()
    with pytest.raises(StudyError, match="Nothing fits a budget of 5 s"):
        make(tmp_path, design(), monkeypatch, budget=5.0)


def test_the_same_optimizer_under_two_names(tmp_path: Path, monkeypatch: Any) -> None:
    comparison, _ = make(tmp_path, design("AdamW", "torch.optim.AdamW:amsgrad=false"), monkeypatch, task=_Same())
    assert comparison.standings[1].words == "the same as AdamW (5 pairs)"


class _Same(Formula):
    def train(self, run: Run) -> dict[str, Any]:
        return Formula.train(self, Run("AdamW", "AdamW", run.args, run.seed, run.steps, run.phase))


def test_larger_is_better(tmp_path: Path, monkeypatch: Any) -> None:
    class Accuracy(Formula):
        def train(self, run: Run) -> dict[str, Any]:
            result = super().train(run)
            return result if result["score"] is None else outcome(-result["score"])

    comparison, _ = make(tmp_path, design(mode="max"), monkeypatch, task=Accuracy())
    mvn = comparison.standing("MVNGrad")
    assert mvn.words.startswith("better")
    assert mvn.mean > comparison.baseline.mean


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_no_run_is_claimed_twice(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "study.log") if kind == "file" else f"sqlite:///{tmp_path / 'study.db'}"
    d = design()
    runs = {run.key("t"): run for run in (d.first(d.baseline, {"lr": 10.0**-i}) for i in range(6))}
    ledgers = [Ledger(url, "s") for _ in range(2)]
    # Both offer at once, without having seen what the other has.
    for ledger in ledgers:
        ledger._trials = lambda *states, real=ledger._trials: [] if len(states) == 3 else real(*states)  # type: ignore
        ledger.offer(runs.items())
        del ledger._trials
    claims = []
    for i in range(20):
        if claim := ledgers[i % 2].claim(runs):
            claims.append((ledgers[i % 2], claim))
    assert sorted(claim.key for _, claim in claims) == sorted(runs)
    for ledger, claim in claims[1:]:
        ledger.finish(claim, outcome(1.0))
    claims[0][0].release(claims[0][1])
    assert ledgers[0].results().keys() == ledgers[1].results().keys() == runs.keys() - {claims[0][1].key}
    ledgers[1].offer(runs.items())
    again = ledgers[0].claim(runs)
    assert again is not None
    assert again.key == claims[0][1].key


def test_a_database_that_cannot_be_used(monkeypatch: Any) -> None:
    monkeypatch.setattr(ledger_module, "_ATTEMPTS", 1)
    with pytest.raises(ValueError, match=r"storage sqlite:////nowhere/at/all.db cannot be used"):
        Ledger("sqlite:////nowhere/at/all.db", "s")


@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_runs_that_are_claimed_at_the_same_moment(tmp_path: Path, kind: str) -> None:
    """Optuna alone lets two users of an SQLite file take the same trial."""
    url = str(tmp_path / "study.log") if kind == "file" else f"sqlite:///{tmp_path / 'study.db'}"
    d = design()
    runs = {run.key("t"): run for run in (d.first(d.baseline, {"lr": 1.5**-i}) for i in range(20))}
    ledgers = [Ledger(url, "s") for _ in range(3)]
    ledgers[0].offer(runs.items())
    taken: list[str] = []

    def take(ledger: Ledger) -> None:
        while claim := ledger.claim(runs):
            taken.append(claim.key)
            ledger.finish(claim, outcome(1.0))

    threads = [threading.Thread(target=take, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(runs)


@pytest.mark.parametrize("end", ["half a line", "a line without its end", "nothing"])
def test_a_file_that_was_cut_off_is_mended(tmp_path: Path, end: str) -> None:
    path = tmp_path / "study.log"
    d = design()
    run = d.first(d.baseline, {"lr": 0.1})
    ledger = Ledger(str(path), "s")
    ledger.offer([(run.key("t"), run)])
    claim = ledger.claim([run.key("t")])
    assert claim is not None
    ledger.finish(claim, outcome(1.0))
    with path.open("ab") as file:
        file.write({"half a line": b'{"op_code":4,"wor', "a line without its end": b"{}", "nothing": b""}[end])
    after = Ledger(str(path), "s")
    after.note("a", 1)
    assert after.results()[run.key("t")]["score"] == 1.0
    assert Ledger(str(path), "s").noted("a") == 1


def test_runs_of_a_dead_process_are_given_up_at_once(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    code = f"""
import os, signal
from lightning_optim.compare.ledger import Ledger
from lightning_optim.compare.design import Run
ledger = Ledger({str(path)!r}, "s")
run = Run("AdamW", "AdamW", {{"lr": 0.1}}, 1, None, "tuning")
ledger.offer([("k", run)])
assert ledger.claim(["k"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    ledger = Ledger(str(path), "s")
    assert ledger.claim(["k"]) is None
    assert ledger.recover() == 1
    ledger.offer([("k", Run("AdamW", "AdamW", {"lr": 0.1}, 1, None, "tuning"))])
    assert ledger.claim(["k"]) is not None
    assert ledger.recover() == 0  # what this process does itself


# --- processes --------------------------------------------------------------------------------------------------------


class Deadly(Formula):
    """Ends its own process at one run, and prints in all."""

    def train(self, run: Run) -> dict[str, Any]:
        print("this would break the answers if it were among them")
        if run.seed == 13:
            import os

            os._exit(7)
        if run.seed == 14:
            raise RuntimeError("as the user's code may")
        return super().train(run)


def test_a_worker_makes_many_runs_and_a_crash_loses_one(tmp_path: Path) -> None:
    run = Run("AdamW", "AdamW", {"lr": 0.001}, 1, None, "tuning")
    with executor("local", Deadly(), 1, tmp_path) as workers:
        assert workers.describe().result()["fingerprint"] == "1"
        futures = [
            workers.train(Run("AdamW", "AdamW", {"lr": 0.001}, seed, None, "tuning")) for seed in (12, 13, 14, 15)
        ]
        assert futures[0].result()["status"] == "ok"
        with pytest.raises(WorkerDied, match="status 7"):
            futures[1].result()
        failed = futures[2].result()
        assert (failed["status"], failed["message"]) == ("failed", "RuntimeError: as the user's code may")
        assert futures[3].result()["status"] == "ok"
        begun = time.perf_counter()
        assert workers.train(run).result()["status"] == "ok"
        assert time.perf_counter() - begun < 1  # warm: no import of torch
    assert "this would break" in (tmp_path / "worker-0.log").read_text()


def test_comparisons_are_values() -> None:
    d = design()
    tunings = tuned(d, parabola)
    for t in tunings:
        t.finals = {as_key(chosen): t.costs[as_key(chosen)] for chosen in t.finalists}
    task = Formula()
    runs = [(r, task.train(r)) for t in tunings for r in d.runs(t.contender, t.best or {}, "reporting")]
    assert Comparison.of("t", d, tunings, runs, {}) == Comparison.of("t", d, tunings, runs, {})
