"""Deployment targets: where a model will run, defaults for its recipe, and limits that bind.

A target is data, ``targets/NAME.toml``, or a TOML file of the user's.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

from racdeploy import plugins
from racdeploy.errors import UnknownPluginError, UsageError
from racdeploy.storage.toml import merge, read_toml, validate

_ZEROS = re.compile(r"^(0\.\d+|2:4)$")
_REPACKED = 1.5  # bytes held for each byte of the file: a whole copy of some is among them


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatCost(_Data):
    """What one weight of a number format costs an engine, for each token that it decodes."""

    cached_ps: PositiveFloat  # picoseconds, where the whole model fits the cache
    streamed_ps: PositiveFloat  # where it comes from memory
    # Bytes held for each byte of the file; 2: repacked, less than 1: packed without its zeros.
    resident: float = Field(1.0, ge=0, le=4)

    def at(self, streamed: float) -> float:
        """Return the picoseconds where a share of the weights comes from memory."""
        return self.cached_ps + streamed * (self.streamed_ps - self.cached_ps)


class EngineCosts(_Data):
    """What decoding one token of one sequence costs, beside its weights, and memory."""

    token_us: float = Field(ge=0)  # whatever the model is
    block_us: float = Field(ge=0)  # for each block
    attention_ps: float = Field(ge=0)  # for each position kept, times the width of the queries
    vocabulary_ps: float = Field(0.0, ge=0)  # for each token of the vocabulary
    base_bytes: int = Field(ge=0)  # resident memory of the process with no model to speak of
    block_bytes: float = Field(0.0, ge=0)  # for each block, beside weights and cache
    vocabulary_bytes: float = Field(0.0, ge=0)  # for each token of the vocabulary
    formats: dict[str, FormatCost]
    # By format and zeros, as "0.5" or "2:4": with sparse kernels, where they were measured faster.
    sparse: dict[str, dict[str, FormatCost]] = Field(default_factory=dict)

    @field_validator("sparse")
    @classmethod
    def _check_zeros(
        cls, value: dict[str, dict[str, FormatCost]]
    ) -> dict[str, dict[str, FormatCost]]:
        for zeros in {zeros for costs in value.values() for zeros in costs}:
            if not _ZEROS.match(zeros):
                raise ValueError(f"{zeros!r} is no share of zeros, as 0.5, and not 2:4")
        return value


class Device(_Data):
    """What decides how fast stock engines decode there, and how much memory they take.

    ``threads`` is what was, or would be, measured; ``instructions`` are those that matter to the
    engines; ``source`` says where an estimate is from, or what was measured.
    """

    name: str
    measured: bool
    source: str
    cores: PositiveInt
    threads: PositiveInt
    memory_bytes: PositiveInt
    cache_bytes: PositiveInt
    bandwidth_bytes_per_s: PositiveFloat  # that decoding reaches, not that of the memory chips
    instructions: tuple[str, ...] = ()
    engines: dict[str, EngineCosts]

    def costs(self, engine: str) -> EngineCosts:
        """Return what an engine costs there; a UsageError where nobody knows."""
        if engine not in self.engines:
            raise UsageError(
                f"the profile of {self.name} has no figures for {engine}",
                remedy=f"it has {', '.join(self.engines)}; racdeploy bench --profile measures more",
            )
        return self.engines[engine]

    def without_kernels(self) -> Self:
        """Return the device without what was measured with sparse kernels."""
        bare = {}
        for name, costs in self.engines.items():
            bare[name] = costs.model_copy(update={"sparse": {}})
        return self.model_copy(update={"engines": bare})

    def repacked(self, engine: str) -> tuple[str, ...]:
        """Return the number formats of which an engine keeps a faster copy, sorted."""
        formats = self.costs(engine).formats
        return tuple(sorted(name for name, cost in formats.items() if cost.resident >= _REPACKED))


class Target(BaseModel):
    """A place to deploy to; what it names beside its limits are defaults of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    recipe: dict[str, dict[str, Any]] = Field(default_factory=dict)
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
                f"unknown target {name!r}{plugins.closest(name, cls.names())}",
                remedy=f"known: {', '.join(cls.names())}; or give the path of a .toml file",
            )

        return validate(cls, {"name": path.stem, **read_toml(path)}, str(path))

    def describe(self) -> dict[str, Any]:
        """Return what its TOML file holds, but for the device."""
        return self.model_dump(mode="json", exclude_unset=True, exclude={"name", "device"})

    @property
    def defaults(self) -> dict[str, Any]:
        """The recipe values that this target proposes, :attr:`pruning` not among them."""
        export = {"format": self.format, "quant": self.quant, "packing": self.packing}
        return merge({"export": export}, self.recipe)

    @property
    def pruning(self) -> dict[str, dict[str, Any]]:
        """What this target proposes to prune: parts of the structure, zeros, or both."""
        prune: dict[str, Any] = {"pattern": self.pattern}
        if self.pattern == "unstructured":
            prune["sparsity"] = self.sparsity

        return {"prune": prune, "structure": {"keep": self.keep, "optional": True}}

    def check(self, form: str, quant: str, context_tokens: int) -> None:
        """Refuse a format, a number format or a verified context that this target cannot run."""
        if form not in self.allowed_formats:
            raise UsageError(
                f"target {self.name!r} cannot run format {form!r}",
                remedy=f"it runs {', '.join(self.allowed_formats)}; "
                "choose another target or format",
            )

        if self.allowed_quants and quant not in self.allowed_quants:
            raise UsageError(
                f"target {self.name!r} does not take quant {quant!r}: {self.why}",
                remedy=f"it takes {', '.join(self.allowed_quants)}",
            )

        if context_tokens > self.context_tokens:
            raise UsageError(
                f"target {self.name!r} is made for {self.context_tokens} tokens of context, "
                f"the recipe verifies with {context_tokens}",
                remedy="lower verify.context_tokens or choose another target",
            )


def _folder() -> Path:
    """Return the targets folder: beside the package in a checkout, inside it in a wheel."""
    package = Path(str(files("racdeploy")))
    inside = package / "targets"
    return inside if inside.is_dir() else package.parent / "targets"
