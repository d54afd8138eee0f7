"""Settings of a recipe before they are validated: those of options, targets and recipe files.

Every key is optional, and None stands for one that is not set. The keys are those that options and
targets set; a recipe file has others too. :mod:`racdeploy.recipe` merges and validates them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, cast

from racdeploy.files.toml import Settings, TomlTable, merge, nest, read_toml


class TraceSettings(TypedDict, total=False):
    """Settings of ``traces``."""

    count: int | None
    server: str | None
    server_key_env: str


class CalibrationSettings(TypedDict, total=False):
    """Settings of ``calibration``."""

    source: str | None
    max_tokens: int
    own_text_tokens: int


class StructureSettings(TypedDict, total=False):
    """Settings of ``structure``."""

    keep: Mapping[str, float] | None
    optional: bool
    vocabulary_text: Sequence[str] | None


class PruneSettings(TypedDict, total=False):
    """Settings of ``prune``; a sparsity may be a text of the command line."""

    method: str | None
    sparsity: float | str | None
    pattern: str | None
    allocation: str


class RecoverSettings(TypedDict, total=False):
    """Settings of ``recover``."""

    tokens: int | None
    shorten: bool | None


class ExportSettings(TypedDict, total=False):
    """Settings of ``export``."""

    format: str
    quant: str | None
    packing: str | None
    rounding: Literal["nearest", "optimized"]
    tensors: Mapping[str, str]
    allow_losing_zeros: bool | None
    accept_token_differences: float | None


class VerifySettings(TypedDict, total=False):
    """Settings of ``verify``."""

    count: int | None
    controls: Sequence[str] | None
    seed: int


class LadderSettings(TypedDict, total=False):
    """Settings of ``ladder``."""

    no_worse_than: str | None


class TuneSettings(TypedDict, total=False):
    """Settings of ``tune``."""

    objective: str | None
    max_bytes: int | None
    max_memory_bytes: int | None
    min_tokens_per_s: float | None
    min_accuracy_ratio: float | None
    budget_s: float | None
    recover_tokens: int | None


class RungSettings(TypedDict):
    """A step of a ladder."""

    quant: str
    keep: Mapping[str, float]


class RecipeSettings(TypedDict, total=False):
    """Settings of a recipe, by section."""

    model: str | None
    target: str | None
    effort: str | None
    rungs: Sequence[RungSettings]
    ladder: LadderSettings
    also: Sequence[str] | None
    tasks: Sequence[str] | None
    calibration_tasks: Sequence[str] | None
    traces: TraceSettings
    calibration: CalibrationSettings
    structure: StructureSettings
    prune: PruneSettings
    recover: RecoverSettings
    export: ExportSettings
    verify: VerifySettings
    tune: TuneSettings
    gate: TomlTable | None


def read_settings(file: Path) -> RecipeSettings:
    """Return the settings of a recipe file; UsageError where it is missing or not TOML."""
    return cast(RecipeSettings, read_toml(file))


def nest_settings(settings: Settings) -> RecipeSettings:
    """Return settings by key, as ``prune.sparsity``, in their sections; tables are merged."""
    return cast(RecipeSettings, nest(settings))


def merge_settings(defaults: RecipeSettings, overrides: RecipeSettings) -> RecipeSettings:
    """Return settings in which ``overrides`` replace single values of ``defaults``."""
    return cast(RecipeSettings, merge(defaults, overrides))


def drop_unset(settings: RecipeSettings) -> RecipeSettings:
    """Return the settings without those that are None, and without sections of only such."""
    return cast(RecipeSettings, _drop_none(settings))


def _drop_none(settings: Settings) -> TomlTable:
    kept = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            value = _drop_none(value) or None
        if value is not None:
            kept[key] = value
    return kept
