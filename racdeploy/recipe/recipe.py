"""Complete settings of a build, and the merge of target, recipe file and options."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Literal, Self, cast

from pydantic import Field, model_validator

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.files.reading import check_version
from racdeploy.files.toml import Settings, TomlTable, merge, nest, read_toml, validate
from racdeploy.plugins import Names
from racdeploy.recipe.effort import EFFORTS, Effort
from racdeploy.recipe.export import Export
from racdeploy.recipe.pruning import Pruning
from racdeploy.recipe.recovery import Recovery
from racdeploy.recipe.search import LadderLimits, Tune
from racdeploy.recipe.section import Section
from racdeploy.recipe.structure import Structure
from racdeploy.recipe.traces import Calibration, Traces
from racdeploy.recipe.verification import Runtime, Verification
from racdeploy.recipe_settings import RecipeSettings, drop_unset, merge_settings, read_settings
from racdeploy.targets import Rung, Target

EXAMPLE = (files("racdeploy.recipe") / "recipe.toml").read_text(encoding="utf-8")
"""Recipe that ``racdeploy init`` writes: every key, the seldom used ones as comments."""
_INIT_COMMAND = "racdeploy init"


class Recipe(Section):
    """Complete settings of one build; :mod:`racdeploy.verification.gate` reads ``gate``.

    With ``rungs`` the build makes the smallest of them that is no farther from the dense model than
    the file of ``ladder``.
    """

    schema_version: Literal[1] = 1
    model: str = "tiny-reasoner"
    target: str = "gguf"
    effort: Effort = "default"
    rungs: tuple[Rung, ...] = ()
    ladder: LadderLimits = LadderLimits()
    also: Names = ()
    tasks: Names = ()
    calibration_tasks: Names = ()
    traces: Traces = Traces()
    calibration: Calibration = Calibration()
    structure: Structure = Structure()
    prune: Pruning = Pruning()
    recover: Recovery = Recovery()
    export: Export = Export()
    runtime: Runtime = Runtime()
    verify: Verification = Verification()
    tune: Tune = Tune()
    gate: TomlTable = Field(default={})

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.recover.shorten and self.traces.count < 2:
            raise ValueError(
                "recover.shorten learns from one prompt and judges by another: raise traces.count"
            )
        return self

    @model_validator(mode="after")
    def _check_rungs(self) -> Self:
        if any("vocabulary" in rung.keep for rung in self.rungs):
            raise ValueError(
                "a rung keeps the vocabulary: rungs are compared token by token; "
                "cut it with structure.keep, which builds one model"
            )
        return self

    @property
    def own_text_tokens(self) -> int:
        """Tokens of text that the model writes without a prompt, to be calibrated on too.

        A quarter as many as traces have at most; none where prompts alone calibrate, and none where
        a server writes the traces, since this machine may not hold the model.
        """
        if self.calibration.own_text_tokens is not None:
            return self.calibration.own_text_tokens
        if self.calibration.source == "prompt" or self.traces.server:
            return 0
        of_traces = self.calibration.max_tokens or Calibration().max_tokens
        if self.traces.max_new_tokens:
            of_traces = min(of_traces, self.traces.count * self.traces.max_new_tokens)
        return of_traces // 4

    @classmethod
    def read(cls, file: Path | str | None = None, settings: Settings | None = None) -> Self:
        """Return the recipe of a TOML file, with settings by key, as ``prune.sparsity``.

        What neither sets is decided by the target of a build.

        Raises:
            UsageError: the file does not exist, or a key or value is invalid.
        """
        written = read_toml(Path(file)) if file else {}
        check_version(cls, written, Path(file) if file else None)
        values = merge(written, nest(settings or {}))
        return validate(cls, values, str(file or "the recipe"), _INIT_COMMAND)

    @classmethod
    def combine(cls, source: Recipe | Path | None, options: RecipeSettings) -> Self:
        """Merge target, recipe or its file, and nested options into a validated recipe.

        Options override the recipe; options that are None are ignored.

        Raises:
            UsageError: a key or value is invalid, or exceeds a limit of the target.
            UnknownPluginError: a plugin or target does not exist.
        """
        if isinstance(source, Path):
            where, written = str(source), read_settings(source)
            check_version(cls, written, source)
        elif source:
            where, written = "the recipe", source._to_settings()
        else:
            where, written = "the command line", RecipeSettings()
        requested = merge_settings(written, drop_unset(options))
        cls._check_sections(requested, where)

        name = requested.get("target", cls.model_fields["target"].default)
        target = Target.read(str(name))

        proposed = target.propose(requested)
        # An unknown effort is refused below, with the other values.
        chosen = EFFORTS.get(str(requested.get("effort", "default")), RecipeSettings())
        merged = merge_settings(merge_settings(proposed, chosen), requested)
        recipe = validate(cls, merged, where, _INIT_COMMAND)

        for each in (recipe, *map(recipe.for_target, recipe.also)):
            each._check_plugins()
            export, context_tokens = each.export, each.verify.context_tokens
            Target.read(each.target).check(export.format, export.quant, context_tokens)

        if options.get("ladder", {}).get("no_worse_than") and not recipe.rungs:
            raise UsageError(
                "unused-setting",
                "--no-worse-than chooses among a target's rungs, and this build makes one model",
                remedy="leave it out, or leave number format, cut and zeros to the target",
            )
        return recipe

    def for_target(self, target: str) -> Self:
        """Return this recipe with another target and that target's export settings."""
        new_target = Target.read(target)
        settings = {
            "format": new_target.format,
            "quant": new_target.quant,
            "rounding": self.export.rounding,
            "allow_losing_zeros": self.export.allow_losing_zeros,
        }
        export = validate(Export, settings, f"target {target}")
        return self.model_copy(update={"target": target, "also": (), "export": export})

    def without_pruning(self) -> Self:
        """Return this recipe without cuts and zeros, and with one number format for all linears."""
        structure = self.structure.model_copy(update={"keep": {}, "vocabulary_text": ()})
        prune = self.prune.without_zeros()
        export = self.export.model_copy(update={"tensors": {}})

        parts = {"rungs": (), "structure": structure, "prune": prune, "export": export}
        return self.model_copy(update=parts)

    def with_settings(self, settings: RecipeSettings) -> Self:
        """Return this recipe with nested settings replaced, validated."""
        values = merge(self.model_dump(), settings)
        return validate(type(self), values, "the candidate")

    def _to_settings(self) -> RecipeSettings:
        """Return what was set in this recipe, without defaults."""
        return cast(RecipeSettings, self.model_dump(exclude_unset=True))

    @classmethod
    def _check_sections(cls, settings: RecipeSettings, where: str) -> None:
        """Refuse a value in place of a section, which a target could not read."""
        sections = ("structure", "prune", "export")
        if not all(isinstance(settings.get(name, {}), Mapping) for name in sections):
            validate(cls, settings, where, _INIT_COMMAND)

    def _check_plugins(self) -> None:
        chosen = {
            "prune_methods": self.prune.method,
            "allocations": self.prune.allocation,
            "criteria": self.structure.criterion,
            "formats": self.export.format,
            "quant": self.export.quant,
            "packing": self.export.packing,
        }

        for kind, name in chosen.items():
            _check_plugin(kind, name)
        if self.ladder.no_worse_than:
            _check_plugin("quant", self.ladder.no_worse_than)


def _check_plugin(kind: str, name: str) -> None:
    known = plugins.list_names(kind)
    if kind == "quant":
        known += plugins.list_names("presets")
    if name not in known:
        raise plugins.unknown_plugin(kind, name, known)
