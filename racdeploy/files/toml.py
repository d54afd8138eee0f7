"""TOML that users write: read, merged, and validated; messages name the nearest known key."""

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
Table = dict[str, Any]
_SHOWN = 80  # characters of a key or a value
_MOST_PROBLEMS = 8
_PER_CENT = re.compile(r"^\s*(?P<number>\d+(\.\d+)?)\s*(?P<sign>%?)\s*$")


def read_toml(file: Path, made_by: str = "racdeploy init") -> Table:
    """Read a TOML file; a UsageError where it is missing or not TOML.

    ``made_by`` is the command that writes such a file.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            "missing-toml-file", f"{file} does not exist", remedy=f"{made_by} {file} writes one"
        ) from error
    except (
        tomllib.TOMLDecodeError,
        UnicodeDecodeError,
        IsADirectoryError,
        RecursionError,
    ) as error:
        raise UsageError(
            "invalid-toml",
            f"{file} is not valid TOML: {error}",
            remedy=f"correct it there; {made_by} writes one to compare with",
        ) from error


def read_assignments(assignments: Sequence[str]) -> Table:
    """Return the nested values of assignments from a command line, as ``prune.sparsity=0.6``."""
    values: Table = {}
    for assignment in assignments:
        try:
            values = merge(values, tomllib.loads(assignment))
        except tomllib.TOMLDecodeError as error:
            raise UsageError(
                "invalid-assignment",
                f"--set {assignment} is not PART.KEY=VALUE in TOML: {error}",
                remedy="put text in double quotes, as --set 'prune.method=\"admm\"'",
            ) from error

    return values


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> Table:
    """Return nested tables with the values of the second over those of the first."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def validate(model: type[M], values: Mapping[str, Any], where: str, made_by: str = "") -> M:
    """Validate values, which are from ``where``, into a model, or say what is wrong with each.

    ``made_by`` is the command that writes all of them with a comment, if there is one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        problems = [_explain(model, dict(detail)) for detail in details[:_MOST_PROBLEMS]]
        if len(details) > _MOST_PROBLEMS:
            problems.append(f"and {len(details) - _MOST_PROBLEMS} more")
        explained = f"; {made_by} writes every key with what it takes" if made_by else ""
        raise UsageError(
            "invalid-settings",
            f"{where}: {'; '.join(problems)}",
            remedy=f"correct the value and run again{explained}",
        ) from None


def _explain(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    # Keys are of who wrote the file, which may be a stranger.
    location = [" ".join(str(part).split())[:_SHOWN] for part in detail["loc"]]
    name = ".".join(location)

    if detail["type"] == "extra_forbidden":
        known = tuple(_known_keys(model, location[:-1]))
        nearest = plugins.closest(location[-1], known)
        return f"unknown key {name!r}{nearest}; known: {', '.join(known)}"

    message = str(detail["msg"]).removeprefix("Value error, ")
    given = detail.get("input")
    shown = ""
    if isinstance(given, int | float | str):
        shown = f" (got {repr(given)[:_SHOWN]})"

    return f"{name or 'value'}: {message}{shown}{_suggest_share(detail)}"


def _suggest_share(detail: Mapping[str, Any]) -> str:
    """Return the share that was meant where it was written in per cent, or an empty string."""
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
