from __future__ import annotations

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_optim.diagnostics.event_files import read_folder, record_summary


def test_scalars_of_every_kind_of_step_and_name(tmp_path):
    """Steps and lengths that need one byte and several; TensorBoard's own reader is the reference."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = [0, 1, 127, 128, 300, 70_000, 2**31, 2**40]
    tags = ["x", "a/b", "long/" + "n" * 93, "long/" + "n" * 98, "long/" + "n" * 140, "longest/" + "n" * 300, "größe/é"]
    writer = SummaryWriter(tmp_path)
    for tag in tags:
        for step in steps:
            writer.add_scalar(tag, step * 1.5, step)
    writer.add_scalar("new", 2.5, 3, new_style=True)  # a tensor of one number
    writer.add_text("words", "not a number", 1)
    writer.add_histogram("histogram", np.arange(9.0), 1)
    writer.close()
    reference = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    scalars, records = read_folder(tmp_path)
    assert set(scalars) == {*tags, "new"}
    assert records == ()
    for tag in tags:
        expected = reference.Scalars(tag)
        assert scalars[tag] == ([e.step for e in expected], [e.value for e in expected])
    assert scalars["new"] == ([3], [2.5])


def test_a_file_that_is_still_being_written(tmp_path):
    writer = SummaryWriter(tmp_path)
    for step in range(5):
        writer.add_scalar("x", step, step)
    writer.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut in (1, 10, 30, len(whole) - 4):
        path.write_bytes(whole[:-cut])
        scalars, _ = read_folder(tmp_path)
        assert len(scalars.get("x", ([], []))[0]) < 5


@pytest.mark.parametrize(
    "record", [{"loss": [1.0, 2.5]}, {}, {"\u00e9": {"a": [None, "b"]}}, {"long": list(range(1000))}]
)
def test_records(tmp_path, record):
    writer = SummaryWriter(tmp_path)
    writer.file_writer.add_summary(record_summary(record), 7)
    writer.close()
    assert read_folder(tmp_path) == ({}, ((7, record),))
