"""Options that several commands share, each declared once, and the recipe that they ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

if TYPE_CHECKING:
    from racdeploy.recipe import Recipe

O = TypeVar("O")
Kernels = Literal[
    "auto", "off", "require"
]  # accel.Mode, whose import takes as long as all of --help

TargetOpt = Annotated[
    str | None, typer.Option("--target", help="Where it will run; see: racdeploy targets.")
]
QuantOpt = Annotated[str | None, typer.Option("--quant", help="Number format of the linears.")]
PackingOpt = Annotated[str | None, typer.Option("--packing", help="How zeros are left out.")]
GateOpt = Annotated[
    Path | None, typer.Option("--gate", help="TOML file with limits; see docs/gate.md.")
]
TierOpt = Annotated[
    str, typer.Option("--tier", help="How much is verified: smoke, standard or release.")
]
WorkOpt = Annotated[
    Path | None, typer.Option("--work", help="Folder of stage results; default: user cache.")
]
ThreadsOpt = Annotated[int, typer.Option("--threads", help="CPU threads; 0 uses every core.")]
AccelOpt = Annotated[
    Kernels, typer.Option("--accel", help="Kernels for sparse weights; see: racdeploy accel build.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class TraceOptions:
    """Options of the commands that ask a model: ``traces``, ``prune`` and ``build``."""

    model: Annotated[
        str | None,
        typer.Argument(
            help="Local folder, Hub id, or tiny-reasoner, the default.", show_default=False
        ),
    ] = None
    target: TargetOpt = None
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="TOML recipe; see: racdeploy init.")
    ] = None
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PART.KEY=VALUE",
            help="A key of the recipe with a TOML value; repeatable, wins over other options.",
        ),
    ] = None
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Task to verify on: a name or jsonl:FILE; repeatable."),
    ] = None
    calibration_task: Annotated[
        list[str] | None,
        typer.Option("--calibration-task", help="Task for the traces; default: --task."),
    ] = None
    trace_prompts: Annotated[
        int | None, typer.Option("--trace-prompts", help="Calibration prompts.")
    ] = None
    trace_server: Annotated[
        str | None,
        typer.Option(
            "--trace-server", help="OpenAI-compatible API that answers them, http://HOST:PORT/v1."
        ),
    ] = None
    work: WorkOpt = None
    threads: ThreadsOpt = 0
    json_output: JsonOpt = False

    def resolve(self) -> Recipe:
        """Return the recipe that the options ask for, checked."""
        from racdeploy.recipe import Recipe
        from racdeploy.storage.toml import merge, read_assignments

        assigned = read_assignments(self.assignments or ())
        return Recipe.combine(self.recipe, merge(self._values(), assigned))

    def _values(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "target": self.target,
            "tasks": tuple(self.task) if self.task else None,
            "calibration_tasks": tuple(self.calibration_task) if self.calibration_task else None,
            "traces": {"count": self.trace_prompts, "server": self.trace_server},
        }


@dataclass(frozen=True)
class PruneOptions(TraceOptions):
    """Options of the commands that prune."""

    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Fraction of zeros, 0 to 1.")
    ] = None
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="unstructured, or N:M with N kept of M.")
    ] = None
    method: Annotated[str | None, typer.Option("--method", help="Pruning method.")] = None
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="rac (prompt and thinking) or prompt."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")
    ] = False

    def _values(self) -> dict[str, Any]:
        prune = {"sparsity": self.sparsity, "pattern": self.pattern, "method": self.method}
        return super()._values() | {"prune": prune, "calibration": {"source": self.calibration}}


@dataclass(frozen=True)
class BuildOptions(PruneOptions):
    """Options of the command that makes a bundle."""

    also: Annotated[
        list[str] | None,
        typer.Option("--also", help="A further target, for another engine; repeatable."),
    ] = None
    quant: QuantOpt = None
    packing: PackingOpt = None
    prompts: Annotated[int | None, typer.Option("--prompts", help="Evaluation prompts.")] = None
    out_folder: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None
    gate: GateOpt = None
    tier: TierOpt = ""
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Let dense models of about the artifact's size answer too."
        ),
    ] = False

    def _values(self) -> dict[str, Any]:
        from racdeploy.storage.toml import read_toml
        from racdeploy.verify.controls import SAME_SIZE

        controls = (SAME_SIZE,) if self.controls else None
        return super()._values() | {
            "also": tuple(self.also) if self.also else None,
            "export": {"quant": self.quant, "packing": self.packing},
            "verify": {"count": self.prompts, "controls": controls},
            "gate": read_toml(self.gate) if self.gate else None,
        }


def takes(options: type[O]) -> Callable[[Callable[[O], None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as parameters, which typer reads and fills.

    Args:
        options: a dataclass; each field is annotated as typer wants a parameter.
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        Parameter(
            field.name,
            Parameter.POSITIONAL_OR_KEYWORD,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
    ]

    def decorate(command: Callable[[O], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            command(options(**values))

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = hints
        return run

    return decorate
