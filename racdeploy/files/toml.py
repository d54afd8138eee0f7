"""Read, merge and validate TOML of users; messages suggest the nearest known key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from racdeploy import plugins
from racdeploy.errors import UsageError

M = TypeVar("M", bound=BaseModel)
TomlTable = dict[str, Any]
Settings = Mapping[str, Any]
_SHOWN_CHARACTERS = 80  # characters of a key or a value
_MAX_PROBLEMS = 8
_LONG_KEY = re.compile(r"(\.\s*[\w'\"-]+\s*){50}")
_PER_CENT = re.compile(r"^\s*(?P<number>\d+(\.\d+)?)\s*(?P<sign>%?)\s*$")


def read_toml(file: Path, init_command: str = "racdeploy init") -> TomlTable:
    """Read a TOML file; UsageError where it is missing or not TOML.

    ``init_command`` is the command that writes such a file.
    """
    try:
        return _parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            "missing-toml-file",
            f"{file} does not exist",
            remedy=f"{init_command} {file} writes one",
        ) from error
    except (ValueError, IsADirectoryError, RecursionError) as error:
        raise UsageError(
            "invalid-toml",
            f"{file} is not valid TOML: {error}",
            remedy=f"correct it; {init_command} writes a valid one to compare with",
        ) from error


def read_assignments(assignments: Sequence[str]) -> TomlTable:
    """Return the nested values of command line assignments, as ``prune.sparsity=0.6``."""
    values: TomlTable = {}
    for assignment in assignments:
        try:
            values = merge(values, _parse(assignment))
        except (ValueError, RecursionError) as error:
            raise UsageError(
                "invalid-assignment",
                f"--set {assignment} is not PART.KEY=VALUE in TOML: {error}",
                remedy="put text in double quotes, as --set 'prune.method=\"admm\"'",
            ) from error

    return values


def _parse(text: str) -> TomlTable:
    if _LONG_KEY.search(text):  # takes memory that grows with the square of its parts
        raise ValueError("a key has more than 50 parts")
    return tomllib.loads(text)


def merge(defaults: Settings, overrides: Settings) -> TomlTable:
    """Return nested tables in which ``overrides`` replace values of ``defaults``."""
    merged = dict(defaults)
    for key, value in overrides.items():
        default = merged.get(key)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            value = merge(default, value)
        merged[key] = value
    return merged


def nest(settings: Settings) -> TomlTable:
    """Return nested tables of values by key, as ``prune.sparsity``; tables are merged."""
    nested: TomlTable = {}
    for key, value in settings.items():
        for name in reversed(key.split(".")):
            value = {name: value}
        nested = merge(nested, value)
    return nested


def validate(model: type[M], values: Settings, where: str, init_command: str = "") -> M:
    """Return the validated model of values; UsageError with every problem.

    Args:
        where: source of the values, named in the message.
        init_command: command that writes all keys with comments, if any.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        problems = [_explain(model, dict(detail)) for detail in details[:_MAX_PROBLEMS]]
        if len(details) > _MAX_PROBLEMS:
            problems.append(f"and {len(details) - _MAX_PROBLEMS} more")
        hint = f"; {init_command} writes every key with its allowed values" if init_command else ""
        raise UsageError(
            "invalid-settings",
            f"{where}: {'; '.join(problems)}",
            remedy=f"correct the value and run again{hint}",
        ) from None


def _explain(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    # A stranger may have written the file: keys can be any text.
    location = [" ".join(str(part).split())[:_SHOWN_CHARACTERS] for part in detail["loc"]]
    name = ".".join(location)

    if detail["type"] == "extra_forbidden":
        known = tuple(_known_keys(model, location[:-1]))
        nearest = plugins.suggest(location[-1], known)
        return f"unknown key {name!r}{nearest}; known: {', '.join(known)}"

    message = str(detail["msg"]).removeprefix("Value error, ")
    value = detail.get("input")
    got = ""
    if isinstance(value, int | float | str):
        got = f" (got {repr(value)[:_SHOWN_CHARACTERS]})"

    return f"{name or 'value'}: {message}{got}{_suggest_share(detail)}"


def _suggest_share(detail: Mapping[str, Any]) -> str:
    """Return a suggestion where a share was written in per cent, or an empty string."""
    match = _PER_CENT.match(str(detail.get("input")))
    limits = detail.get("ctx", {})
    below_1 = 1 in (limits.get("lt"), limits.get("le"))
    if match is None or not (below_1 or match["sign"]):
        return ""

    per_cent = float(match["number"])
    return f"; did you mean {per_cent / 100:g}?" if 1 < per_cent < 100 else ""


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
