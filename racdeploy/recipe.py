"""What a build shall do: its parts, and how target, recipe file and options combine.

Precedence, low to high: defaults, target, recipe file, command-line options. A target's limits
bind: a recipe that contradicts one is an error. ``recipe.toml`` explains every key.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
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
from racdeploy.files.toml import Table, merge, read_toml, validate
from racdeploy.manifest import MOST_TOKENS
from racdeploy.results.part import Finite, InnerShare, Positive, Share
from racdeploy.targets import Target

EXAMPLE = (files("racdeploy") / "recipe.toml").read_text(encoding="utf-8")
"""What ``racdeploy init`` writes: every option, those that are seldom set as comments."""
_ZEROS = {"method", "pattern", "sparsity", "allocation"}
"""Keys of ``prune`` that ask for zeros."""
_PLAIN = {"magnitude": {"match_dense": False, "refit_steps": 0}}
"""What a method means by its name alone: magnitude moves no weight that stays."""
_HESITATION = ("Wait", "Alternatively", "Hmm", "But", "However", "Maybe", "Perhaps", "Actually")
_PATTERN = re.compile(r"^(\d+):(\d+)$")
# A bundle brings its recipe along, so no number in it may be without a bound.
_MOST_PROMPTS = 1_000_000
_MOST_SAMPLES = 256
BatchSize = Annotated[int, Field(ge=1, le=1024)]
_MOST_SECONDS = 1e6
MOST_DIFFERENCES = 0.05
"""Largest share of strings that may be tokenized differently: beyond it, a rule is another one."""
_ADDRESS = re.compile(r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$")


Names = tuple[str, ...]
Zeros = float | str
"""Zeros of a linear: a share of its weights, or N:M."""


def read_kept_of(zeros: Zeros) -> tuple[int, int] | None:
    """Return N and M, of which N are kept, or None of a share and of a text that is not N:M."""
    match = _PATTERN.match(zeros) if isinstance(zeros, str) else None
    if not match or not 0 < int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])


def count_zeros(zeros: Zeros) -> float:
    """Return the share of a linear's weights that are zeros."""
    if not isinstance(zeros, str):
        return zeros
    kept_of = read_kept_of(zeros)
    assert kept_of, "which was checked"
    return 1 - kept_of[0] / kept_of[1]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Traces(_Part):
    """How the model's own chains of thought are collected."""

    count: int = Field(256, ge=1, le=_MOST_PROMPTS)
    temperature: Finite = 0.6
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(1024, ge=1, le=MOST_TOKENS)
    batch: BatchSize = 64  # one shard on disk each
    seed: NonNegativeInt = 0
    server: str = ""
    server_model: str = ""
    server_key_env: str = ""
    server_concurrency: BatchSize = 16
    server_timeout_s: float = Field(1800.0, gt=0, le=_MOST_SECONDS)
    server_reload: Literal["", "sglang", "vllm"] = ""

    # Not of the field: the message would show an address with a key in it.
    @model_validator(mode="after")
    def _check_server(self) -> Self:
        if self.server and not _ADDRESS.match(self.server):
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
    def identity(self) -> Table:
        """What decides the traces: the model and its sampling, and not how a server is reached.

        A server whose model is named may move; otherwise its address stands for the model.
        """
        values = self.model_dump()
        sampling = {key: value for key, value in values.items() if not key.startswith("server")}
        if self.server:
            sampling["server"] = self.server_model or self.server
        return sampling

    def refuse_key_of_a_file(self, typed: Mapping[str, Any], allowed: str) -> None:
        """Refuse to send a secret of this machine where only a recipe file says so.

        Args:
            typed: what the command line says of the traces.
            allowed: host that the user names as one that may have the key.
        """
        is_typed = typed.get("server_key_env") and typed.get("server")
        host = urllib.parse.urlsplit(self.server).hostname or ""
        if not self.server_key_env or is_typed or host == allowed.lower():
            return

        raise UsageError(
            "key-not-allowed",
            f"the recipe file sends the environment variable {self.server_key_env} to {host}",
            remedy=f"if you want that: --allow-key-to {host}",
        )


class StreamWeights(_Part):
    """What a token counts in the Hessian, by the stream it belongs to."""

    prompt: NonNegativeFloat = 1.0
    thinking: NonNegativeFloat = 1.0
    answer: NonNegativeFloat = 1.0


class Calibration(_Part):
    """Which trace tokens the statistics see."""

    source: Literal["rac", "prompt"] = "rac"
    max_tokens: NonNegativeInt = 0
    only_correct: bool = False
    keep_truncated: bool = False
    held_out_share: float = Field(0.125, ge=0, le=0.5)
    weights: StreamWeights = Field(default_factory=StreamWeights)


class Pruning(_Part):
    """How weights are chosen and compensated.

    ``shares`` are the zeros of linears by a regular expression, of which the first that matches
    decides: a sparsity, or N:M. The others have what makes ``sparsity`` that of all together.
    """

    method: str = "sparsegpt"
    sparsity: float = Field(0.5, ge=0, lt=1)
    pattern: str = "unstructured"
    allocation: str = "uniform"
    match_dense: bool = True
    refit_steps: NonNegativeInt = 20
    joint: bool = False
    damping: float = Field(0.01, gt=0, le=1)
    # 60 % zeros, embedded model: held-out error 0.0245 at 16 columns, 0.0314 at 128.
    column_block: Positive = 16
    compute: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dense: Names = ()
    shares: dict[str, Zeros] = Field(default_factory=dict)
    expert_tokens: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_method(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**_PLAIN.get(str(values.get("method")), {}), **values}

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        if value != "unstructured" and read_kept_of(value) is None:
            raise ValueError("neither 'unstructured' nor N:M with 0 < N < M, as 2:4")
        return value

    @field_validator("dense")
    @classmethod
    def _check_dense(cls, value: Names) -> Names:
        for pattern in value:
            _check_regex(pattern)
        return value

    @field_validator("shares")
    @classmethod
    def _check_shares(cls, value: dict[str, Zeros]) -> dict[str, Zeros]:
        for pattern, zeros in value.items():
            _check_regex(pattern)
            if isinstance(zeros, str):
                is_known = read_kept_of(zeros) is not None
            else:
                is_known = 0 <= zeros < 1
            if not is_known:
                raise ValueError(f"{pattern!r} = {zeros!r} is no share from 0, below 1, and no N:M")
        return value

    @model_validator(mode="after")
    def _check_sparsity(self) -> Self:
        if self.shares and (self.kept_of or self.allocation != "uniform"):
            raise ValueError("shares go with pattern 'unstructured' and allocation 'uniform'")
        if self.kept_of is None:
            return self

        if self.allocation != "uniform":
            raise ValueError(
                f"pattern {self.pattern} leaves nothing to allocate; use allocation = 'uniform'"
            )

        kept, of = self.kept_of
        implied = 1 - kept / of
        if "sparsity" in self.model_fields_set and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} means sparsity {implied:g}, not {self.sparsity:g}"
            )

        object.__setattr__(self, "sparsity", implied)
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """N and M of the N:M pattern of all linears, or None."""
        return read_kept_of(self.pattern)

    @property
    def patterns(self) -> str:
        """The pattern of all linears, or those that ``shares`` give some, with "and" between."""
        given = filter(None, self.shares.values())
        named = {zeros if isinstance(zeros, str) else self.pattern for zeros in given}
        return " and ".join(sorted(named)) or self.pattern

    def kept_of_linear(self, linear: str) -> tuple[int, int] | None:
        """Return N and M of a linear's own pattern, or of that of all; None where it has none."""
        for pattern, zeros in self.shares.items():
            if re.search(pattern, linear):
                return read_kept_of(zeros)
        return self.kept_of

    def check_width(self, weight: str, inputs: int) -> None:
        """Refuse a weight whose inputs its N:M pattern does not divide."""
        kept_of = self.kept_of_linear(weight.removesuffix(".weight"))
        if kept_of and inputs % kept_of[1]:
            kept, of = kept_of
            raise UsageError(
                "pattern-does-not-divide",
                f"pattern {kept}:{of} does not divide the {inputs} inputs of {weight}",
                remedy=f"choose an M that divides {inputs}, or --pattern unstructured",
            )


class Structure(_Part):
    """How much of the model's structure stays, before zeros are chosen in what is left.

    ``keep`` has a share for each part that is cut, by the name of its plugin; of the vocabulary a
    count of tokens, too. What is ``optional`` is cut less, or not at all, where a model or a format
    has no room for it.
    """

    keep: dict[str, float] = Field(default_factory=dict)
    optional: bool = False
    uniform: bool = False
    multiple: NonNegativeInt = 0
    criterion: str = "error"
    vocabulary_text: Names = ()

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, value: dict[str, float]) -> dict[str, float]:
        for part, share in value.items():
            _check_name("structures", "part", part)
            counted = plugins.constants("structures", part).get("COUNTED")
            if not (0 < share <= 1 or (counted and share > 0 and share.is_integer())):
                also = f", or a count of {counted}" if counted else ""
                raise ValueError(f"{part} = {share:g} is not a share above 0, up to 1{also}")
        return value

    @property
    def parts(self) -> Names:
        """Names of the parts that are cut, sorted."""
        return tuple(sorted(part for part, share in self.keep.items() if share != 1))

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if self.vocabulary_text and not self.cuts_vocabulary:
            raise ValueError("vocabulary_text without vocabulary in keep")
        return self

    @property
    def sizes(self) -> frozenset[str]:
        """Letters of the sizes that become smaller, see :mod:`racdeploy.prune.structures`."""
        read = plugins.constants
        return frozenset(read("structures", part)["SIZE"] for part in self.parts)

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether fewer tokens stay than there are."""
        return "V" in self.sizes

    @property
    def width_multiple(self) -> int:
        """What feed-forward widths are multiples of; most number formats have blocks of 32."""
        return self.multiple or 32

    def share(self, part: str) -> float:
        """Return how much of a part stays; 1 is all of it."""
        return self.keep.get(part, 1.0)


class LearnedWeights(StreamWeights):
    """What a token counts in what is learned: the model's own words, and not its prompts."""

    prompt: NonNegativeFloat = 0.0


class Recovery(_Part):
    """How a pruned model learns from the dense one; nothing at 0 tokens.

    ``ways`` are plugins, one after the other on the dense model's traces; none is the best that
    fits into memory. A share of the tokens is learned on the model's own answers, in rounds.
    """

    tokens: NonNegativeInt = 0
    ways: Names = ()
    on_policy: Share = 0.25
    rounds: Positive = 2
    probe_drop: float = Field(0.01, ge=0, lt=1)
    rate: NonNegativeFloat = 0.0
    step_tokens: Positive = 2048
    average: float = Field(0.0, ge=0, lt=1)
    weights: LearnedWeights = Field(default_factory=LearnedWeights)
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mix: str = ""
    mix_share: InnerShare = 0.3
    seed: NonNegativeInt = 0

    @field_validator("ways")
    @classmethod
    def _check_ways(cls, value: Names) -> Names:
        for way in value:
            _check_name("ways", "way", way)
        return value

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if not (self.weights.thinking or self.weights.answer):
            raise ValueError("weights leave nothing to learn: thinking or answer must count")
        return self


class Export(_Part):
    """The exported file; of ``tensors`` the first pattern that matches overrides the preset.

    ``allow_losing_zeros`` lets a build go on whose number format does not keep what it prunes,
    ``accept_token_differences`` one whose engine tokenizes that share of hard strings differently.
    """

    format: str = "gguf"
    quant: str = "q8_0"
    packing: str = "plain"
    pre_tokenizer: str | None = None
    accept_token_differences: float = Field(0.0, ge=0, le=MOST_DIFFERENCES, allow_inf_nan=False)
    exporter: str = "auto"
    tensors: dict[str, str] = Field(default_factory=dict)
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
        known = plugins.names("quant")
        checked = {}

        for pattern, quant in value.items():
            _check_regex(pattern)
            name = checked[pattern] = quant.lower()
            if name not in known:
                nearest = plugins.closest(name, known)
                raise ValueError(f"unknown quant {quant!r} for {pattern!r}{nearest}")
        return checked


class Verification(_Part):
    """How the artifact is compared with the dense model."""

    count: int = Field(200, ge=1, le=_MOST_PROMPTS)
    samples: int = Field(1, ge=1, le=_MOST_SAMPLES)
    max_new_tokens: int = Field(1024, ge=1, le=MOST_TOKENS)
    max_thinking_tokens: int = Field(0, ge=0, le=MOST_TOKENS)
    temperature: Finite = 0.0
    logit_traces: int = Field(16, ge=0, le=_MOST_PROMPTS)
    controls: Names = ()
    parallel: BatchSize = 16
    context_tokens: int = Field(2048, ge=16, le=MOST_TOKENS)
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 are {self.samples} equal completions"
            )
        return self


class Thinking(_Part):
    """What is done about the thinking of what ships; see docs/thinking.md.

    ``closing`` and ``close_bias`` also go with a budget that the app or a user gives later.
    """

    max_tokens: int = Field(0, ge=0, le=MOST_TOKENS)
    closing: str = ""
    close_bias: Finite = 0.0
    hesitation: Names = _HESITATION
    hesitation_penalty: Finite = 0.0
    tune: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.hesitation and (self.tune or self.hesitation_penalty):
            raise ValueError("there are no words of hesitation to penalize")
        if self.tune and self.hesitation_penalty:
            raise ValueError("hesitation_penalty is what tune = true chooses: give one of them")
        return self


class Runtime(_Part):
    """How the model is run where it ships, which is how it is verified."""

    thinking: Thinking = Field(default_factory=Thinking)


class Tune(_Part):
    """What ``racdeploy tune`` looks for, and among what; limits at 0 are none.

    Candidates are every number format of the target (or ``quants``), with nothing pruned, and with
    these shares of the feed-forward part kept, or with these zeros.
    """

    objective: Literal["size", "speed", "seconds-per-correct-answer", "accuracy"] = "accuracy"
    max_bytes: NonNegativeInt = 0
    max_memory_bytes: NonNegativeInt = 0
    min_tokens_per_s: Finite = 0.0
    min_accuracy_ratio: Share = 0.0
    budget_s: float = Field(3600.0, gt=0, le=_MOST_SECONDS)
    quants: Names = ()
    ffn: tuple[float, ...] = (0.875, 0.75, 0.625, 0.5)
    zeros: tuple[Zeros, ...] = ()
    vocabulary: tuple[int, ...] = ()
    recover_tokens: NonNegativeInt = 0
    prompts: int = Field(256, ge=16, le=_MOST_PROMPTS)
    seed: NonNegativeInt = 1

    @field_validator("ffn", "zeros")
    @classmethod
    def _check_shares(cls, value: tuple[Zeros, ...]) -> tuple[Zeros, ...]:
        for zeros in value:
            is_pattern = isinstance(zeros, str)
            if is_pattern and read_kept_of(zeros) is None:
                raise ValueError(f"{zeros!r} is not N:M, as 2:4")
            if not is_pattern and not 0 < count_zeros(zeros) < 1:
                raise ValueError(f"{zeros:g} is not a share between 0 and 1")
        return value

    @field_validator("vocabulary")
    @classmethod
    def _check_vocabulary(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for tokens in value:
            if tokens < 2:
                raise ValueError(f"{tokens} is no number of tokens that are kept")
        return value

    @property
    def least_ratio(self) -> float:
        """What of the dense model's accuracy must stay: where accuracy is no aim, most of it."""
        if self.min_accuracy_ratio or self.objective in ("accuracy", "seconds-per-correct-answer"):
            return self.min_accuracy_ratio
        return 0.98


class Recipe(_Part):
    """One build, complete; ``gate`` is read by :mod:`racdeploy.verify.gate`."""

    model: str = "tiny-reasoner"
    target: str = "gguf"
    also: Names = ()
    tasks: Names = ()
    calibration_tasks: Names = ()
    traces: Traces = Field(default_factory=Traces)
    calibration: Calibration = Field(default_factory=Calibration)
    structure: Structure = Field(default_factory=Structure)
    prune: Pruning = Field(default_factory=Pruning)
    recover: Recovery = Field(default_factory=Recovery)
    export: Export = Field(default_factory=Export)
    runtime: Runtime = Field(default_factory=Runtime)
    verify: Verification = Field(default_factory=Verification)
    tune: Tune = Field(default_factory=Tune)
    gate: Table = Field(default_factory=dict)

    @classmethod
    def combine(cls, file: Path | None, options: Mapping[str, Any]) -> Self:
        """Build a recipe from its target, a recipe file and nested options, checked.

        Options win over the file; those that are None are ignored.
        """
        written = read_toml(file) if file else {}
        asked = merge(written, _without_none(options))

        name = asked.get("target", cls.model_fields["target"].default)
        target = Target.read(str(name))

        proposed = merge(target.defaults, _propose_pruning(target, asked))
        merged = merge(proposed, asked)
        where = str(file) if file else "the command line"
        recipe = validate(cls, merged, where, "racdeploy init")

        for each in (recipe, *map(recipe.at, recipe.also)):
            each._check_plugins()
            export, context_tokens = each.export, each.verify.context_tokens
            Target.read(each.target).check(export.format, export.quant, context_tokens)

        return recipe

    def at(self, target: str) -> Self:
        """Return this recipe for another target alone, with that target's export."""
        other = Target.read(target)
        asked = {
            "format": other.format,
            "quant": other.quant,
            "packing": other.packing,
            "allow_losing_zeros": self.export.allow_losing_zeros,
        }
        export = validate(Export, asked, f"target {target}")
        return self.model_copy(update={"target": target, "also": (), "export": export})

    def unpruned(self) -> Self:
        """Return this recipe with nothing cut, no zeros, and one format for all linears."""
        structure = self.structure.model_copy(update={"keep": {}, "vocabulary_text": ()})
        none = {"sparsity": 0.0, "pattern": "unstructured", "allocation": "uniform"}
        prune = self.prune.model_copy(update=none | {"shares": {}})
        export = self.export.model_copy(update={"tensors": {}})

        parts = {"structure": structure, "prune": prune, "export": export}
        return self.model_copy(update=parts)

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """Return this recipe with other values of some keys, by part, checked."""
        values = merge(self.model_dump(), settings)
        return validate(type(self), values, "the candidate")

    def _check_plugins(self) -> None:
        chosen = {
            "methods": self.prune.method,
            "allocations": self.prune.allocation,
            "criteria": self.structure.criterion,
            "formats": self.export.format,
            "quant": self.export.quant,
            "packing": self.export.packing,
        }

        for kind, name in chosen.items():
            known = plugins.names(kind)
            if kind == "quant":
                known += plugins.names("presets")
            if name not in known:
                raise plugins.unknown(kind, name, known)


def _propose_pruning(target: Target, asked: Mapping[str, Any]) -> dict[str, Table]:
    """Return what is pruned where nobody says it.

    Who asks for zeros, or for a packing that leaves them out, gets half of them if no more is said,
    and nothing is cut; who asks for a cut gets no zeros; who asks for neither gets what the target
    proposes.
    """
    parts = [asked.get(name, {}) for name in ("prune", "structure", "export")]
    prune, structure, export = (part if isinstance(part, Mapping) else {} for part in parts)

    packed = export.get("packing", target.packing) != "plain"
    if packed or not _ZEROS.isdisjoint(prune):
        return {}
    if "keep" in structure:
        return {"prune": {"sparsity": 0.0}}
    return target.pruning


def _check_name(kind: str, what: str, name: str) -> None:
    known = plugins.names(kind)
    if name not in known:
        nearest = plugins.closest(name, known)
        raise ValueError(f"unknown {what} {name!r}{nearest}; known: {', '.join(known)}")


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _without_none(options: Mapping[str, Any]) -> Table:
    kept = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            value = _without_none(value) or None
        if value is not None:
            kept[key] = value
    return kept
