"""Command line options, most of them made from the records of :mod:`racdeploy.api.options`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer

from racdeploy import plugins
from racdeploy.api import functions, options
from racdeploy.api.options import Names, OptionHelp
from racdeploy.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from racdeploy.files.toml import TomlTable

R = TypeVar("R", bound="DataclassInstance")

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
_TYPES = {"AccelMode": Kernels, "Gate": Path, "Recipe": Path}
"""Types of options on the command line, in place of those that a record also takes."""


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


def _read_settings(assignments: Sequence[str]) -> TomlTable:
    """Return the nested values of ``--set``."""
    from racdeploy.files.toml import read_assignments

    return read_assignments(assignments)


def _read_names(text: str) -> Names:
    """Return names that are separated by commas."""
    return tuple(name for name in text.replace(" ", "").split(",") if name)


_READERS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "settings": (list[str], _read_settings),
    "keep": (list[str], _read_shares),
    "max_bytes": (str, functools.partial(read_size, option="--max-bytes")),
    "max_memory": (str, functools.partial(read_size, option="--max-memory")),
    "budget": (str, read_duration),
    "harness_tasks": (str, _read_names),
}
"""Type and parser of options that a record has as another type."""


def with_options(
    record: type[R], function: Callable[..., object], excluded: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of a record to those of a command, which gets the record first.

    ``function`` explains the options that have no help of their own.
    """
    hints = get_type_hints(record, vars(options) | _TYPES, include_extras=True)
    documented = (functions.compare, functions.build, functions.export, function)
    help_by_name = dict(chain.from_iterable(_read_help(each).items() for each in documented))

    parameters = []
    for each in fields(record):
        if each.name not in excluded:
            kind, shown = get_args(hints[each.name])
            meaning = shown.help or help_by_name[each.name]
            parameters.append((shown.panel, _make_parameter(each, kind, shown, meaning)))
    parameters.sort(key=lambda pair: options.PANELS.index(pair[0]))
    names = [parameter.name for _, parameter in parameters]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        own = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in names}
            command(_make_record(record, values), **arguments)

        run.__signature__ = Signature(  # type: ignore[attr-defined]
            [*(parameter for _, parameter in parameters), *own]
        )
        run.__annotations__ = {}  # else typer would read the command's annotations
        return run

    return decorate


def _make_record(record: type[R], values: Mapping[str, Any]) -> R:
    """Return the record of a command line; options that are not given have their defaults."""
    given = {}
    for name, value in values.items():
        if value is None or value == []:
            continue
        if name in _READERS:
            value = _READERS[name][1](value)
        given[name] = tuple(value) if isinstance(value, list) else value
    return record(**given)


def _make_parameter(each: Field[Any], kind: Any, shown: OptionHelp, meaning: str) -> Parameter:
    """Return the parameter from which typer makes an option or an argument."""
    default = Parameter.empty if each.default is MISSING else each.default
    if each.name in _READERS:
        kind, _ = _READERS[each.name]
    elif kind == Names:
        kind = list[str]
    elif str in get_args(kind):  # a number or a text, which the recipe checks
        kind = str | None
    if (kind == list[str] and each.default_factory is not MISSING) or default == ():
        default = None

    info: Any
    if shown.is_argument:
        info = typer.Argument(help=meaning, show_default=False)
    else:
        names, metavar = shown.names, shown.metavar
        if kind is bool:
            names, metavar = (f"--{each.name.replace('_', '-')}",), ""
        structures = ", ".join(plugins.list_names("structures"))
        info = typer.Option(
            *names,
            metavar=metavar,
            min=shown.minimum,
            help=meaning.replace("{structures}", structures),
            rich_help_panel=shown.panel or None,
        )
    return Parameter(
        each.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _read_help(function: Callable[..., Any]) -> dict[str, str]:
    """Return the help of each option, from the Args section of a docstring."""
    section = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in entries}
