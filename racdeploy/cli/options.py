"""Command line options, most of them made from the keywords of the library's functions."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Sequence
from inspect import Parameter
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from racdeploy import plugins
from racdeploy.api import functions
from racdeploy.api.jobs import OPTIONS
from racdeploy.errors import UsageError

_DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def read_size(text: str, option: str) -> int:
    """Return the bytes of a size as 1.5GB, 300MiB or 2000."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    written = f"{text}B" if text.endswith("i") else text  # it knows 4GiB, and not 4Gi
    try:
        return TypeAdapter(ByteSize).validate_python(written)
    except ValidationError:
        raise UsageError(
            "not-a-size", f"{option} {text} is not a size", remedy=f"as {option} 1.5GB"
        ) from None


def read_duration(text: str) -> float:
    """Return the seconds of a duration as 90m, 2h or 30; without a unit it is in seconds."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise UsageError(
            "not-a-time", f"--budget {text} is not a time", remedy="as --budget 90m, or 2h"
        )
    return float(match["number"]) * _SECONDS[match["unit"]]


Kernels = Literal["auto", "off", "require"]
"""Same as ``sparse_kernels.AccelMode``, whose import would double the time of --help."""

BundleArg = Annotated[Path, typer.Argument(help="Bundle folder.")]
TargetOpt = Annotated[
    str | None, typer.Option(help="Where it will run; default: gguf. List: racdeploy targets.")
]
WorkOpt = Annotated[Path | None, typer.Option(help="Folder of stage results; default: user cache.")]
ThreadsOpt = Annotated[int, typer.Option(min=0, help="CPU threads; 0 uses every core.")]
BudgetOpt = Annotated[
    int | None, typer.Option(min=0, help="Maximum thinking tokens; then the thinking is closed.")
]
TemperatureOpt = Annotated[
    float | None, typer.Option(min=0, help="0 is greedy; default: the bundle's.")
]
SeedOpt = Annotated[int, typer.Option(min=0, help="Same seed, same answer.")]
ContextOpt = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum tokens of prompt and completion; default: the bundle's."),
]
ShowThinkingOpt = Annotated[
    bool,
    typer.Option("--show-thinking", metavar="", help="Print the thinking too, on stderr."),
]
AccelOpt = Annotated[
    Kernels, typer.Option(help="Kernels for sparse weights; see kernels/README.md.")
]
QuietOpt = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", help="Print no progress, only results and errors."),
]
DryRunOpt = Annotated[
    bool,
    typer.Option("--dry-run", metavar="", help="Check everything, print the plan and stop."),
]
JsonOpt = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")]
Values = dict[str, Any]
_ARGUMENTS = ("model", "pruned", "bundle", "candidates")
_PYTHON_ONLY = ("tokenizer", "progress", "on_event")
_TYPES = {
    "ModelSource": str,
    "StrPath": Path,
    "Sequence": list,
    "Progress": Any,
    "Candidate": Any,
    "AccelMode": Kernels,
}
"""Types for typer, in place of the annotations of the functions."""


def flag(name: str, meaning: str) -> Any:
    """Return a boolean option without a value."""
    return typer.Option(False, name, metavar="", help=meaning)


def _read_shares(assignments: Sequence[str]) -> dict[str, float]:
    """Return shares by part; the recipe checks their values."""
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


def _read_settings(assignments: Sequence[str]) -> Values:
    from racdeploy.files.toml import read_assignments

    return read_assignments(assignments)


_READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "settings": (list[str], _read_settings),
    "keep": (list[str], _read_shares),
    "sparsity": (str, str),
    "candidates": (list[str], tuple),  # a path would spoil the address of a server
    "against": (str, str),
    "max_bytes": (str, functools.partial(read_size, option="--max-bytes")),
    "max_memory": (str, functools.partial(read_size, option="--max-memory")),
    "budget": (str, read_duration),
    "harness_tasks": (str, lambda text: [*filter(None, text.replace(" ", "").split(","))]),
}
"""Type and parser of options that a function takes as another type."""


def with_options_of(
    function: Callable[..., Any], excluded: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of a function to those of a command.

    The command gets them as the dictionary ``values``, the keyword arguments of the function.
    """
    signature = inspect.signature(function, eval_str=True, globals=vars(functions) | _TYPES)
    documented = (functions.compare, functions.build, function)
    meanings = dict(chain.from_iterable(_read_help(each).items() for each in documented))

    parameters = []
    panel = None
    structures = ", ".join(plugins.list_names("structures"))
    for name, parameter in signature.parameters.items():
        known = OPTIONS.get(name, {})
        panel = known.get("panel", panel)
        if name not in (*_PYTHON_ONLY, *excluded):
            meaning = known.get("help") or meanings[name]
            meaning = meaning.replace("{structures}", structures)
            parameters.append(_make_option(parameter, meaning, panel, known))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *command_parameters = inspect.signature(command, eval_str=True).parameters.values()
        command_parameters = [
            each.replace(kind=Parameter.KEYWORD_ONLY) for each in command_parameters
        ]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            command_values = {each.name: arguments.pop(each.name) for each in command_parameters}
            values = {}
            for name, value in arguments.items():
                if value is None:
                    value = signature.parameters[name].default
                elif name in _READERS:
                    value = _READERS[name][1](value)
                values[name] = value
            command(values, **command_values)

        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters, *command_parameters], return_annotation=None
        )
        run.__annotations__ = {}  # else typer would read the command's annotations
        return run

    return decorate


def _make_option(parameter: Parameter, meaning: str, panel: str | None, known: Values) -> Parameter:
    """Return the parameter from which typer makes an option or an argument."""
    name, kind, default = parameter.name, parameter.annotation, parameter.default
    kind, _ = _READERS.get(name, (kind, None))
    if default == ():
        default = None

    info: Any
    if name in _ARGUMENTS:
        info = typer.Argument(help=meaning, show_default=False)
    else:
        names, metavar = known.get("names", ()), known.get("metavar")
        if kind is bool:
            names, metavar = (f"--{name.replace('_', '-')}",), ""
        info = typer.Option(
            *names,
            metavar=metavar,
            min=known.get("min"),
            help=meaning,
            rich_help_panel=panel,
        )
    return parameter.replace(
        kind=Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _read_help(function: Callable[..., Any]) -> dict[str, str]:
    """Return the help of each option, from the Args section of a docstring."""
    section = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in entries}
