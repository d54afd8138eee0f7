"""Deployment targets: a device or engine, defaults for the recipe, and limits.

A target is data: ``targets/NAME.toml``, or a user's TOML file.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from racdeploy import plugins
from racdeploy.errors import UnknownPluginError, UsageError
from racdeploy.files.toml import TomlTable, merge, read_toml, validate


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


class Rung(_Data):
    """A step of a target's ladder: a number format, and the shares of a cut that stay."""

    quant: str
    keep: dict[str, float] = {}

    def __str__(self) -> str:
        return " ".join([*(f"{part} {share:.3g}" for part, share in self.keep.items()), self.quant])


class Target(_Data):
    """A deployment target: limits that a recipe must keep, and defaults for the recipe."""

    name: str
    description: str  # one line on the choice
    format: str = "gguf"
    quant: str = "q8_0"
    keep: dict[str, float] = {}  # shares of the structure that stay
    rungs: tuple[Rung, ...] = ()  # the widest first; where a user names no pruning and no quant
    context_tokens: int = Field(4096, ge=16)
    memory_limit_bytes: int = Field(ge=1)  # largest artifact, plus cache
    allowed_quants: tuple[str, ...] = ()  # empty means all
    recipe: dict[str, TomlTable] = {}
    device: Device | None = None  # None: the machine at hand is measured

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
    def defaults(self) -> TomlTable:
        """Recipe values that this target proposes, except :attr:`pruning`."""
        return merge({"export": {"format": self.format, "quant": self.quant}}, self.recipe)

    @property
    def pruning(self) -> dict[str, TomlTable]:
        """Default pruning of this target: a cut, and no zeros."""
        return {"prune": {"sparsity": 0.0}, "structure": {"keep": self.keep, "optional": True}}

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
