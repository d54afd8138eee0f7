"""Recipe of a build: its sections, validated, and the merge of target, recipe file and options.

Precedence, low to high: defaults, target, recipe file, command-line options. A recipe that exceeds
a limit of its target is an error. ``recipe.toml`` explains every key.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    field_validator,
    model_validator,
)

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.files.reading import check_version
from racdeploy.files.toml import Settings, TomlTable, merge, nest, read_toml, validate
from racdeploy.manifest import MAX_TOKENS
from racdeploy.plugins import Names
from racdeploy.recipe_settings import (
    RecipeSettings,
    TraceSettings,
    drop_unset,
    merge_settings,
    read_settings,
)
from racdeploy.results.answers import HESITATION_WORDS
from racdeploy.results.schema import FiniteNonNegative, OpenShare, PositiveCount, Share
from racdeploy.targets import Rung, Target

EXAMPLE = (files("racdeploy") / "recipe.toml").read_text(encoding="utf-8")
"""Recipe that ``racdeploy init`` writes: every key, the seldom used ones as comments."""
_INIT_COMMAND = "racdeploy init"
_METHOD_DEFAULTS = {"magnitude": {"target": "linear_output", "refit_steps": 0}}
"""Defaults that a method changes: magnitude pruning moves no weight that it keeps."""
_PATTERN = re.compile(r"^(\d+):(\d+)$")
# A downloaded bundle contains a recipe: bound every number, so that it cannot exhaust the machine.
_MAX_PROMPTS = 1_000_000
_MAX_SAMPLES = 256
BatchSize = Annotated[int, Field(ge=1, le=1024)]
_MAX_SECONDS = 1e6
MAX_TOKEN_DIFFERENCES = 0.05
"""Maximum share of strings tokenized differently; beyond it the pre-tokenizer is a wrong one."""
_SERVER_URL = re.compile(r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$")


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def check_plugin(kind: str, noun: str, name: str) -> str:
    """Return the name of a plugin; ValueError, with the nearest names, for an unknown one."""
    known = plugins.list_names(kind)
    if name not in known:
        nearest = plugins.suggest(name, known)
        raise ValueError(f"unknown {noun} {name!r}{nearest}; known: {', '.join(known)}")
    return name


Regex = Annotated[str, AfterValidator(_check_regex)]
RecoverMethod = Annotated[str, AfterValidator(partial(check_plugin, "recover_methods", "method"))]
TrainingObjective = Annotated[str, AfterValidator(partial(check_plugin, "objectives", "objective"))]
SparsityOrPattern = float | str
"""Zeros of a linear: a sparsity, or a pattern N:M."""


def parse_pattern(zeros: SparsityOrPattern) -> tuple[int, int] | None:
    """Return N and M of a pattern N:M, which keeps N of M weights; None for anything else."""
    match = _PATTERN.match(zeros) if isinstance(zeros, str) else None
    if not match or not 0 < int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])


def sparsity_of(zeros: SparsityOrPattern) -> float:
    """Return the share of a linear's weights that are zeros."""
    if not isinstance(zeros, str):
        return zeros
    n_m = parse_pattern(zeros)
    assert n_m, "patterns are validated when the recipe is read"
    return 1 - n_m[0] / n_m[1]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values; pydantic takes any key, and would change nothing."""
        unknown = {*(update or {})} - type(self).model_fields.keys()
        assert not unknown, f"{type(self).__name__} has no {', '.join(sorted(unknown))}"
        return super().model_copy(update=update, deep=deep)


class Traces(_Section):
    """Collection of the model's own chains of thought."""

    count: int = Field(default=256, ge=1, le=_MAX_PROMPTS)
    temperature: FiniteNonNegative = 0.6
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=1024, ge=1, le=MAX_TOKENS)
    batch_size: BatchSize = 64  # one shard on disk each
    seed: NonNegativeInt = 0
    server: str = ""
    server_model: str = ""
    server_key_env: str = ""
    server_concurrency: BatchSize = 16
    server_timeout_s: float = Field(default=1800.0, gt=0, le=_MAX_SECONDS)

    # Not a field validator: its message would quote the address, which may contain a key.
    @model_validator(mode="after")
    def _check_server(self) -> Self:
        if self.server and not _SERVER_URL.match(self.server):
            raise ValueError(
                "server is not http://HOST:PORT/v1, with http or https; "
                "no name, key or query belongs in it"
            )

        changed = [n for n, f in type(self).model_fields.items() if getattr(self, n) != f.default]
        unused = [name for name in changed if name.startswith("server_")]

        if unused and not self.server:
            raise ValueError(f"{', '.join(unused)} without server")

        return self

    @property
    def identity(self) -> TomlTable:
        """Settings that determine the traces: sampling and model, not how the server is reached.

        A server with a named model may change its address; otherwise the address identifies the
        model.
        """
        values = self.model_dump()
        sampling = {key: value for key, value in values.items() if not key.startswith("server")}
        if self.server:
            sampling["server"] = self.server_model or self.server
        return sampling

    def check_key_destination(self, trace_options: TraceSettings, allowed: str) -> None:
        """Refuse to send a key of this machine to a host that only a recipe file names.

        Args:
            trace_options: ``traces`` settings from the command line.
            allowed: host that the user permits with ``--key-host``.
        """
        is_typed = trace_options.get("server_key_env") and trace_options.get("server")
        host = urllib.parse.urlsplit(self.server).hostname or ""
        if not self.server_key_env or is_typed or host == allowed.lower():
            return

        raise UsageError(
            "key-not-allowed",
            f"the recipe file sends the environment variable {self.server_key_env} to {host}",
            remedy=f"if you want that: --key-host {host}",
        )


class Calibration(_Section):
    """Selection of the trace tokens that the statistics are gathered on."""

    source: Literal["rac", "prompt"] = "rac"
    max_tokens: NonNegativeInt = 0
    only_correct: bool = False
    keep_truncated: bool = False
    held_out_share: float = Field(default=0.125, ge=0, le=0.5)


class Pruning(_Section):
    """Choice of the zeros and update of the weights that are kept."""

    method: str = "sparsegpt"
    sparsity: float = Field(default=0.5, ge=0, lt=1)
    pattern: str = "unstructured"
    allocation: str = "uniform"
    target: Literal["dense_output", "linear_output"] = "dense_output"
    refit_steps: NonNegativeInt = 20
    damping: float = Field(default=0.01, gt=0, le=1)
    # 60 % zeros, embedded model: held-out error 0.0245 at 16 columns, 0.0314 at 128.
    column_block: PositiveCount = 16
    compute: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ignore: tuple[Regex, ...] = ()
    expert_tokens: NonNegativeInt = 0

    def without_zeros(self) -> Self:
        """Return these settings for a walk that makes no weight zero."""
        none = {"sparsity": 0.0, "pattern": "unstructured", "allocation": "uniform"}
        return self.model_copy(update=none)

    @model_validator(mode="before")
    @classmethod
    def _fill_method(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**_METHOD_DEFAULTS.get(str(values.get("method")), {}), **values}

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        if value != "unstructured" and parse_pattern(value) is None:
            raise ValueError("neither 'unstructured' nor N:M with 0 < N < M, as 2:4")
        return value

    @model_validator(mode="after")
    def _check_sparsity(self) -> Self:
        if self.n_m is None:
            return self

        if self.allocation != "uniform":
            raise ValueError(
                f"pattern {self.pattern} leaves nothing to allocate; use allocation = 'uniform'"
            )

        kept, of = self.n_m
        implied = 1 - kept / of
        if "sparsity" in self.model_fields_set and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} means sparsity {implied:g}, not {self.sparsity:g}"
            )

        # The model is frozen; set the value anyway, so that readers need not know the pattern.
        object.__setattr__(self, "sparsity", implied)
        return self

    @property
    def match_dense(self) -> bool:
        """True if linears match the dense model's outputs.

        Otherwise each matches the outputs of its own dense weights on the pruned model's inputs.
        """
        return self.target == "dense_output"

    @property
    def n_m(self) -> tuple[int, int] | None:
        """N and M of an N:M pattern, or None."""
        return parse_pattern(self.pattern)

    def check_width(self, weight: str, inputs: int) -> None:
        """Refuse a weight with a number of inputs that is not a multiple of its M."""
        if self.n_m and inputs % self.n_m[1]:
            kept, of = self.n_m
            raise UsageError(
                "pattern-does-not-divide",
                f"pattern {kept}:{of} does not divide the {inputs} inputs of {weight}",
                remedy=f"choose an M that divides {inputs}, or --pattern unstructured",
            )


class Structure(_Section):
    """Structured pruning, done before zeros are chosen in the weights that are left.

    ``keep`` maps a part, named as its plugin, to the share that is kept; for the vocabulary, a
    number of tokens is also accepted. With ``optional`` a part is cut less, or not at all, if the
    model or the format does not allow it; otherwise that is an error.
    """

    keep: dict[str, float] = {}
    optional: bool = False
    uniform: bool = False
    multiple: NonNegativeInt = 0
    criterion: str = "error"
    vocabulary_text: Names = ()

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, value: dict[str, float]) -> dict[str, float]:
        for part, share in value.items():
            check_plugin("structures", "part", part)
            counted = plugins.read_constants("structures", part).get("COUNT_UNIT")
            if not (0 < share <= 1 or (counted and share > 0 and share.is_integer())):
                also = f", or a count of {counted}" if counted else ""
                raise ValueError(f"{part} = {share:g} is not a share above 0, up to 1{also}")
        return value

    @property
    def cut_parts(self) -> Names:
        """Names of the parts that are cut, sorted."""
        return tuple(sorted(part for part, share in self.keep.items() if share != 1))

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if self.vocabulary_text and not self.cuts_vocabulary:
            raise ValueError("vocabulary_text without vocabulary in keep")
        return self

    @property
    def sizes(self) -> frozenset[str]:
        """Letters of the dimensions that shrink, see :mod:`racdeploy.pruning.structures`."""
        read = plugins.read_constants
        return frozenset(read("structures", part)["SIZE_LETTER"] for part in self.cut_parts)

    @property
    def cuts_vocabulary(self) -> bool:
        """True if the vocabulary is cut."""
        return "V" in self.sizes

    @property
    def width_multiple(self) -> int:
        """Divisor of feed-forward widths; most number formats have blocks of 32."""
        return self.multiple or 32

    def kept_share(self, part: str) -> float:
        """Return the share of a part that is kept; 1 if it is not cut."""
        return self.keep.get(part, 1.0)


class Recovery(_Section):
    """Distillation of the dense model into the pruned one; off at 0 tokens.

    ``methods`` are plugins that run in order on the dense model's traces; an empty list selects the
    best method that fits into memory. The share ``on_policy`` of the tokens is learned on the
    pruned model's own answers, in ``rounds``.

    ``shorten`` lets the dense model learn to think less before it is pruned: True as short as its
    accuracy allows, or down to a share of its thinking. In each of ``rounds`` it answers every
    calibration prompt ``samples`` times and learns by ``objective``, a plugin; ``instruction`` is
    the system prompt of the objective ``concise``.
    """

    tokens: NonNegativeInt = 0
    shorten: bool | float = False
    objective: TrainingObjective = "preference"
    samples: Annotated[int, Field(ge=1, le=_MAX_SAMPLES)] = 8
    instruction: str = "Think briefly: no repetition, no second check of what is clear."
    methods: tuple[RecoverMethod, ...] = ()
    on_policy: Share = 0.25
    rounds: PositiveCount = 2
    max_accuracy_drop: float = Field(default=0.01, ge=0, lt=1)
    learning_rate: NonNegativeFloat = 0.0
    batch_tokens: PositiveCount = 2048
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    extra_text: str = ""
    extra_text_share: OpenShare = 0.3
    seed: NonNegativeInt = 0

    @field_validator("shorten", mode="plain")
    @classmethod
    def _check_share(cls, value: Any) -> Any:
        if value is False or (isinstance(value, int | float) and 0 < value <= 1):
            return value
        raise ValueError("true, or a share above 0 and up to 1")

    @model_validator(mode="after")
    def _check_shortening(self) -> Self:
        if not self.shorten:
            return self
        if "blockwise" in self.methods:
            raise ValueError("'blockwise' sees one block, shorten needs 'full' or 'scales'")
        return self


class Export(_Section):
    """Format of the exported file.

    ``tensors`` maps patterns of tensor names to number formats; the first match overrides the
    preset. ``rounding`` is ``nearest`` or ``optimized``: codes are chosen while pruning to reduce
    the error of the outputs, with or without zeros. Unset, it is optimized wherever that is
    possible. ``allow_losing_zeros`` permits a number format that does not represent zeros exactly,
    and ``accept_token_differences`` an engine that tokenizes up to that share of hard strings
    differently.
    """

    format: str = "gguf"
    quant: str = "q8_0"
    packing: str = "plain"
    rounding: Literal["nearest", "optimized"] | None = None
    pre_tokenizer: str | None = None
    accept_token_differences: float = Field(
        default=0.0, ge=0, le=MAX_TOKEN_DIFFERENCES, allow_inf_nan=False
    )
    exporter: str = "auto"
    tensors: dict[Regex, str] = {}
    importance: str = ""
    split_bytes: NonNegativeInt = 48_000_000_000
    allow_losing_zeros: bool = False

    @field_validator("quant")
    @classmethod
    def _fold_quant(cls, value: str) -> str:
        return value.lower().replace("-", "_")

    @field_validator("tensors")
    @classmethod
    def _check_tensors(cls, value: dict[str, str]) -> dict[str, str]:
        known = plugins.list_names("quant")
        checked = {}

        for pattern, quant in value.items():
            name = checked[pattern] = quant.lower()
            if name not in known:
                nearest = plugins.suggest(name, known)
                raise ValueError(f"unknown quant {quant!r} for {pattern!r}{nearest}")
        return checked


class Verification(_Section):
    """Comparison of the artifact with the dense model."""

    count: int = Field(default=200, ge=1, le=_MAX_PROMPTS)
    samples: int = Field(default=1, ge=1, le=_MAX_SAMPLES)
    max_new_tokens: int = Field(default=1024, ge=1, le=MAX_TOKENS)
    max_thinking_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    temperature: FiniteNonNegative = 0.0
    logit_traces: int = Field(default=16, ge=0, le=_MAX_PROMPTS)
    controls: Names = ()
    parallel: BatchSize = 16
    context_tokens: int = Field(default=2048, ge=16, le=MAX_TOKENS)
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 are {self.samples} equal completions"
            )
        return self


class Thinking(_Section):
    """Control of the exported model's thinking; see docs/thinking.md.

    ``closing`` also applies to a budget that an app or user sets later.
    """

    max_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    closing: str = ""
    hesitation: Names = HESITATION_WORDS
    hesitation_penalty: FiniteNonNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.hesitation and self.hesitation_penalty:
            raise ValueError("hesitation is empty: there are no words to penalize")
        return self


class Runtime(_Section):
    """Settings of the deployed model, with which it is also verified."""

    thinking: Thinking = Thinking()


class Tune(_Section):
    """Objective, limits and candidates of ``racdeploy tune``; a limit of 0 is off.

    Each number format of the target (or of ``quants``) is a candidate unpruned, with each share
    ``ffn`` of the feed-forward part kept, and with each entry of ``zeros``.
    """

    objective: Literal["size", "speed", "seconds-per-correct-answer", "accuracy"] = "accuracy"
    max_bytes: NonNegativeInt = 0
    max_memory_bytes: NonNegativeInt = 0
    min_tokens_per_s: FiniteNonNegative = 0.0
    min_accuracy_ratio: Share = 0.0
    budget_s: float = Field(default=3600.0, gt=0, le=_MAX_SECONDS)
    quants: Names = ()
    ffn: tuple[float, ...] = (0.875, 0.75, 0.625, 0.5)
    zeros: tuple[SparsityOrPattern, ...] = ()
    vocabulary: tuple[int, ...] = ()
    recover_tokens: NonNegativeInt = 0
    prompts: int = Field(default=256, ge=16, le=_MAX_PROMPTS)
    seed: NonNegativeInt = 1

    @field_validator("ffn", "zeros")
    @classmethod
    def _check_shares(cls, value: tuple[SparsityOrPattern, ...]) -> tuple[SparsityOrPattern, ...]:
        for zeros in value:
            is_pattern = isinstance(zeros, str)
            if is_pattern and parse_pattern(zeros) is None:
                raise ValueError(f"{zeros!r} is not N:M, as 2:4")
            if not is_pattern and not 0 < sparsity_of(zeros) < 1:
                raise ValueError(f"{zeros:g} is not a share between 0 and 1")
        return value

    @field_validator("vocabulary")
    @classmethod
    def _check_vocabulary(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for tokens in value:
            if tokens < 2:
                raise ValueError(f"{tokens} is not a vocabulary size: keep at least 2 tokens")
        return value

    @property
    def effective_min_accuracy_ratio(self) -> float:
        """Minimum ratio of accuracy to the dense model's; 0.98 by default for size and speed."""
        if self.min_accuracy_ratio or self.objective in ("accuracy", "seconds-per-correct-answer"):
            return self.min_accuracy_ratio
        return 0.98


class LadderLimits(_Section):
    """Limits within which a rung loses nothing measurable beside the dense model.

    Mean KL divergences, in nats, choose the rung that is made first; upper bounds of its
    verification judge it, from ``min_prompts`` prompts on: fewer would say little.
    """

    # On two reasoners, files up to 7.2e-4 on traces lost at most 0.1 points of 1,000 prompts, those
    # from 9.2e-4 on lost 1.6 to 17 (benchmarks/RESULTS.md, "Optimized rounding"). Q3_K rounded to
    # nearest has 0.23 on text.
    max_kl_traces: FiniteNonNegative = 8e-4
    max_kl_text: FiniteNonNegative = 0.1
    max_accuracy_drop: Share = 0.015
    max_length_ratio: FiniteNonNegative = 1.03
    min_prompts: PositiveCount = 1000


class Recipe(_Section):
    """Complete settings of one build; :mod:`racdeploy.verification.gate` reads ``gate``.

    With ``rungs`` the build makes the narrowest of them that loses nothing measurable by the limits
    of ``ladder``.
    """

    schema_version: Literal[1] = 1
    model: str = "tiny-reasoner"
    target: str = "gguf"
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
    gate: TomlTable = {}

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.recover.shorten and self.traces.count < 2:
            raise ValueError(
                "recover.shorten learns from one prompt and judges by another: raise traces.count"
            )
        return self

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

        merged = merge_settings(target.propose(requested), requested)
        recipe = validate(cls, merged, where, _INIT_COMMAND)

        for each in (recipe, *map(recipe.for_target, recipe.also)):
            each._check_plugins()
            export, context_tokens = each.export, each.verify.context_tokens
            Target.read(each.target).check(export.format, export.quant, context_tokens)

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
            known = plugins.list_names(kind)
            if kind == "quant":
                known += plugins.list_names("presets")
            if name not in known:
                raise plugins.unknown_plugin(kind, name, known)
