"""``--set KEY=VALUE`` of the benchmarks: change single settings of a recipe."""

from __future__ import annotations

import argparse
import tomllib
from typing import Any

from racdeploy.storage.toml import merge


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe: KEY of [prune], or PART.KEY",
    )


def with_settings(options: dict[str, Any], pairs: list[str]) -> dict[str, Any]:
    """Return a recipe's values with KEY=VALUE over them.

    VALUE is TOML, or plain text; a KEY without a dot is of [prune].
    """
    for pair in pairs:
        name, chosen = pair.split("=", 1)
        try:
            nested: Any = tomllib.loads(f"value = {chosen}")["value"]
        except tomllib.TOMLDecodeError:
            nested = chosen
        path = name if "." in name else f"prune.{name}"
        for part in reversed(path.split(".")):
            nested = {part: nested}
        options = merge(options, nested)

    return options
