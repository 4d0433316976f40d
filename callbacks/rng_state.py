"""Random numbers, and all else that a run continues with, as if it had not stopped."""

from __future__ import annotations

from .exact_resume import ExactResume


class RNGState(ExactResume):
    """Continues a run exactly where the checkpoint was written.

    Without it, a resumed run starts its dropout and mixup from the seed again. torch's random numbers are those of the
    CPU and of the accelerator that the process uses (CUDA, MPS, XPU, ...). Each rank of a distributed run has its own
    in the checkpoint; one that is resumed on more ranks seeds the additional ones afresh.

    Random numbers are not all. Lightning itself (checked with 2.6.6) skips an epoch when a run with
    ``max_steps`` is resumed from the end of an epoch, loses the gradients of an accumulation that is under way, and
    does not make a validation that was due. This callback writes what is missing into the checkpoint and continues
    there. Where it cannot, a warning says so when the checkpoint is written. It has to be in the Trainer that writes
    and in the one that resumes. The page on checkpoints in the documentation has a table of what is exact.

    :class:`Resume` does the same, and compares hyperparameters.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[RNGState()], accelerator="cpu", logger=False)
    """
