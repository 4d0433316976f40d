"""The parser behind the commands of LightningCLI."""

from __future__ import annotations

from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from .errors import exit_with, explain
from .presets import find_config

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class OptimArgumentParser(LightningArgumentParser):
    """Says what is wrong in one message, instead of all options and the inner workings of types."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        exit_with(explain(message, getattr(ex, "subcommand_parser", None) or self))


class PresetOrFile(ActionConfigFile):
    """The argument ``--config``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, find_config(values), option_string)
