"""What commands share: where things are printed, and how errors end a command."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from racdeploy.errors import ArtifactError, EnvironmentFailure, RacdeployError, exit_code_of
from racdeploy.files.unprintable import escape_unprintable, visible

if TYPE_CHECKING:
    from pathlib import Path

    from racdeploy.results.report import Report
    from racdeploy.verify.gate import Gate

P = ParamSpec("P")
R = TypeVar("R")
INTERRUPTED = 130
_TRACEBACK = "RACDEPLOY_TRACEBACK"
_SAID = 200
_COMMAND = re.compile(r"^(\s*)::", re.MULTILINE)
_WIDEST = 100  # longer lines are hard to read
_DISK_REMEDY = "check that the path exists and can be read or written, then run the same command"

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def _quieten(text: str) -> str:
    """Return a text without commands to the workflow whose log it is printed to, where it is one.

    Source: ``ActionCommand.cs`` of actions/runner: ``::`` begins a line, ``##[`` is anywhere.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return text
    return _COMMAND.sub(r"\1: :", text).replace("##[", "# #[")


@dataclass(frozen=True)
class _Visible:
    """Whatever a console prints, without characters that would command the terminal."""

    shown: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.shown, options):
            if segment.control:
                yield segment
            else:
                yield Segment(_quieten(visible(segment.text)), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.shown)


class _ShowOnly(RenderHook):
    """Names, paths, messages and answers come from anybody, and all of them are printed here."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(each) for each in renderables]


for _console in (out, err):
    _console.push_render_hook(_ShowOnly())


def show(result: object, style: str | None = None) -> None:
    """Print a result on stdout, as it is."""
    out.print(result, style=style, markup=False, soft_wrap=True)


def say(line: str, style: str | None = None) -> None:
    """Print a line beside a result on stderr, as it is."""
    err.print(line, style=style, markup=False, soft_wrap=True)


def say_error(error: RacdeployError | OSError) -> None:
    """Print an error with its code and what to do about it."""
    known = _as_ours(error)
    err.print("error:", style="bold red", end=" ")
    err.print(known.message, markup=False, soft_wrap=True, end=" ")
    say(f"[{known.code}]", "dim")
    if known.remedy:
        say(f"  → {known.remedy}")


def print_json(value: object) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(escape_unprintable(json.dumps(value, ensure_ascii=False, indent=1)) + "\n")


def print_result(value: object, lines: Iterable[object], json_output: bool) -> None:
    """Print one JSON object, or lines that say the same."""
    if json_output:
        print_json(value)
        return
    for line in lines:
        show(line)


def say_replaced(file: Path) -> str:
    """Return what is said where a command has written over a file."""
    return f"{file} was there before, and has been replaced"


def print_notes(notes: Iterable[str]) -> None:
    """Print lines beside a result."""
    for note in notes:
        say(note)


def print_plan(plan: Mapping[str, object], json_output: bool, out_folder: str = "") -> None:
    """Print what a run would do."""
    from racdeploy.cli.plan import write_plan

    if json_output:
        print_json(plan)
        return
    for line in write_plan(plan, min(out.width, _WIDEST), out_folder):
        show(line)


def announce(line: str, quiet: bool) -> None:
    """Say what a command begins with, before anything that takes long; once in a job of several."""
    if not quiet and os.environ.get("RANK", "0") == "0":
        say(line, "bold")


def finish(
    report: Report,
    json_output: bool,
    last_lines: Sequence[str],
    gate: Gate,
    exit_zero: bool = False,
) -> None:
    """Print a report and end with its verdict's exit code, or with 0 where it only reports."""
    from racdeploy.report.terminal import print_report, print_verdict

    if json_output:
        print_json(report.model_dump(mode="json"))
    else:
        print_report(report, out)

    print_notes(last_lines)
    if not json_output:
        print_verdict(report, out)

    code = exit_code_of(report.verdict, gate.inconclusive)
    if code and not exit_zero:
        raise typer.Exit(code)


class _Terminated(SystemExit):
    """A signal asks the process to end; not KeyboardInterrupt, which a chat goes on after."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, whatever is open closed.

    One that is ignored, as nohup does, or that somebody else handles is left alone.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []

    def end(number: int, frame: FrameType | None) -> None:
        for other in ours:  # a second one would break into what is being closed
            signal.signal(other, signal.SIG_IGN)
        raise _Terminated(signal.Signals(number).name)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is end:  # not where one came, or torchrun's is ignored
                signal.signal(number, signal.SIG_DFL)


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors, Ctrl-C and other signals into a message, a remedy and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json = bool(kwargs.get("json_output"))

        try:
            with _ended_by_signals():
                return command(*args, **kwargs)
        except (RacdeployError, OSError) as error:
            _fail(_as_ours(error), as_json)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (KeyboardInterrupt, _Terminated) as interruption:
            _end_early(str(interruption), as_json)
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # native libraries raise what is no Exception
            if os.environ.get(_TRACEBACK):
                raise
            _fail(_describe_unexpected(error), as_json)

    return run


def _end_early(signal_name: str, as_json: bool) -> NoReturn:
    """Say how to resume after Ctrl-C, which has no name, or another signal."""
    again = shlex.join(["racdeploy", *sys.argv[1:]])
    what = f"interrupted by {signal_name}" if signal_name else "interrupted"
    if as_json:
        details = {"code": "run-interrupted", "error": f"{what}; finished work is kept"}
        print_json(details | {"remedy": again, "exit_code": INTERRUPTED, "kind": "Interrupted"})
    else:
        err.print(f"{what}; finished work is kept. Resume with:", style="yellow")
        say(f"  {again}")
    raise typer.Exit(INTERRUPTED) from None


def _as_ours(error: RacdeployError | OSError) -> RacdeployError:
    """Return what to say of an error of the system; ours as it is."""
    if isinstance(error, RacdeployError):
        return error
    place = f"{error.filename}: " if error.filename else ""
    message = f"{place}{error.strerror or error}"
    return EnvironmentFailure("os-error", message, remedy=_DISK_REMEDY)


def _describe_unexpected(error: BaseException) -> EnvironmentFailure:
    """Return what to say of a mistake of ours: no traceback, and no exit code of a verdict."""
    said = " ".join(str(error).split())[:_SAID]
    kind = type(error).__name__
    return EnvironmentFailure(
        "unexpected-error",
        f"racdeploy failed where it should not: {kind}: {said}",
        remedy=f"please report it, with the command and what {_TRACEBACK}=1 shows",
    )


def _fail(error: RacdeployError, as_json: bool) -> NoReturn:
    if as_json:
        details = {"code": error.code, "error": error.message, "remedy": error.remedy}
        print_json(details | {"exit_code": error.exit_code, "kind": type(error).__name__})
    else:
        if isinstance(error, ArtifactError):  # its values are a file's, and are no lines of ours
            error.message = " ".join(error.message.split())
        say_error(error)
    raise typer.Exit(error.exit_code) from error
