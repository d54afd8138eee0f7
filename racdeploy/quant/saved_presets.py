"""Presets that a user keeps: a mix of number formats under a name, one TOML file each.

A recipe takes what is in the file in place of its name as soon as it is read, so nothing that is
built depends on the file afterwards. Names of shipped presets and number formats win.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, field_validator

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.storage.files import make_parent, write_atomic
from racdeploy.storage.toml import read_toml, validate

FOLDER_VARIABLE = "RACDEPLOY_PRESETS"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MOST_BYTES = 1_000_000
_MADE_BY = "racdeploy presets save NAME --from BUNDLE"


class SavedPreset(BaseModel):
    """What a file of a preset holds.

    Args:
        why: one line on where it is from.
        quant: a number format or a shipped preset.
        tensors: patterns of tensor names → number formats; the first that matches wins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    why: str = Field("", max_length=200)
    quant: str
    tensors: dict[str, str] = Field(default_factory=dict)

    @field_validator("quant")
    @classmethod
    def _check_quant(cls, value: str) -> str:
        name = fold(value)
        known = _list_shipped()
        if name not in known:
            raise ValueError(f"unknown quant {value!r}{plugins.closest(name, known)}")
        return name

    @field_validator("tensors")
    @classmethod
    def _check_tensors(cls, value: dict[str, str]) -> dict[str, str]:
        return check_patterns(value)


def check_patterns(tensors: Mapping[str, str]) -> dict[str, str]:
    """Return patterns of tensor names with the names of their number formats in lower case.

    Raises:
        ValueError: a pattern is no regular expression, or there is no such number format.
    """
    known = plugins.names("quant")

    for pattern, quant in tensors.items():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error

        name = quant.lower()
        if name not in known:
            nearest = plugins.closest(name, known)
            raise ValueError(f"unknown quant {quant!r} for {pattern!r}{nearest}")

    return {pattern: quant.lower() for pattern, quant in tensors.items()}


def fold(name: str) -> str:
    """Return a name of a preset or a number format as it is compared."""
    return name.lower().replace("-", "_")


def folder() -> Path:
    """Return where presets are kept: ``RACDEPLOY_PRESETS``, or the user's configuration."""
    moved = os.environ.get(FOLDER_VARIABLE)
    return Path(moved) if moved else platformdirs.user_config_path("racdeploy", False) / "presets"


def names() -> tuple[str, ...]:
    """Return the names that are kept and not shipped too, sorted; the files are not read."""
    found = {file.stem for file in folder().glob("*.toml") if _NAME.fullmatch(file.stem)}
    return tuple(sorted(found - set(_list_shipped())))


def read(name: str) -> SavedPreset:
    """Read a preset that is kept.

    Raises:
        UsageError: it is not there, not TOML, or asks for what there is not.
    """
    file = folder() / f"{name}.toml"
    if file.is_file() and file.stat().st_size > _MOST_BYTES:
        raise UsageError(
            f"{file} has {file.stat().st_size:,} bytes, a preset at most {_MOST_BYTES:,}",
            remedy="delete it, and save the preset again",
        )
    return validate(SavedPreset, read_toml(file, _MADE_BY), str(file))


def save(name: str, preset: SavedPreset, replace: bool = False) -> Path:
    """Write a preset under a name that is free; return its file.

    Raises:
        UsageError: the name is shipped, taken, or none that a file can have everywhere.
    """
    own = fold(name)
    if own in _list_shipped():
        raise UsageError(
            f"{name!r} is a preset or a number format that ships with racdeploy",
            remedy="choose another name",
        )
    if not _NAME.fullmatch(own):
        raise UsageError(
            f"{name!r} is not a name for a preset",
            remedy="begin with a letter, then letters, digits, - and _, 64 characters at most",
        )

    file = folder() / f"{own}.toml"
    if file.exists() and not replace:
        raise UsageError(f"{file} exists", remedy="choose another name, or add --force")

    make_parent(file)
    write_atomic(file, _write(preset))
    return file


def resolve(export: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``[export]`` of a recipe with what a kept preset holds in place of its name.

    Patterns of the recipe come before those of the preset, so they win.

    Raises:
        UsageError: the preset's file is damaged, or the format has no names for its patterns.
    """
    asked = export.get("quant")
    if not isinstance(asked, str) or fold(asked) not in names():
        return export

    preset = read(fold(asked))
    form = export.get("format", "gguf")
    if preset.tensors and form != "gguf":
        raise UsageError(
            f"preset {asked!r} names tensors of GGUF files, and format {form!r} has others",
            remedy=f"use --quant {preset.quant}, or a target with GGUF",
        )

    found = {**export, "quant": preset.quant}
    own = export.get("tensors") or {}
    if isinstance(own, Mapping):  # else the recipe refuses it with its own words
        tensors = dict(own)
        for pattern, quant in preset.tensors.items():
            tensors.setdefault(pattern, quant)
        found["tensors"] = tensors
    return found


def _list_shipped() -> tuple[str, ...]:
    return plugins.names("quant") + plugins.names("presets")


def _write(preset: SavedPreset) -> str:
    lines = []
    if preset.why:
        lines.append(f"why = {_quote(preset.why)}")
    lines.append(f"quant = {_quote(preset.quant)}")

    if preset.tensors:
        lines += ["", "[tensors]  # the first pattern that matches wins"]
        lines += [f"{_quote(name)} = {_quote(quant)}" for name, quant in preset.tensors.items()]

    text = "\n".join(lines) + "\n"
    assert SavedPreset(**tomllib.loads(text)) == preset
    return text


def _quote(text: str) -> str:
    # A JSON string is a basic string of TOML but for DEL, which JSON does not escape.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
