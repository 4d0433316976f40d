"""``lightning-optim transfer``: which settings to start from with another optimizer."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import UsageError, explained
from ..invocation import check_options

DESCRIPTION = (
    "Say which settings of an optimizer correspond to those of another. The learning rate is the one with which "
    "updates are as large; with -c or --model and --data this is measured on the model in a few steps, without them on "
    "normal gradients. `lightning-optim compare` finds the best one."
)

#: Arguments that are not those of this command say what is trained.
TAKES_OTHERS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.allow_abbrev = False
    parser.add_argument("--from", dest="source", default="AdamW", metavar="NAME", help="the known one (default: AdamW)")
    parser.add_argument("--lr", type=float, required=True, help="its learning rate")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="its decoupled weight decay (default: 0)")
    parser.add_argument("--to", dest="target", nargs="+", required=True, metavar="NAME", help="the others")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="steps to measure (default: 30)")


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: An argument is wrong.
    """
    check_options(options.others)
    if options.steps < 3:
        raise UsageError(f"--steps must be at least 3, got {options.steps}.")
    module, loss = _task(options.others) if options.others else (None, None)
    from ...compare.transfer import suggest

    with explained():
        for target in options.target:
            found = suggest(options.source, target, options.lr, options.weight_decay, module, loss, options.steps)
            print(found.options)
            for reason in found.reasons:
                print(f"  {reason}")


def _task(args: list[str]) -> tuple[Any, Callable[[Any], Any]]:
    """The module, and its loss on one batch after another."""
    from ..compared import CommandLineTask

    warnings.filterwarnings("ignore", ".*self.log.*")
    cli = CommandLineTask(args).built(["--seed_everything", "1"])
    data, module = cli.datamodule, cli.model
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    batches: Iterator[Any] = iter(())

    def loss(trained: Any) -> Any:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter((data or trained).train_dataloader())
            batch = next(batches)
        result = trained.training_step(batch, 0)
        return result["loss"] if isinstance(result, dict) else result

    return module, loss
