"""From a task and a design to the results of all runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .design import Decay, Design, Rates, Run, contenders, digest
from .ledger import Claim, Ledger
from .result import Comparison
from .search import Tuning, as_key, next_trials
from .workers import Executor, Task, WorkerDied, default_jobs, executor

__all__ = ["StudyError", "compare", "run_study"]

#: Steps of the short runs that tell how long the steps of an optimizer take.
_PROBE = 20


class StudyError(ValueError):
    """A study cannot be made as it was asked for."""


def compare(
    model: Callable[[], Any],
    data: Callable[[], Any] | None = None,
    optimizers: Sequence[str] = ("AdamW", "MVNGrad", "NAMO"),
    *,
    lr: str | None = None,
    trials: int = 7,
    seeds: int = 5,
    tuning_seeds: int = 3,
    steps: int | None = None,
    budget: float | None = None,
    also: Mapping[str, tuple[float, float]] | None = None,
    search: Literal["grid", "tpe"] | None = None,
    weight_decay: float | None = 0.01,
    decay: Decay = "decoupled",
    metric: str | None = None,
    mode: Literal["min", "max"] = "min",
    study: str | Path | None = None,
    storage: str | None = None,
    jobs: int | None = None,
    executor: Literal["local", "ray"] = "local",
    trainer: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Comparison:
    """Find out which optimizer is better on a model, tuning all of them equally.

    Every optimizer is tuned on its own seeds, and then trained with its best setting on the reporting seeds, which are
    the same for all: runs of a seed have the same initial weights and the same order of data. See ``docs/compare.md``
    for what makes the comparison fair and how to read the result.

    Results are kept in the study's folder, and the same call goes on where it was ended.

    Args:
        model: Makes a LightningModule: a class, a ``functools.partial``, a function. Its own ``configure_optimizers``
            says which parameters are trained, how their rates compare, and the course of the schedule, as with
            :class:`~lightning_optim.callbacks.OptimizerSwap`.
        data: Makes a LightningDataModule. Default: the module has its own dataloaders.
        optimizers: Names, or dotted paths of any torch optimizers, perhaps with arguments, as in
            ``"NAMO:scale=0.4"``. AdamW is always among them.
        lr: Learning rates of all, as ``"1e-4:1e-1:x2"``. Default: ``trials`` rates around that of each one's
            declaration, each twice the one before.
        trials: Settings that are tried of each optimizer, before the range is extended.
        seeds: Reporting runs of each optimizer.
        tuning_seeds: Runs of each of the three best settings of an optimizer; the others have one.
        steps: Length of a run. Default: what ``trainer`` says.
        budget: Seconds that the study may take. The largest design that fits is used.
        also: Ranges of further hyperparameters to search, as ``{"weight_decay": (1e-3, 1.0)}``; ``fallback_ratio`` is
            the learning rate of an optimizer's fallback rule over that of its matrices.
        search: ``"grid"`` over the learning rate, or ``"tpe"``. Default: ``"tpe"`` where there is ``also``.
        weight_decay: Of all optimizers; ``None`` for each one's own default.
        decay: ``"decoupled"`` weight decay wherever an optimizer can, or each one's ``"own"`` form.
        metric: What is compared, a metric that is logged in validation. Default: its loss, else that of training.
        mode: Whether the metric is to be small or large.
        study: Folder. Default: ``comparisons/`` and the name of the model.
        storage: Address of a database that several machines share; see Optuna. Default: a file in the folder.
        jobs: Runs at a time, among which the cores are shared out. Default: one per GPU, else one per core.
        executor: Where runs are made.
        trainer: Arguments of the Trainer.
        quiet: Print nothing.

    Returns:
        The result, with ``table()``, ``plot()``, ``to_frame()`` and ``write(folder)``.

    Raises:
        ValueError: An argument is wrong.
    """
    design = Design(
        tuple(contenders(optimizers, weight_decay, decay)),
        trials=trials,
        most_trials=2 * trials,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        steps=steps,
        rates=Rates.parse(lr) if lr else None,
        search=search or ("tpe" if also else "grid"),
        also=dict(also or {}),
        metric=metric,
        mode=mode,
    )
    from .task import ModuleTask  # here, because it imports Lightning

    task = ModuleTask(model, data, trainer or {})
    folder = Path(study) if study else Path("comparisons") / task.name
    return run_study(task, design, folder, storage, budget, jobs, executor, Console(quiet=quiet, stderr=True))


def run_study(
    task: Task,
    design: Design,
    folder: Path,
    storage: str | None = None,
    budget: float | None = None,
    jobs: int | None = None,
    where: Literal["local", "ray"] = "local",
    console: Console | None = None,
    command: str = "",
) -> Comparison:
    """Make all runs of a design that have not been made, and write the report.

    Args:
        task: What is trained.
        design: On which terms.
        folder: Folder of the study.
        storage: Address of a database. Default: a file in the folder.
        budget: Seconds that the study may take.
        jobs: Runs at a time.
        where: ``local`` or ``ray``.
        console: Where the plan and the progress are shown.
        command: The command line, for the report.

    Raises:
        StudyError: The baseline cannot be trained, or nothing fits the budget.
    """
    console = console or Console(stderr=True)
    place = (storage, str(folder)) if storage else (str(folder / "study.log"), "compare")
    with closing(Ledger(*place)) as ledger, executor(where, task, jobs or default_jobs(), folder / "logs") as workers:
        try:
            described = workers.describe().result()
        except WorkerDied as error:
            raise StudyError(f"{task.name} cannot be built: {error}.") from error
        study = _Study(design, described.pop("fingerprint"), ledger, workers, console)
        study.begin(budget)
        comparison = study.finish(task.name, described, command)
    comparison.write(folder)
    return comparison


@dataclass
class _Study:
    design: Design
    task: str
    ledger: Ledger
    workers: Executor
    console: Console

    # --- plan ---------------------------------------------------------------------------------------------------------

    def begin(self, budget: float | None) -> None:
        """Say what is known, time one run, print the plan, and make the design fit the budget."""
        console = self.console
        if lost := self.ledger.recover():
            console.print(f"Made again, because their process ended: {lost} {_runs(lost)}.")
        results = self.ledger.results().values()
        if mine := sum(outcome["task"] == self.task for outcome in results):
            console.print(f"The study goes on, with {mine} {_runs(mine)} made so far.")
        if others := len(results) - mine:
            console.print(f"{others} {_runs(others)} of other settings of the task, or of another version of the code.")
        asked = digest(self.task, str(self.design), budget)
        settled = self.ledger.noted(f"design {asked}")
        if settled:
            self.design = replace(self.design, **settled)
        times = self._times()
        if budget and not settled:
            self.design = self._fitting(budget, times)
            kept = {name: getattr(self.design, name) for name in ("trials", "most_trials", "seeds")}
            self.design = replace(self.design, **self.ledger.note(f"design {asked}", kept))
        self._print_plan(times)

    def _times(self) -> dict[str, float]:
        """Seconds of one run of each contender: one run of the baseline, and a few steps of the others."""
        base = self.design.baseline
        rates = self.design.first_rates(base)
        run = self.design.first(base, {"lr": rates[(len(rates) - 1) // 2]})
        if self.design.search == "tpe":
            tuning = Tuning(base)
            chosen = next_trials(self.design, [tuning])[0][1]
            run = self.design.first(base, chosen)
        with self.console.status(f"One run of {base.name}, to know how long it takes ..."):
            results = self._make({run.key(self.task): run})
        measured = results[run.key(self.task)]
        if measured["status"] == "failed":
            raise StudyError(f"{base.name} cannot be trained: {measured['message']}")
        steps = measured["steps"]
        known = [outcome for outcome in self.ledger.results().values() if outcome.get("steps") == steps]
        times = {base.name: median(o["seconds"] for o in known if o["contender"] == base.name)}
        probes: dict[str, Future[dict[str, Any]]] = {}
        for contender in self.design.contenders[1:]:
            if before := [outcome["seconds"] for outcome in known if outcome["contender"] == contender.name]:
                times[contender.name] = median(before)
                continue
            short = self.design.first(contender, {"lr": contender.start})
            probes[contender.name] = self.workers.train(replace(short, steps=min(_PROBE, steps), metric=None))
        with self.console.status("A few steps of the others ..."):
            for name, probe in probes.items():
                with suppress(WorkerDied):
                    per_step = probe.result().get("step_ms", measured["step_ms"])
                    extra = steps * (per_step - measured["step_ms"]) / 1000
                    times[name] = max(measured["seconds"] + extra, measured["seconds"] / 10)
                times.setdefault(name, measured["seconds"])
        return times

    def _seconds(self, design: Design, times: Mapping[str, float]) -> float:
        return sum(times[c.name] * design.count(c) for c in design.contenders) / self.workers.jobs

    def _fitting(self, budget: float, times: Mapping[str, float]) -> Design:
        """The largest design that fits, with a quarter of the time left for extensions of the range."""
        for design in [self.design, *self.design.smaller()]:
            if 1.25 * self._seconds(design, times) <= budget:
                if design is not self.design:
                    self.console.print(
                        f"[bold]The largest design that fits {_duration(budget)}[/]: {design.trials} trials and "
                        f"{design.seeds} reporting seeds of each optimizer."
                    )
                return design
        least = self.design.smaller()[-1] if self.design.smaller() else self.design
        needed = 1.25 * self._seconds(least, times)
        raise StudyError(
            f"Nothing fits a budget of {_duration(budget)}: {least.trials} trials and {least.seeds} seeds take about "
            f"{_duration(needed)}. Use that budget, about {budget / needed:.0%} of the steps, or fewer optimizers."
        )

    def _print_plan(self, times: Mapping[str, float]) -> None:
        design = self.design
        self.console.print(f"[bold]Plan[/], with {self.workers.jobs} at a time:")
        for contender in design.contenders:
            rates = design.first_rates(contender)
            details = [f"weight decay {contender.decay}"] if contender.decay else []
            if contender.fallback_ratio is not None:
                details.append(f"fallback's rate {contender.fallback_ratio:g} of it")
            missing = [name for name in design.also if name not in contender.searchable]
            details += [f"no {name} to search" for name in missing]
            span = (
                ", ".join(f"{rate:g}" for rate in rates) if design.search == "grid" else f"{rates[0]:g}..{rates[-1]:g}"
            )
            self.console.print(
                f"  {contender.name}: {design.count(contender)} runs x {times[contender.name]:.1f} s; lr {span}"
                + (f" ({'; '.join(details)})" if details else ""),
                highlight=False,
            )
        seconds = self._seconds(design, times)
        self.console.print(
            f"  Together about {_duration(seconds)}. Where the best rate lies on the edge the range is extended, to at "
            f"most {design.most_trials} trials of each, which adds up to {_duration(self._extra(times))}.",
            highlight=False,
        )

    def _extra(self, times: Mapping[str, float]) -> float:
        design = self.design
        added = {c.name: max(design.most_trials - len(design.first_rates(c)), 0) for c in design.contenders}
        return sum(times[name] * count for name, count in added.items()) / self.workers.jobs

    # --- runs ---------------------------------------------------------------------------------------------------------

    def finish(self, name: str, settings: Mapping[str, Any], command: str) -> Comparison:
        """Make all runs."""
        design = self.design
        tunings = [Tuning(contender) for contender in design.contenders]
        planned = sum(map(design.count, design.contenders))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(compact=True),
        )
        used: dict[str, tuple[Run, dict[str, Any]]] = {}
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task("tuning", total=planned)

            def make(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
                wanted = {run.key(self.task): run for run in runs}
                results = self._make(wanted, lambda key: progress.update(bar, advance=key not in used))
                used.update({key: (run, results[key]) for key, run in wanted.items()})
                return results

            while trials := next_trials(design, tunings):
                firsts = [(tuning, chosen, design.first(tuning.contender, chosen)) for tuning, chosen in trials]
                added = sum(max(len(t.tried) - len(design.first_rates(t.contender)), 0) for t in tunings)
                progress.update(bar, total=planned + added)
                results = make([run for _, _, run in firsts])
                for tuning, chosen, run in firsts:
                    outcome = results[run.key(self.task)]
                    tuning.costs[as_key(chosen)] = design.cost(outcome["score"])
                    if outcome["status"] == "failed" and not tuning.dropped:
                        tuning.dropped = outcome["message"]
                        progress.console.print(f"[yellow]{tuning.contender.name} is out:[/] {tuning.dropped}")
            if design.tuning_seeds > 1:
                progress.update(bar, description="best rates, further seeds")
                finals = [
                    (tuning, chosen, design.runs(tuning.contender, chosen, "tuning"))
                    for tuning in tunings
                    if not tuning.dropped
                    for chosen in tuning.finalists
                ]
                results = make([run for _, _, runs in finals for run in runs])
                for tuning, chosen, runs in finals:
                    costs = [design.cost(results[run.key(self.task)]["score"]) for run in runs]
                    tuning.finals[as_key(chosen)] = sum(costs) / len(costs)
            if tunings[0].dropped or tunings[0].best is None:
                why = tunings[0].dropped or "all its runs diverged"
                raise StudyError(f"There is nothing to compare with: {design.baseline.name}: {why}.")
            progress.update(bar, description="reporting")
            make(
                [
                    run
                    for tuning in tunings
                    if not tuning.dropped and tuning.best is not None
                    for run in design.runs(tuning.contender, tuning.best, "reporting")
                ]
            )
        return Comparison.of(name, design, tunings, list(used.values()), settings, self.task, command)

    def _make(
        self, wanted: Mapping[str, Run], advance: Callable[[str], None] = lambda key: None
    ) -> dict[str, dict[str, Any]]:
        """Results of runs, of which those that nobody has made are made here or by other processes."""
        running: dict[Future[dict[str, Any]], Claim] = {}
        told: set[str] = set()
        tries: dict[str, int] = {}
        self.ledger.offer(wanted.items())
        try:
            while True:
                results = {key: x for key, x in self.ledger.results().items() if key in wanted}
                for key in results.keys() - told:
                    told.add(key)
                    advance(key)
                if len(results) == len(wanted):
                    return results
                while len(running) < self.workers.jobs:
                    claim = self.ledger.claim(wanted.keys() - results.keys())
                    if claim is None:
                        break
                    running[self.workers.train(wanted[claim.key])] = claim
                self.ledger.beat()
                if not running:  # Others make what is left, or have died at it.
                    time.sleep(0.5)
                    self.ledger.recover()
                    self.ledger.offer((key, run) for key, run in wanted.items() if key not in results)
                    continue
                for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                    claim = running.pop(future)
                    tries[claim.key] = tries.get(claim.key, 0) + 1
                    self._keep(claim, future, wanted[claim.key], tries[claim.key])
        finally:
            for claim in running.values():
                self.ledger.release(claim)

    def _keep(self, claim: Claim, future: Future[dict[str, Any]], run: Run, tries: int) -> None:
        try:
            outcome = future.result()
        except Exception as error:  # The process of the run has ended, here or on a cluster.
            if tries < 2:
                self.ledger.release(claim)
                self.ledger.offer([(claim.key, run)])
                return
            outcome = {"status": "failed", "score": None, "message": f"it crashed twice: {error}", "seconds": 0.0}
        self.ledger.finish(claim, {**outcome, "contender": run.contender, "task": self.task})


def _runs(count: int) -> str:
    return "run" if count == 1 else "runs"


def _duration(seconds: float) -> str:
    """
    >>> _duration(5), _duration(200), _duration(9000)
    ('5 s', '3.3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
