"""Deployment targets: where a model will run, defaults for its recipe, and limits that bind.

A target is data, ``targets/NAME.toml``, or a TOML file of the user's.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from racdeploy import plugins
from racdeploy.errors import UnknownPluginError, UsageError
from racdeploy.files.toml import Table, merge, read_toml, validate


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(_Data):
    """How fast stock engines decode there: weights read a second, and a constant for each token.

    Args:
        measured: whether it was; ``source`` says on what, or where an estimate is from.
        cores: those that decode.
        token_us: microseconds that a token takes beside its weights.
        gb_per_s: 10⁹ bytes a second that decoding reads of weights in each number format.
        repacked: number formats of which an engine keeps a copy for its fast kernels.
    """

    name: str
    measured: bool = False
    source: str
    cores: PositiveInt
    token_us: float = Field(ge=0)
    gb_per_s: dict[str, PositiveFloat] = Field(min_length=1)
    repacked: tuple[str, ...] = ()


class Target(_Data):
    """A place to deploy to; what it names beside its limits are defaults of a recipe."""

    name: str
    why: str  # one line on the choice
    format: str = "gguf"
    quant: str = "q8_0"
    packing: str = "plain"
    pattern: str = "unstructured"
    sparsity: float = 0.0  # of an unstructured pattern
    keep: dict[str, float] = Field(default_factory=dict)  # shares of the structure that stay
    context_tokens: int = Field(4096, ge=16)
    memory_limit_bytes: int = Field(ge=1)  # largest artifact, plus cache
    allowed_formats: tuple[str, ...] = ("gguf",)
    allowed_quants: tuple[str, ...] = ()  # empty means all
    recipe: dict[str, Table] = Field(default_factory=dict)
    device: Device | None = None  # None: the machine at hand is measured

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the targets that ship with racdeploy, sorted."""
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
                f"unknown target {name!r}{plugins.closest(name, cls.names())}",
                remedy=f"known: {', '.join(cls.names())}; or give the path of a .toml file",
            )

        return validate(cls, {"name": path.stem, **read_toml(path)}, str(path))

    def describe(self) -> Table:
        """Return what its TOML file holds, but for the device."""
        return self.model_dump(mode="json", exclude_unset=True, exclude={"name", "device"})

    @property
    def defaults(self) -> Table:
        """The recipe values that this target proposes, :attr:`pruning` not among them."""
        export = {"format": self.format, "quant": self.quant, "packing": self.packing}
        return merge({"export": export}, self.recipe)

    @property
    def pruning(self) -> dict[str, Table]:
        """What this target proposes to prune: parts of the structure, zeros, or both."""
        prune: Table = {"pattern": self.pattern}
        if self.pattern == "unstructured":
            prune["sparsity"] = self.sparsity

        return {"prune": prune, "structure": {"keep": self.keep, "optional": True}}

    def check(self, form: str, quant: str, context_tokens: int) -> None:
        """Refuse a format, a number format or a verified context that this target cannot run."""
        if form not in self.allowed_formats:
            raise UsageError(
                "format-not-on-target",
                f"target {self.name!r} cannot run format {form!r}",
                remedy=f"it runs {', '.join(self.allowed_formats)}; "
                "choose another target or format",
            )

        if self.allowed_quants and quant not in self.allowed_quants:
            raise UsageError(
                "quant-not-on-target",
                f"target {self.name!r} does not take quant {quant!r}: {self.why}",
                remedy=f"it takes {', '.join(self.allowed_quants)}",
            )

        if context_tokens > self.context_tokens:
            raise UsageError(
                "context-beyond-target",
                f"target {self.name!r} is made for {self.context_tokens} tokens of context, "
                f"the recipe verifies with {context_tokens}",
                remedy="lower verify.context_tokens or choose another target",
            )


def _folder() -> Path:
    """Return the targets folder: beside the package in a checkout, inside it in a wheel."""
    package = Path(str(files("racdeploy")))
    inside = package / "targets"
    return inside if inside.is_dir() else package.parent / "targets"
