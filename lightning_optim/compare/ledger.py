"""The runs of a study and their results, in a storage of Optuna that any number of processes share.

A run is a trial of one Optuna study, found by the key of all that its result depends on. Runs are offered as waiting
trials, and Optuna lets exactly one process take each. Where two processes have offered the same run at once, the trial
with the lower number counts.
"""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from .design import Run

__all__ = ["Claim", "Ledger"]

#: A process on another machine that has not shown a sign of life for so many seconds is taken for dead.
PATIENCE = 90.0
_BEAT = 15.0
_ATTEMPTS = 5


class _Lock(JournalFileOpenLock):
    """A lock that the system releases when its process is killed; the half of a line that is then left is removed."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._lock = FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


#: The ledgers of this process, of which a notebook may have had several.
_OPEN: set[str] = set()


@dataclass(frozen=True)
class Claim:
    """A run that this process, and no other, is to make."""

    trial: optuna.Trial
    key: str


class Ledger:
    """The runs of a study.

    Args:
        url: Address of a database, as ``sqlite:///study.db`` or ``postgresql://...``, or the path of a file.
        name: Name of the study in it.
    """

    def __init__(self, url: str, name: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage: Any
        # Optuna locks the row of a trial while it takes it, which SQLite cannot: two processes may take the same.
        self._taking: AbstractContextManager[Any] = nullcontext()
        if "://" in url:
            storage = _database(url)
            if url.startswith("sqlite"):
                self._taking = FileLock(f"{make_url(url).database}.lock")
        else:
            path = Path(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))
        self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self._begun = len(self._study.get_trials(deepcopy=False))
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}:{uuid.uuid4().hex[:8]}"
        _OPEN.add(self._owner)
        self._beats = 0
        self._last_beat = -math.inf
        self._seen: dict[str, tuple[Any, float]] = {}  # of other processes: the last sign of life, and when it was seen

    def close(self) -> None:
        """Take no more runs. Those that are still claimed are free for others."""
        _OPEN.discard(self._owner)

    # --- results ------------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, dict[str, Any]]:
        """Results by key. What failed before this process began is tried again."""
        done = self._trials(TrialState.COMPLETE)
        done += [trial for trial in self._trials(TrialState.FAIL) if trial.number >= self._begun]
        return {t.user_attrs["key"]: t.user_attrs["outcome"] for t in reversed(done) if "outcome" in t.user_attrs}

    def finish(self, claim: Claim, outcome: Mapping[str, Any]) -> None:
        """Keep the result of a run."""
        # Another process may have taken this one for dead, as after a machine slept, and have given the run up.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            claim.trial.set_user_attr("outcome", dict(outcome))
            if outcome["status"] == "failed":
                self._study.tell(claim.trial, state=TrialState.FAIL)
                return
            score = outcome["score"]
            self._study.tell(claim.trial, math.inf if score is None else score)

    def release(self, claim: Claim) -> None:
        """Give a run up that was not finished."""
        self._study.tell(claim.trial, state=TrialState.FAIL, skip_if_finished=True)

    def note(self, name: str, value: Any) -> Any:
        """Keep a value for all who share the study, unless there is one; the one that is kept."""
        kept = self._study.user_attrs
        if name not in kept:
            self._study.set_user_attr(name, value)
            kept = self._study.user_attrs
        return kept[name]

    def noted(self, name: str) -> Any:
        """A value that was kept, or ``None``."""
        return self._study.user_attrs.get(name)

    # --- runs ---------------------------------------------------------------------------------------------------------

    def offer(self, runs: Iterable[tuple[str, Run]]) -> None:
        """Add those runs that nobody has made, makes or has offered."""
        live = {t.user_attrs.get("key") for t in self._trials(*_LIVE)}
        for key, run in runs:
            if key in live:
                continue
            live.add(key)
            rate = float(run.args["lr"])
            self._study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params={"lr": rate, "seed": run.seed},
                    distributions={"lr": FloatDistribution(1e-30, 1e30, log=True), "seed": IntDistribution(0, 2**31)},
                    user_attrs={"key": key, "run": asdict(run)},
                )
            )

    def claim(self, keys: Iterable[str]) -> Claim | None:
        """Take one of the offered runs with these keys, or none if there is none left to take."""
        wanted = {*keys}
        while any(t.user_attrs.get("key") in wanted for t in self._trials(TrialState.WAITING)):
            with self._taking:
                trial = self._study.ask()
            key = trial.user_attrs.get("key")
            earlier = [t for t in self._trials(*_LIVE) if t.user_attrs.get("key") == key and t.number < trial.number]
            # A run that is not wanted is one of another design; who wants it offers it again.
            if key is None or earlier or key not in wanted:
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("owner", self._owner)
            return Claim(trial, key)
        return None

    def recover(self) -> int:
        """Give up the runs of processes that have died, so that they are offered again; how many there were."""
        found = 0
        for trial in self._trials(TrialState.RUNNING):
            owner = trial.user_attrs.get("owner")
            if owner == self._owner or self._is_alive(owner or f"trial {trial.number}", owner):
                continue
            with suppress(ValueError):  # Another process was faster.
                self._study.tell(trial.number, state=TrialState.FAIL)
                found += 1
        return found

    def beat(self) -> None:
        """Show the other processes that this one is alive."""
        if time.monotonic() - self._last_beat > _BEAT:
            self._last_beat = time.monotonic()
            self._beats += 1
            self._study.set_user_attr(f"beat {self._owner}", self._beats)

    def _is_alive(self, label: str, owner: str | None) -> bool:
        if owner is not None:
            host, pid, started, _ = owner.rsplit(":", 3)
            if host == socket.gethostname():
                if int(pid) == os.getpid():
                    return owner in _OPEN
                return _started(int(pid)) == started
        beat = self._study.user_attrs.get(f"beat {owner}")
        last, since = self._seen.get(label, (None, 0.0))
        if label not in self._seen or last != beat:
            self._seen[label] = (beat, time.monotonic())
            return True
        return time.monotonic() - since < PATIENCE

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)


def _database(url: str) -> RDBStorage:
    """A database, whose tables another process may be making at the same time.

    Raises:
        ValueError: It cannot be used.
    """
    settings = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    for _ in range(_ATTEMPTS - 1):
        with suppress(DBAPIError):
            return RDBStorage(url, engine_kwargs=settings)
        time.sleep(1)
    try:
        return RDBStorage(url, engine_kwargs=settings)
    except (ImportError, SQLAlchemyError) as error:
        raise ValueError(f"storage {url} cannot be used: {error}") from error


_LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)


def _started(pid: int) -> str:
    """When a process of this machine was started, in the system's own units; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:  # no Linux: that a process has the number must do
        os.kill(pid, 0)
    except OSError:
        return ""
    return "running"
