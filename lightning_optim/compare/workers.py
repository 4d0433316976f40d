"""Processes that make runs.

A worker imports torch and Lightning once and makes one run after another, since starting takes longer than many a run.
Each worker makes one run at a time; when it dies, the run it was at is lost, and another worker takes its place.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from .design import Run

__all__ = ["Executor", "Task", "WorkerDied", "executor"]


class Task(Protocol):
    """Something that can be trained with any optimizer. It is pickled, and used in other processes."""

    name: str

    def describe(self) -> dict[str, Any]:
        """Settings that are reported, and the ``fingerprint`` of all that results depend on beside the optimizer.

        Raises:
            ValueError: A setting is wrong.
        """

    def train(self, run: Run) -> dict[str, Any]:
        """Make a run."""


class WorkerDied(RuntimeError):
    """The process of a run ended in the middle of it: killed, out of memory, or crashed."""


class Executor(Protocol):
    """Makes runs side by side."""

    jobs: int

    def describe(self) -> Future[dict[str, Any]]:
        """The task's own description."""

    def train(self, run: Run) -> Future[dict[str, Any]]:
        """Make a run. What is wrong with it is its result, ``{"status": "failed", ...}``."""


@contextmanager
def executor(kind: Literal["local", "ray"], task: Task, jobs: int, logs: Path) -> Iterator[Executor]:
    """Processes on this machine, or on a Ray cluster.

    Args:
        kind: Which of the two.
        task: What is trained.
        jobs: How many at a time.
        logs: Folder for what local workers print.
    """
    if kind == "ray":
        with _ray(task, jobs) as made:
            yield made
        return
    local = _Local(task, jobs, logs)
    try:
        yield local
    finally:
        local.close()


# --- local ------------------------------------------------------------------------------------------------------------


class _Worker:
    """One process, which answers requests."""

    def __init__(self, task: bytes, number: int, jobs: int, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"worker-{number}.log"
        threads = max((os.cpu_count() or 1) // jobs, 1)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if gpus := _gpus():
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from lightning_optim.compare.workers import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the study, which ends its workers.
            )
        self._send((sys.path, task, threads))

    def ask(self, request: Any) -> Any:
        self._send(request)
        try:
            assert self.process.stdout is not None
            answer = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.close()
            code = self.process.returncode
            raise WorkerDied(f"its process ended with status {code}; what it printed is in {self.log}") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            pickle.dump(value, self.process.stdin)
            self.process.stdin.flush()
        except OSError:  # It has ended, which the next answer shows.
            return

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class _Local:
    def __init__(self, task: Task, jobs: int, logs: Path) -> None:
        import cloudpickle  # takes classes of notebooks, too

        self.jobs = jobs
        self._task = cloudpickle.dumps(task)
        self._logs = logs
        self._pool = ThreadPoolExecutor(jobs)
        # The last one that was used comes first: it is warm, and the first run, which is timed, is not its start.
        self._free: queue.LifoQueue[int] = queue.LifoQueue()
        self._workers: dict[int, _Worker] = {}
        for number in reversed(range(jobs)):
            self._free.put(number)
        self._closed = False

    def describe(self) -> Future[dict[str, Any]]:
        return self._pool.submit(self._ask, "describe")

    def train(self, run: Run) -> Future[dict[str, Any]]:
        return self._pool.submit(self._ask, run)

    def _ask(self, request: Any) -> Any:
        number = self._free.get()
        try:
            worker = self._workers.get(number)
            if worker is None or worker.process.poll() is not None:
                if self._closed:
                    raise WorkerDied("the study ended")
                worker = self._workers[number] = _Worker(self._task, number, self.jobs, self._logs)
            return worker.ask(request)
        finally:
            self._free.put(number)

    def close(self) -> None:
        self._closed = True
        for worker in self._workers.values():
            worker.close()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _gpus() -> list[str]:
    """The GPUs that may be used, without starting CUDA in this process."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def default_jobs() -> int:
    """One run for each GPU, else for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return len(_gpus()) or cores or 1


def serve() -> None:
    """What a worker does: answers the requests on its standard input until that is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What the run prints goes to the log.
    source = sys.stdin.buffer
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                requests.put(pickle.load(source))
        except BaseException:
            os._exit(1)  # The study has ended or was killed, and so is of no use what is being done for it.

    path, pickled, threads = pickle.load(source)
    sys.path[:] = path
    threading.Thread(target=listen, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    task: Any = pickle.loads(pickled)
    while True:
        request = requests.get()
        try:
            answer = task.describe() if request == "describe" else make(task, request, threads)
        except Exception as error:
            traceback.print_exc()
            answer = error
        try:
            data = pickle.dumps(answer)
        except Exception:
            data = pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
        answers.write(data)
        answers.flush()


def make(task: Task, run: Run, threads: int | None = None) -> dict[str, Any]:
    """Make a run; an error becomes its result."""
    import gc
    import time

    import torch

    begun = time.perf_counter()
    try:
        outcome = task.train(run)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        outcome = {"status": "failed", "score": None, "message": f"{type(error).__name__}: {error}".strip()[:500]}
    finally:
        if threads:  # A task may set its own.
            torch.set_num_threads(threads)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {**outcome, "seconds": time.perf_counter() - begun}


# --- Ray --------------------------------------------------------------------------------------------------------------


@contextmanager
def _ray(task: Task, jobs: int) -> Iterator[Executor]:
    try:
        import ray
    except ImportError as error:
        raise ValueError("--executor ray needs Ray: pip install 'lightning-optim[ray]'.") from error
    began = not ray.is_initialized()
    if began:
        # RAY_ADDRESS names a cluster; without it one is started on this machine.
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"RAY_DEDUP_LOGS": "0"}})
    threads = max((os.cpu_count() or 1) // jobs, 1)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    path = list(sys.path)
    import cloudpickle

    pickled = ray.put(cloudpickle.dumps(task))

    @ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)
    def ask(pickled: bytes, request: Any) -> Any:
        import torch

        sys.path[:0] = [entry for entry in path if entry not in sys.path]
        torch.set_num_threads(threads)
        told: Any = pickle.loads(pickled)
        return told.describe() if request == "describe" else make(told, request, threads)

    class OnRay:
        def __init__(self) -> None:
            self.jobs = jobs

        def describe(self) -> Future[dict[str, Any]]:
            return ask.remote(pickled, "describe").future()

        def train(self, run: Run) -> Future[dict[str, Any]]:
            return ask.remote(pickled, run).future()

    try:
        yield OnRay()
    finally:
        if began:
            ray.shutdown()
