"""``lightning-optim route MODEL``: which parameter of a model gets which rule."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError

DESCRIPTION = (
    "Show which parameters of a model a matrix rule would train. With a batch, run one training step on it, compare "
    "with how the parameters are really used, and print the settings that route by that."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="import path of a class or function that makes the model, such as mine.Model")
    parser.add_argument("--batch", help="import path of a batch, or of a function without arguments that makes one")
    parser.add_argument("--matrix", nargs="+", default=[], metavar="PATTERN", help="as grouping.matrix")
    parser.add_argument("--fallback", nargs="+", default=[], metavar="PATTERN", help="as grouping.fallback")
    parser.add_argument("--heads", nargs="+", default=[], metavar="PATTERN", help="as grouping.heads")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    from ...grouping import Grouping
    from ...routing import routing_table, shares_line
    from ...seen import differences, grouping_line, record_uses

    model = _made("model", options.model)
    grouping = Grouping(matrix=options.matrix, fallback=options.fallback, heads=options.heads)
    seen: dict[str, str] | None = None
    uses: dict[str, Any] = {}
    if options.batch:
        batch = _made("--batch", options.batch)
        with record_uses(model) as uses:
            result = _step(model, batch)
        seen = {name: use.words for name, use in uses.items()}
        for name in _without_gradient(model, result):
            seen[name] = f"{seen.get(name, '')}, no gradient".removeprefix(", ")
    try:
        routes = grouping.route(model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(routing_table(routes.values(), seen))
    print()
    print(shares_line(routes.values(), {"matrix": "The matrix rule", "fallback": "the fallback rule"}))
    if options.batch:
        found = differences(routes, uses)
        for x in found:
            print(f"{x.name} {x.what}, which its route does not say.")
        print(f"To route by what was seen: {grouping_line(found)}" if found else "All are used as they are routed.")


def _made(what: str, path: str) -> Any:
    """What an import path names; a class or function is called."""
    name, _, attribute = path.rpartition(".")
    try:
        value = getattr(importlib.import_module(name), attribute) if name else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{what} {path}: {error}.") from error
    if value is None:
        raise UsageError(f"{what} {path} is no import path, such as mine.Model for Model in mine.py here.")
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return value
    try:
        return value()
    except TypeError as error:
        raise UsageError(f"{what} {path} cannot be made without arguments ({error}): name a function.") from error


def _step(model: Any, batch: Any) -> Any:
    """One training step of a LightningModule, or one call of another module."""
    if hasattr(model, "training_step"):
        model.log = model.log_dict = lambda *args, **kwargs: None  # There is no Trainer.
        return model.training_step(batch, 0)
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _without_gradient(model: Any, result: Any) -> list[str]:
    """Trainable parameters that get no gradient from a result."""
    import torch

    loss = result.get("loss") if isinstance(result, dict) else getattr(result, "loss", None)
    loss = result if loss is None else loss
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss.float().sum(), list(trained.values()), allow_unused=True)
    return [name for name, g in zip(trained, gradients) if g is None]
