"""Deployment targets: a device or engine, defaults for the recipe, and limits.

A target is data: ``targets/NAME.toml``, or a user's TOML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Self, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from racdeploy import plugins
from racdeploy.errors import UnknownPluginError, UsageError
from racdeploy.files.toml import TomlTable, read_toml, validate
from racdeploy.recipe_settings import RecipeSettings, RungSettings, merge_settings

_ZERO_KEYS = {"method", "pattern", "sparsity", "allocation"}
"""Keys of ``prune`` that ask for zeros."""
_FORMAT_KEYS = {"format", "quant", "tensors"}
"""Keys of ``export`` that choose a number format."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(_Data):
    """Decoding speed of stock engines on a device: bandwidth by number format, time per token.

    Args:
        measured: True if measured; ``source`` names the machine, or the origin of an estimate.
        cores: processor cores that decode.
        token_us: microseconds per token besides reading the weights.
        gb_per_s: weights read while decoding, in 10⁹ bytes per second, by number format.
        repacked: number formats that an engine keeps a second copy of, for its fast kernels.
    """

    name: str
    measured: bool = False
    source: str
    cores: PositiveInt
    token_us: float = Field(ge=0)
    gb_per_s: dict[str, PositiveFloat] = Field(min_length=1)
    repacked: tuple[str, ...] = ()

    def predict_token_s(self, read_bytes: Mapping[str, float]) -> float:
        """Return the seconds of decoding a token.

        Args:
            read_bytes: weights that are read for it, by number format; a format without a figure
                gets the lowest bandwidth.
        """
        slowest = min(self.gb_per_s.values())
        seconds = self.token_us / 1e6
        for name, count in read_bytes.items():
            seconds += count / self.gb_per_s.get(name, slowest) / 1e9
        return seconds


class Rung(_Data):
    """A step of a target's ladder: a number format, and the shares of a cut that stay."""

    quant: str
    keep: dict[str, float] = {}

    def __str__(self) -> str:
        return " ".join([*self.list_cuts(), self.quant])

    def list_cuts(self) -> list[str]:
        """Return each part that is cut, with the share that stays."""
        return [f"{part} {share:.3g}" for part, share in self.keep.items()]


class Target(_Data):
    """A deployment target: limits that a recipe must keep, and defaults for the recipe.

    Args:
        quant: number format where the user says what is pruned.
        rungs: default models, the widest first: of several, a build ships the narrowest that loses
            nothing measurable. The cut of the narrowest is that of a build of one model, unless the
            user says what is pruned.
        allowed_quants: number formats that run; empty means all.
        recipe: defaults of other parts of the recipe.
        device: its decoding speed; None: the machine at hand is measured.
    """

    name: str
    description: str  # one line on the choice
    format: str = "gguf"
    quant: str = "q8_0"
    rungs: tuple[Rung, ...] = ()
    context_tokens: int = Field(4096, ge=16)
    memory_limit_bytes: int = Field(ge=1)  # largest artifact, plus cache
    allowed_quants: tuple[str, ...] = ()
    recipe: dict[str, TomlTable] = {}
    device: Device | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the targets that ship with racdeploy, sorted."""
        return tuple(sorted(file.stem for file in _folder().glob("*.toml")))

    @classmethod
    def read(cls, name: str) -> Self:
        """Read a shipped target by name, or a user's by the path of its TOML file."""
        if name.endswith(".toml"):
            path = Path(name)
        elif name in cls.names():
            path = _folder() / f"{name}.toml"
        else:
            raise UnknownPluginError(
                "unknown-target",
                f"unknown target {name!r}{plugins.suggest(name, cls.names())}",
                remedy=f"known: {', '.join(cls.names())}; or give the path of a .toml file",
            )

        return validate(cls, {"name": path.stem, **read_toml(path)}, str(path))

    def describe(self) -> TomlTable:
        """Return the values of its TOML file, without the device."""
        return self.model_dump(mode="json", exclude_unset=True, exclude={"name", "device"})

    @property
    def narrowest(self) -> Rung:
        """Narrowest rung; without rungs, the target's number format and no cut."""
        return self.rungs[-1] if self.rungs else Rung(quant=self.quant)

    def propose(self, requested: RecipeSettings) -> RecipeSettings:
        """Return the settings that this target proposes beside those that a user requests.

        A user who asks for zeros, or for a packing that omits them, gets the recipe's default
        sparsity and no cut. A user who sets ``structure.keep`` gets no zeros. A user who names a
        number format or further targets gets one model with the cut of the narrowest rung; and who
        names nothing of all this, the rungs.
        """
        defaults: RecipeSettings = {"export": {"format": self.format, "quant": self.quant}}
        proposed = merge_settings(defaults, cast(RecipeSettings, self.recipe))
        export = requested.get("export", {})

        is_packed = export.get("packing", "plain") != "plain"
        if is_packed or not _ZERO_KEYS.isdisjoint(requested.get("prune", {})):
            return proposed

        proposed = merge_settings(proposed, {"prune": {"sparsity": 0.0}})
        if "keep" in requested.get("structure", {}):
            return proposed

        cut: RecipeSettings = {"structure": {"keep": self.narrowest.keep, "optional": True}}
        proposed = merge_settings(proposed, cut)
        if requested.get("also") or not _FORMAT_KEYS.isdisjoint(export):
            return proposed

        if len(self.rungs) > 1:
            rungs = [RungSettings(quant=rung.quant, keep=rung.keep) for rung in self.rungs]
            return merge_settings(proposed, {"rungs": rungs})
        return merge_settings(proposed, {"export": {"quant": self.narrowest.quant}})

    def check(self, form: str, quant: str, context_tokens: int) -> None:
        """Raise UsageError if the target cannot run a format, number format or context length."""
        if form != self.format:
            raise UsageError(
                "format-not-on-target",
                f"target {self.name!r} cannot run format {form!r}",
                remedy=f"it runs {self.format}; choose another target or format",
            )

        if self.allowed_quants and quant not in self.allowed_quants:
            raise UsageError(
                "quant-not-on-target",
                f"target {self.name!r} does not support quant {quant!r}: {self.description}",
                remedy=f"use one of {', '.join(self.allowed_quants)}",
            )

        if context_tokens > self.context_tokens:
            raise UsageError(
                "context-beyond-target",
                f"target {self.name!r} allows {self.context_tokens} tokens of context, "
                f"the recipe verifies with {context_tokens}",
                remedy="lower verify.context_tokens or choose another target",
            )


def _folder() -> Path:
    """Return the folder of targets: beside the package in a checkout, inside it in a wheel."""
    package = Path(str(files("racdeploy")))
    inside = package / "targets"
    return inside if inside.is_dir() else package.parent / "targets"
