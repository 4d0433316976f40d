"""What a run is called, and the folder that it writes to: ``ROOT/TASK/NAME``, as ``runs/digits/NAMO-lr0.012-s1``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ..callbacks import tensorboard
from ..diagnostics.charts import LEARNING


def run_name(optimizer: str, lr: Any, seed: Any) -> str:
    """The default name of a run.

    Args:
        optimizer: Name or class path of its optimizer, or what else tells it from others.
        lr: Its learning rate, left out where it is no number.
        seed: Its seed, left out where there is none.

    Example:
        >>> run_name("lightning_optim.NAMO", 0.012, 1), run_name("SGD", None, False)
        ('NAMO-lr0.012-s1', 'SGD')
    """
    parts = [optimizer.rpartition(".")[2]]
    if isinstance(lr, (int, float)) and not isinstance(lr, bool):
        parts.append(f"lr{lr:g}")
    if isinstance(seed, int) and not isinstance(seed, bool):
        parts.append(f"s{seed}")
    return "-".join(parts)


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger in the folder of a run.

    The folder is made when it is needed, by the first rank alone. Where there is one of the name already, the run is
    called ``NAME-2``, then ``NAME-3``, and so on: no run writes into the folder of another, also if both begin at the
    same time.

    Args:
        root: Folder of all runs.
        task: Folder of the runs of a task, in it.
        run: Name of the run.
        exists: Whether the run is there and goes on.
    """

    def __init__(self, root: str | Path, task: str, run: str, exists: bool = False) -> None:
        super().__init__(save_dir=root, name=task, default_hp_metric=False)
        self._run = run
        self._made = exists
        self._described: set[str] = set()

    @property
    def version(self) -> str:
        """Name of the run."""
        if not self._made and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._run = _make_folder(os.path.expanduser(os.path.expandvars(self.root_dir)), self._run)
            self._made = True
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Record the settings of the run in ``hparams.yaml`` and on TensorBoard's page HPARAMS."""
        super().log_hyperparams(params, metrics, step)
        self._write(*session_start(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values, the first of each tag that is known with a description."""
        super().log_metrics(tensorboard.log_described(self, metrics, step, _description, self._described), step)

    @rank_zero_only
    def log_outcome(self, outcome: Mapping[str, float], step: int, ended: bool | None = None) -> None:
        """Record how the run goes (:data:`OUTCOMES`) on the page HPARAMS.

        Args:
            outcome: Values by tag.
            step: Number of optimizer steps so far.
            ended: Whether the run has come to its end, ``False`` where an error has ended it, ``None`` if it goes on.
        """
        self.log_metrics(outcome, step)
        if ended is not None:
            self._write(session_end(ended))

    def _write(self, *summaries: Any) -> None:
        for summary in summaries:
            self.experiment.file_writer.add_summary(summary)


def _description(tag: str) -> str:
    if tag in OUTCOMES:
        return OUTCOMES[tag][1]
    return next((chart.description for chart in LEARNING.values() if chart.shows(tag)), "")


def _make_folder(parent: str, name: str) -> str:
    """Make a folder that is not there yet. Returns its name."""
    files = get_filesystem(parent)
    files.makedirs(parent, exist_ok=True)
    for i in itertools.count(1):
        candidate = name if i == 1 else f"{name}-{i}"
        try:
            files.mkdir(f"{parent}/{candidate}", create_parents=False)
        except FileExistsError:
            continue
        break
    return candidate


# --- the page HPARAMS of TensorBoard ----------------------------------------------------------------------------------

#: Settings with columns of other names. TensorBoard sorts columns by name, and shows the first five unless told
#: otherwise: these, after "optimizer", since a space comes before a slash.
_COLUMNS = {
    "optimizer/lr": "optimizer lr",
    "optimizer/fallback_lr": "optimizer lr of fallback",
    "lr_scheduler": "optimizer schedule",
    "optimizer/weight_decay": "optimizer weight decay",
}
#: Columns that come first.
_FIRST = (
    "optimizer", *_COLUMNS.values(), "optimizer/fallback", "optimizer/fallback_weight_decay", "seed",
    "validation_metric",
)  # fmt: skip

#: How a run went: scalars by tag, with the words for them.
OUTCOMES = {
    "outcome/validation_best": ("best validation", "Best value so far of the run's validation metric."),
    "outcome/validation_last": ("last validation", "Last value of the run's validation metric."),
    "outcome/train_loss": ("train loss", "Mean loss of the last 50 training batches."),
    "outcome/steps_per_second": ("steps/s", "Optimizer steps per second of training, validation left out."),
}


def session_start(settings: Mapping[str, Any]) -> list[Any]:
    """Summaries that tell TensorBoard's page HPARAMS of a run's settings, and by what to compare runs.

    TensorBoard takes the columns of all runs from one of them, so that the first ones are the same for every run.
    """
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    named = {_COLUMNS.get(name, name): value for name, value in settings.items()}
    start = plugin_data_pb2.SessionStartInfo()
    experiment = api_pb2.Experiment()
    for name in dict.fromkeys([*_FIRST, *named]):
        value = named.get(name)
        kind = api_pb2.DATA_TYPE_STRING
        if isinstance(value, bool):
            start.hparams[name].bool_value, kind = value, api_pb2.DATA_TYPE_BOOL
        elif isinstance(value, (int, float)):
            start.hparams[name].number_value, kind = value, api_pb2.DATA_TYPE_FLOAT64
        elif value is not None:
            start.hparams[name].string_value = str(value)
        elif any(word in name for word in ("lr", "decay", "seed")):
            kind = api_pb2.DATA_TYPE_FLOAT64
        # Columns that are said to differ stand before all others.
        experiment.hparam_infos.add(name=name, type=kind, differs=name in _FIRST)
    for tag, (name, about) in OUTCOMES.items():
        experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag), display_name=name, description=about)
    return [_summary(experiment=experiment), _summary(session_start_info=start)]


def session_end(succeeded: bool) -> Any:
    """A summary that tells TensorBoard's page HPARAMS that a run has ended."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    return _summary(session_end_info=plugin_data_pb2.SessionEndInfo(status=status))


def _summary(**content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    ((kind, _),) = content.items()
    tags = {
        "experiment": metadata.EXPERIMENT_TAG,
        "session_start_info": metadata.SESSION_START_INFO_TAG,
        "session_end_info": metadata.SESSION_END_INFO_TAG,
    }
    data = plugin_data_pb2.HParamsPluginData(**content)
    return Summary(value=[Summary.Value(tag=tags[kind], metadata=metadata.create_summary_metadata(data))])
