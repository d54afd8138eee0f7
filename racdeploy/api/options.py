"""Options of the commands: a record for each command, and how its options set the recipe.

A record is made from the keywords of a Python function or from a command line. What ``--help``
shows of an option stands beside its field; an option without a help text has that of the Python
function's docstring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from racdeploy.files.toml import TomlTable
    from racdeploy.recipe import Recipe
    from racdeploy.recipe_settings import RecipeSettings
    from racdeploy.sparse_kernels import AccelMode
    from racdeploy.verification.gate import Gate

Names = tuple[str, ...]
MODEL = "Model and task"
PRUNING = "Pruning"
FORMAT = "Number format and packing"
LIMITS = "Objective and limits"
RECOVERY = "Recovery"
VERIFICATION = "Verification"
SERVER = "Server instead of the artifact"
HARNESS = "Evaluation harness"
SIGNATURE = "Signature"
OUTPUT = "Output and resources"
PANELS = (
    *("", MODEL, PRUNING, FORMAT, LIMITS, RECOVERY),
    *(VERIFICATION, SERVER, HARNESS, SIGNATURE, OUTPUT),
)
"""Groups of ``--help`` in their order, first the one without a name."""


@dataclass(frozen=True)
class OptionHelp:
    """Text, group and bounds of an option in ``--help``.

    Args:
        panel: group of the option.
        help: text; empty takes that of the Python function's docstring.
        names: names of the option, if they are not its field's.
        minimum: smallest number that is accepted.
        is_argument: True for a value without a name.
    """

    panel: str = ""
    help: str = ""
    metavar: str | None = None
    names: Names = ()
    minimum: float | None = None
    is_argument: bool = False


_MODEL_HELP = "Local folder or Hub id; default: tiny-reasoner, the embedded model."
_SETTINGS_HELP = "Recipe key and TOML value; repeatable; overrides other options."
_SETTINGS = OptionHelp(MODEL, _SETTINGS_HELP, "PART.KEY=VALUE", ("--set",))
_KEEP_HELP = "Share of a part to keep: {structures}; repeatable; default: the target's."
_OUT = ("--out", "-o")


EvaluationPrompts = Annotated[
    int | None,
    OptionHelp(
        VERIFICATION,
        "Number of evaluation prompts, in place of the tier's; default: 200.",
        minimum=1,
    ),
]


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options of every stage that asks the dense model: model, recipe, tasks and traces.

    Args:
        model: None takes the recipe's.
        settings: nested values of the recipe, which override the other options.
    """

    model: Annotated[str | None, OptionHelp(MODEL, _MODEL_HELP, is_argument=True)] = None
    target: Annotated[str | None, OptionHelp(MODEL)] = None
    recipe: Annotated[
        Recipe | Path | None, OptionHelp(MODEL, "TOML recipe; racdeploy init writes one.")
    ] = None
    settings: Annotated[Mapping[str, Any], _SETTINGS] = field(default_factory=dict)
    tasks: Annotated[Names, OptionHelp(MODEL)] = ()
    calibration_tasks: Annotated[
        Names, OptionHelp(MODEL, "Tasks for the traces; default: the tasks to verify on.")
    ] = ()
    trace_prompts: Annotated[
        int | None, OptionHelp(MODEL, "Number of calibration prompts; default: 256.", minimum=1)
    ] = None
    trace_server: Annotated[
        str | None,
        OptionHelp(MODEL, "OpenAI-compatible API that generates the traces, http://HOST:PORT/v1."),
    ] = None
    key_host: Annotated[str, OptionHelp(MODEL, metavar="HOST")] = ""
    work: Annotated[Path | None, OptionHelp(OUTPUT)] = None
    threads: Annotated[int, OptionHelp(OUTPUT, minimum=0)] = 0

    def to_settings(self) -> RecipeSettings:
        """Return the settings that the options make in a recipe; None where one is not given."""
        return {
            "model": self.model,
            "target": self.target,
            "tasks": self.tasks or None,
            "calibration_tasks": self.calibration_tasks or None,
            "traces": {"count": self.trace_prompts, "server": self.trace_server or None},
        }


@dataclass(frozen=True, kw_only=True)
class PruneOptions(TraceOptions):
    """Options of pruning.

    Args:
        sparsity: a number, or a text that the recipe checks.
    """

    calibration: Annotated[
        str | None,
        OptionHelp(
            MODEL,
            "Part of the traces to prune on: rac (prompt and thinking; default) or prompt.",
        ),
    ] = None
    keep: Annotated[Mapping[str, float], OptionHelp(PRUNING, _KEEP_HELP, "PART=SHARE")] = field(
        default_factory=dict
    )
    vocabulary_text: Annotated[
        Names, OptionHelp(PRUNING, "Texts whose tokens a cut vocabulary keeps.")
    ] = ()
    sparsity: Annotated[
        float | str | None,
        OptionHelp(
            PRUNING,
            "Fraction of zeros, 0 to 1; default: 0, or 0.5 if other options need zeros.",
            "SHARE",
        ),
    ] = None
    pattern: Annotated[
        str | None,
        OptionHelp(PRUNING, "N:M, with N weights kept of M; or unstructured, the default."),
    ] = None
    method: Annotated[str | None, OptionHelp(PRUNING, "Pruning method; default: sparsegpt.")] = None
    recover_tokens: Annotated[
        int | None,
        OptionHelp(RECOVERY, "Tokens of the training that recovers accuracy; 0 is off.", minimum=0),
    ] = None
    shorten: Annotated[
        bool, OptionHelp(RECOVERY, "First let the model learn to think less; see docs/thinking.md.")
    ] = False

    def to_settings(self) -> RecipeSettings:
        """Return the settings that the options make in a recipe; None where one is not given."""
        return super().to_settings() | {
            "calibration": {"source": self.calibration},
            "structure": {
                "keep": dict(self.keep) or None,
                "vocabulary_text": self.vocabulary_text or None,
            },
            "prune": {"sparsity": self.sparsity, "pattern": self.pattern, "method": self.method},
            "recover": {"tokens": self.recover_tokens, "shorten": self.shorten or None},
        }


@dataclass(frozen=True, kw_only=True)
class BuildOptions(PruneOptions):
    """Options of a whole build."""

    more_targets: Annotated[Names, OptionHelp(MODEL)] = ()
    effort: Annotated[
        str | None,
        OptionHelp(
            MODEL,
            "quick, default or thorough: tokens to calibrate on, and questions to compare by.",
        ),
    ] = None
    quant: Annotated[
        str | None,
        OptionHelp(FORMAT, "Number format of the linears; default: q8_0, or the target's."),
    ] = None
    packing: Annotated[
        str | None,
        OptionHelp(FORMAT, "Storage of the zeros; default: plain, stored like other weights."),
    ] = None
    allow_losing_zeros: Annotated[
        bool, OptionHelp(FORMAT, "Continue even if the number format does not preserve the zeros.")
    ] = False
    accept_token_differences: Annotated[
        float | None,
        OptionHelp(
            FORMAT,
            "Share of hard strings that llama.cpp may tokenize differently; default: 0.",
        ),
    ] = None
    no_worse_than: Annotated[
        str | None,
        OptionHelp(
            FORMAT,
            "Number format or preset of the download that a default build must not be worse than; "
            "default: q4_k_m, or the target's.",
            "QUANT",
        ),
    ] = None
    tier: Annotated[str, OptionHelp(VERIFICATION)] = ""
    prompts: EvaluationPrompts = None
    gate: Annotated[Gate | Path | None, OptionHelp(VERIFICATION)] = None
    compare_same_size: Annotated[
        bool, OptionHelp(VERIFICATION, "Evaluate dense models of about the artifact's size too.")
    ] = False
    out: Annotated[Path | None, OptionHelp(OUTPUT, names=_OUT)] = None

    def to_settings(self) -> RecipeSettings:
        """Return the settings that the options make in a recipe; None where one is not given."""
        from racdeploy.verification.rivals import SAME_SIZE

        return super().to_settings() | {
            "effort": self.effort,
            "also": self.more_targets or None,
            "ladder": {"no_worse_than": self.no_worse_than},
            "export": {
                "quant": self.quant,
                "packing": self.packing,
                "allow_losing_zeros": self.allow_losing_zeros or None,
                "accept_token_differences": self.accept_token_differences,
            },
            "verify": {
                "count": self.prompts,
                "controls": [SAME_SIZE] if self.compare_same_size else None,
            },
            "gate": _read_gate_table(self.gate),
        }


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(TraceOptions):
    """Options of the recovery of a pruned model."""

    pruned: Annotated[Path | None, OptionHelp(MODEL, is_argument=True)] = None
    recover_tokens: Annotated[
        int | None,
        OptionHelp(RECOVERY, "Tokens of the training that recovers accuracy; 0 is off.", minimum=0),
    ] = None

    def to_settings(self) -> RecipeSettings:
        """Return the settings that the options make in a recipe; None where one is not given."""
        return super().to_settings() | {"recover": {"tokens": self.recover_tokens}}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export."""

    model: Annotated[str, OptionHelp(MODEL, _MODEL_HELP, is_argument=True)]
    target: Annotated[str | None, OptionHelp(MODEL)] = None
    quant: Annotated[str | None, OptionHelp(FORMAT)] = None
    packing: Annotated[str | None, OptionHelp(FORMAT)] = None
    allow_losing_zeros: Annotated[bool, OptionHelp(FORMAT)] = False
    accept_token_differences: Annotated[float | None, OptionHelp(FORMAT)] = None
    out: Annotated[Path | None, OptionHelp(OUTPUT, names=_OUT)] = None
    work: Annotated[Path | None, OptionHelp(OUTPUT)] = None

    def to_settings(self) -> RecipeSettings:
        """Return the settings that the options make in a recipe; None where one is not given."""
        return {
            "model": self.model,
            "target": self.target,
            "export": {
                "quant": self.quant,
                "packing": self.packing,
                "allow_losing_zeros": self.allow_losing_zeros or None,
                "accept_token_differences": self.accept_token_differences,
            },
        }


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TraceOptions):
    """Options of a search: what is best, its limits, and its time."""

    objective: Annotated[
        str | None,
        OptionHelp(LIMITS, "accuracy, the default, size, speed or seconds-per-correct-answer."),
    ] = None
    max_bytes: Annotated[int | None, OptionHelp(LIMITS, "Maximum file size, as 1.5GB.", "SIZE")] = (
        None
    )
    max_memory: Annotated[
        int | None, OptionHelp(LIMITS, "Maximum memory, as 4GB; default: the target's.", "SIZE")
    ] = None
    min_tokens_per_s: Annotated[
        float | None, OptionHelp(LIMITS, "Minimum speed on the target.")
    ] = None
    min_accuracy_ratio: Annotated[
        float | None, OptionHelp(LIMITS, "Minimum share of the dense model's accuracy.")
    ] = None
    budget: Annotated[
        float | None, OptionHelp(LIMITS, "Maximum time of the search, as 90m or 2h.", "TIME")
    ] = None
    recover_tokens: Annotated[
        int | None,
        OptionHelp(
            RECOVERY,
            "Tokens of the training of pruned candidates; 0 is off.",
            minimum=0,
        ),
    ] = None
    tier: Annotated[str, OptionHelp(VERIFICATION)] = ""
    prompts: EvaluationPrompts = None
    out: Annotated[Path | None, OptionHelp(OUTPUT, names=_OUT)] = None

    def to_settings(self) -> RecipeSettings:
        """Return the settings that the options make in a recipe; None where one is not given."""
        return super().to_settings() | {
            "tune": {
                "objective": self.objective,
                "max_bytes": self.max_bytes,
                "max_memory_bytes": self.max_memory,
                "min_tokens_per_s": self.min_tokens_per_s,
                "min_accuracy_ratio": self.min_accuracy_ratio,
                "budget_s": self.budget,
                "recover_tokens": self.recover_tokens,
            },
            "verify": {"count": self.prompts},
        }


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of the verification of a bundle."""

    bundle: Annotated[Path, OptionHelp(is_argument=True)]
    tier: Annotated[str, OptionHelp(VERIFICATION)] = ""
    tasks: Annotated[Names, OptionHelp(VERIFICATION)] = ()
    gate: Annotated[Gate | Path | None, OptionHelp(VERIFICATION)] = None
    baseline: Annotated[Path | None, OptionHelp(VERIFICATION)] = None
    server: Annotated[str, OptionHelp(SERVER)] = ""
    server_model: Annotated[str, OptionHelp(SERVER)] = ""
    server_key_env: Annotated[str, OptionHelp(SERVER)] = ""
    server_api: Annotated[Literal["chat", "completions"], OptionHelp(SERVER)] = "chat"
    server_timeout: Annotated[float, OptionHelp(SERVER, metavar="SECONDS", minimum=0.1)] = 1800.0
    harness: Annotated[str, OptionHelp(HARNESS)] = ""
    harness_tasks: Annotated[
        Names, OptionHelp(HARNESS, "Names of the harness's tasks, separated by commas.", "NAMES")
    ] = ()
    harness_limit: Annotated[int, OptionHelp(HARNESS, minimum=0)] = 0
    harness_include: Annotated[Path | None, OptionHelp(HARNESS)] = None
    harness_python: Annotated[Path | None, OptionHelp(HARNESS)] = None
    signature: Annotated[Path | None, OptionHelp(SIGNATURE)] = None
    public_key: Annotated[Path | None, OptionHelp(SIGNATURE)] = None
    identity: Annotated[str, OptionHelp(SIGNATURE, metavar="WHO")] = ""
    issuer: Annotated[str, OptionHelp(SIGNATURE, metavar="URL")] = ""
    work: Annotated[Path | None, OptionHelp(OUTPUT)] = None
    accel: Annotated[AccelMode, OptionHelp(OUTPUT)] = "auto"
    threads: Annotated[int, OptionHelp(OUTPUT, minimum=0)] = 0


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Options of the questions and answers of compared models."""

    tasks: Annotated[Names, OptionHelp()] = ()
    prompts: Annotated[int | None, OptionHelp(minimum=1)] = None
    samples: Annotated[int | None, OptionHelp(minimum=1)] = None
    temperature: Annotated[float | None, OptionHelp()] = None
    max_new_tokens: Annotated[int | None, OptionHelp()] = None
    max_thinking_tokens: Annotated[int | None, OptionHelp()] = None
    context_tokens: Annotated[int | None, OptionHelp()] = None
    parallel: Annotated[int | None, OptionHelp()] = None
    seed: Annotated[int | None, OptionHelp()] = None
    cache_type: Annotated[Literal["f16", "f32", "q8_0"], OptionHelp()] = "f16"
    flash_attention: Annotated[bool, OptionHelp()] = False
    work: Annotated[Path | None, OptionHelp(OUTPUT)] = None
    threads: Annotated[int, OptionHelp(OUTPUT, minimum=0)] = 0


@dataclass(frozen=True, kw_only=True)
class CompareOptions(AnswerOptions):
    """Options of a comparison.

    Args:
        candidates: texts: a path would spoil the address of a server.
    """

    candidates: Annotated[Names, OptionHelp(is_argument=True)]
    against: Annotated[str, OptionHelp()]
    server_key_env: Annotated[str, OptionHelp()] = ""
    tier: Annotated[str, OptionHelp(VERIFICATION)] = ""
    gate: Annotated[Gate | Path | None, OptionHelp(VERIFICATION)] = None


@dataclass(frozen=True, kw_only=True)
class RecordOptions(AnswerOptions):
    """Options of the record of a reference."""

    model: Annotated[Path, OptionHelp(is_argument=True)]
    out: Annotated[Path, OptionHelp(OUTPUT, names=_OUT)]


def _read_gate_table(gate: Gate | Path | None) -> TomlTable | None:
    """Return the recipe's table of a gate; raise UsageError for a file that is none."""
    if gate is None:
        return None

    from racdeploy.files.toml import read_toml
    from racdeploy.verification.gate import read_gate

    if not isinstance(gate, Path):
        return gate.to_table()
    read_gate(gate)
    return read_toml(gate)
