"""Options that several commands share, each declared once, and the recipe that they ask for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from racdeploy import plugins
from racdeploy.errors import UsageError

if TYPE_CHECKING:
    from racdeploy.recipe import Recipe

O = TypeVar("O")
Kernels = Literal["auto", "off", "require"]
"""As sparse_kernels.Mode, whose import takes as long as all of --help."""

BundleArg = Annotated[Path, typer.Argument(help="Bundle folder.")]
TargetOpt = Annotated[
    str | None, typer.Option(help="Where it will run, default: gguf; see: racdeploy targets.")
]
QuantOpt = Annotated[
    str | None,
    typer.Option(help="Number format of the linears; default: q8_0, or the target's."),
]
PackingOpt = Annotated[
    str | None, typer.Option(help="How zeros are left out; default: plain, none are.")
]
AcceptOpt = Annotated[
    float | None,
    typer.Option(help="Share of hard strings that llama.cpp may tokenize differently; default: 0."),
]
GateOpt = Annotated[Path | None, typer.Option(help="TOML file with limits; see docs/gate.md.")]
TierOpt = Annotated[str, typer.Option(help="How much is verified: smoke, standard or release.")]
WorkOpt = Annotated[Path | None, typer.Option(help="Folder of stage results; default: user cache.")]
ThreadsOpt = Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses every core.")]
BudgetOpt = Annotated[
    int | None, typer.Option(min=0, help="Maximum thinking tokens; then the thinking is closed.")
]
TemperatureOpt = Annotated[
    float | None, typer.Option(min=0, help="0 is greedy; default: the bundle's.")
]
SeedOpt = Annotated[int, typer.Option(min=0, help="Same seed, same answer.")]
ShowThinkingOpt = Annotated[
    bool,
    typer.Option("--show-thinking", metavar="", help="Print the thinking too, on stderr."),
]
AccelOpt = Annotated[Kernels, typer.Option(help="Kernels for sparse weights; see docs/accel.md.")]
DryRunOpt = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Check all, print the plan, do nothing."),
]
RecoverTokensOpt = Annotated[
    int | None,
    typer.Option(min=0, help="Tokens that the pruned model learns from the dense one; 0 is off."),
]
QuietOpt = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", help="Show no progress, only errors and results."),
]
JsonOpt = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")]
_MODEL_HELP = "Local folder, Hub id, or tiny-reasoner, the default."
_Texts = list[str] | None
_KIND = Parameter.KEYWORD_ONLY
Values = dict[str, Any]
PANELS = {
    "Model and task": (
        *("model", "pruned", "target", "also", "recipe", "assignments", "task", "calibration_task"),
        *("calibration", "trace_prompts", "trace_server", "allow_key_to"),
    ),
    "What is removed": ("keep", "vocabulary_text", "sparsity", "pattern", "method"),
    "Number format and packing": (
        *("quant", "packing", "allow_losing_zeros", "accept_token_differences"),
    ),
    "Recovery": ("recover_tokens",),
    "Verification": ("tier", "prompts", "gate", "controls"),
    "Output and resources": (
        *("out_folder", "out_file", "work", "threads", "dry_run", "quiet", "json_output"),
    ),
}
"""Fields of the commands' options by their group in --help, in its order."""


def flag(name: str, meaning: str) -> Any:
    """Return an option that is on where it is given, and takes no value."""
    return typer.Option(False, name, metavar="", help=meaning)


def _option(*names: str, default: Any = None, **settings: Any) -> Any:
    """Return a field that is an option of a command too."""
    return field(default=default, metadata={"typer": typer.Option(*names, **settings)})


@dataclass(frozen=True)
class TraceOptions:
    """Options of the commands that ask a model: ``traces``, ``prune`` and ``build``."""

    model: Annotated[str | None, typer.Argument(help=_MODEL_HELP, show_default=False)] = None
    target: TargetOpt = None
    recipe: Path | None = _option(help="TOML recipe; see: racdeploy init.")
    assignments: _Texts = _option(
        "--set",
        metavar="PART.KEY=VALUE",
        help="A key of the recipe with a TOML value; repeatable, wins over other options.",
    )
    task: _Texts = _option(
        help="Task to verify on: a name, jsonl:FILE, gsm8k:FILE or hub:gsm8k; repeatable."
    )
    calibration_task: _Texts = _option(help="Task for the traces; default: --task.")
    trace_prompts: int | None = _option(min=1, help="Calibration prompts; default: 256.")
    trace_server: str | None = _option(
        help="OpenAI-compatible API that answers them, http://HOST:PORT/v1."
    )
    allow_key_to: str = _option(
        default="",
        metavar="HOST",
        help="Host that may get the key which a recipe file names; see docs/trace-servers.md.",
    )
    work: WorkOpt = None
    threads: ThreadsOpt = 0
    quiet: QuietOpt = False
    json_output: JsonOpt = False

    def resolve(self) -> Recipe:
        """Return the recipe that the options ask for, checked."""
        from racdeploy.recipe import Recipe

        asked = self._asked()
        recipe = Recipe.combine(self.recipe, asked)
        recipe.traces.refuse_key_of_a_file(asked.get("traces", {}), self.allow_key_to)
        return recipe

    def _asked(self) -> Values:
        from racdeploy.files.toml import merge, read_assignments

        return merge(self._values(), read_assignments(self.assignments or ()))

    def _values(self) -> Values:
        return {
            "model": self.model,
            "target": self.target,
            "tasks": self.task or None,
            "calibration_tasks": self.calibration_task or None,
            "traces": {"count": self.trace_prompts, "server": self.trace_server},
        }


@dataclass(frozen=True)
class PruneOptions(TraceOptions):
    """Options of the commands that prune."""

    keep: _Texts = _option(
        metavar="PART=SHARE",
        help=f"How much of a part stays: {', '.join(plugins.names('structures'))}; repeatable; "
        "default: the target's.",
    )
    sparsity: str | None = _option(
        metavar="SHARE",
        help="Fraction of zeros, 0 to 1; default: 0, or 0.5 where zeros are asked for.",
    )
    pattern: str | None = _option(help="N:M with N kept of M, or unstructured, the default.")
    method: str | None = _option(help="Pruning method; default: sparsegpt.")
    calibration: str | None = _option(help="rac, the default: prompt and thinking; or prompt.")
    recover_tokens: RecoverTokensOpt = None
    vocabulary_text: _Texts = _option(
        metavar="FILE", help="Text whose tokens a cut vocabulary keeps; repeatable."
    )
    dry_run: DryRunOpt = False

    def _values(self) -> Values:
        prune = {"sparsity": self.sparsity, "pattern": self.pattern, "method": self.method}
        return super()._values() | {
            "structure": {
                "keep": _read_shares(self.keep or ()),
                "vocabulary_text": self.vocabulary_text or None,
            },
            "prune": prune,
            "recover": {"tokens": self.recover_tokens},
            "calibration": {"source": self.calibration},
        }


@dataclass(frozen=True)
class RecoverOptions(TraceOptions):
    """Options of the command that lets a pruned model learn from the dense one."""

    pruned: Annotated[Path | None, typer.Argument(help="Folder of the pruned model.")] = None
    recover_tokens: RecoverTokensOpt = None
    dry_run: DryRunOpt = False

    @property
    def folder(self) -> Path:
        """The pruned model's folder, or an error that says how to give it."""
        if self.pruned is None:
            raise UsageError(
                "no-pruned-model",
                "which pruned model? Two models are needed, the dense one first",
                remedy="racdeploy recover MODEL PRUNED --recover-tokens 1000000",
            )
        return self.pruned

    def _values(self) -> Values:
        return super()._values() | {"recover": {"tokens": self.recover_tokens}}


@dataclass(frozen=True)
class BuildOptions(PruneOptions):
    """Options of the command that makes a bundle."""

    also: _Texts = _option(help="A further target, for another engine; repeatable.")
    quant: QuantOpt = None
    packing: PackingOpt = None
    allow_losing_zeros: bool = _option(
        "--allow-losing-zeros",
        default=False,
        metavar="",
        help="Build although --quant does not keep the zeros that are pruned.",
    )
    accept_token_differences: AcceptOpt = None
    prompts: int | None = _option(
        min=1, help="Evaluation prompts, over those of --tier; default: 200."
    )
    out_folder: Path | None = _option(
        "--out", "-o", help="Folder to write; default: the artifact's name, see --dry-run."
    )
    gate: GateOpt = None
    tier: TierOpt = ""
    controls: bool = _option(
        "--controls",
        default=False,
        metavar="",
        help="Let dense models of about the artifact's size answer too.",
    )

    @property
    def prompts_asked(self) -> int:
        """Evaluation prompts that the command line names, which win over a tier's; 0 for none."""
        return int(self._asked()["verify"]["count"] or 0)

    def _values(self) -> Values:
        from racdeploy.files.toml import read_toml
        from racdeploy.verify.controls import SAME_SIZE

        controls = [SAME_SIZE] if self.controls else None
        return super()._values() | {
            "also": self.also or None,
            "export": {
                "quant": self.quant,
                "packing": self.packing,
                "allow_losing_zeros": self.allow_losing_zeros or None,
                "accept_token_differences": self.accept_token_differences,
            },
            "verify": {"count": self.prompts, "controls": controls},
            "gate": read_toml(self.gate, "racdeploy init --gate") if self.gate else None,
        }


@dataclass(frozen=True)
class TuneOptions(TraceOptions):
    """Options of the command that looks for the best model."""

    objective: str | None = _option(
        help="accuracy, the default, size, speed or seconds-per-correct-answer."
    )
    max_bytes: str | None = _option(metavar="SIZE", help="Largest file, as 1.5GB.")
    max_memory: str | None = _option(
        metavar="SIZE", help="Most memory; default: what the target holds."
    )
    min_tokens_per_s: float | None = _option(min=0, help="Least speed on the target.")
    min_accuracy_ratio: float | None = _option(
        min=0, max=1, help="Share of the dense accuracy that must stay."
    )
    budget: str | None = _option(metavar="TIME", help="How long it may take: 90m, 2h.")
    recover_tokens: int | None = _option(
        min=0, help="Let pruned models also learn so many tokens back."
    )
    prompts: int | None = _option(min=1, help="Prompts of the verification; default: 200.")
    out_folder: Path | None = _option(
        "--out", "-o", help="Folder of the bundle; default: the artifact's name."
    )
    tier: TierOpt = ""
    dry_run: DryRunOpt = False

    def _values(self) -> Values:
        from racdeploy.cli.quantities import read_duration, read_size

        wishes = {
            "objective": self.objective,
            "max_bytes": read_size(self.max_bytes, "--max-bytes"),
            "max_memory_bytes": read_size(self.max_memory, "--max-memory"),
            "min_tokens_per_s": self.min_tokens_per_s,
            "min_accuracy_ratio": self.min_accuracy_ratio,
            "budget_s": read_duration(self.budget),
            "recover_tokens": self.recover_tokens,
        }
        return super()._values() | {"tune": wishes, "verify": {"count": self.prompts}}


@dataclass(frozen=True)
class ExportOptions:
    """Options of the command that exports a model folder as it is."""

    model: Annotated[str, typer.Argument(help="Model folder, dense or pruned.")]
    target: TargetOpt = None
    quant: QuantOpt = None
    packing: PackingOpt = None
    allow_losing_zeros: bool = _option(
        "--allow-losing-zeros",
        default=False,
        metavar="",
        help="Export although --quant does not keep the zeros of the model.",
    )
    accept_token_differences: AcceptOpt = None
    out_file: Path | None = _option("--out", "-o", help="File to write; default: MODEL-QUANT here.")
    json_output: JsonOpt = False


def _read_shares(assignments: Sequence[str]) -> dict[str, float]:
    """Return shares by part; what they may be is the recipe's to check."""
    shares = {}
    for assignment in assignments:
        part, _, share = assignment.partition("=")
        try:
            shares[part] = float(share)
        except ValueError:
            raise UsageError(
                "invalid-assignment",
                f"--keep {assignment} is not PART=SHARE with a number",
                remedy="as --keep ffn=0.75, or --keep vocabulary=8192",
            ) from None

    return shares


def takes(options: type[O]) -> Callable[[Callable[[O], None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as parameters, which typer reads and fills."""
    hints = get_type_hints(options, include_extras=True)

    panels = {name: panel for panel, names in PANELS.items() for name in names}
    order = list(panels)

    parameters = []
    for each in fields(options):  # type: ignore[arg-type]
        hint = hints[each.name]
        if "typer" in each.metadata:
            hint = Annotated[hint, each.metadata["typer"]]

        kind, info = get_args(hint)
        if isinstance(info, OptionInfo):
            info = copy.copy(info)  # several commands share it
            info.rich_help_panel = panels.get(each.name)

        hint = hints[each.name] = Annotated[kind, info]
        default = Parameter.empty if each.default is MISSING else each.default
        parameters.append(Parameter(each.name, _KIND, default=default, annotation=hint))
    parameters.sort(key=lambda each: order.index(each.name) if each.name in panels else -1)

    def decorate(command: Callable[[O], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            command(options(**values))

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = hints
        return run

    return decorate
