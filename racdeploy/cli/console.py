"""Output of the commands on stdout and stderr, and the errors that end a command."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from racdeploy.errors import ArtifactError, EnvironmentFailure, RacdeployError
from racdeploy.files.unprintable import escape_unprintable, replace_unprintable

if TYPE_CHECKING:
    from racdeploy.api.records import Verdict
    from racdeploy.engines.engine import Progress
    from racdeploy.results.plan import Plan

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 and the signal's number
_TRACEBACK = "RACDEPLOY_TRACEBACK"
_MAX_QUOTED = 200
_COMMAND = re.compile(r"^([^\S\n]*)::", re.MULTILINE)
_WIDEST = 100  # longer lines are hard to read
_DISK_REMEDY = "check that the path exists and can be read or written, then run the same command"

# Python has None for a stream that was closed before it started.
for _name in ("stdin", "stdout", "stderr"):
    if getattr(sys, _name) is None:
        setattr(sys, _name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r+"))

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def _quieten(text: str) -> str:
    """Return a text without GitHub workflow commands, if a workflow runs this.

    Source: ``ActionCommand.cs`` of actions/runner: ``::`` begins a line, ``##[`` is anywhere.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return text
    return _COMMAND.sub(r"\1: :", text).replace("##[", "# #[")


@dataclass(frozen=True)
class _Visible:
    """A renderable without control characters."""

    shown: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.shown, options):
            if segment.control:
                yield segment
            else:
                yield Segment(_quieten(replace_unprintable(segment.text)), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.shown)


class _ShowOnly(RenderHook):
    """Hook that removes control characters from all output: it contains untrusted text."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(each) for each in renderables]


for _console in (out, err):
    _console.push_render_hook(_ShowOnly())


def show(result: object, style: str | None = None) -> None:
    """Print a result on stdout, without markup."""
    out.print(result, style=style, markup=False, soft_wrap=True)


def say(line: str, style: str | None = None) -> None:
    """Print a line on stderr, without markup."""
    err.print(line, style=style, markup=False, soft_wrap=True)


class Notices(logging.Handler):
    """Prints racdeploy's log messages on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def say_error(error: RacdeployError | OSError) -> None:
    """Print an error with its code and remedy."""
    known = _to_racdeploy_error(error)
    err.print("error:", style="bold red", end=" ")
    err.print(f"{known.message:.2000}", markup=False, soft_wrap=True, end=" ")
    say(f"[{known.code}]", "dim")
    if known.remedy:
        say(f"  → {known.remedy}")


def print_json(value: object) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(escape_unprintable(json.dumps(value, ensure_ascii=False, indent=1)) + "\n")


def print_result(value: object, lines: Iterable[object], json_output: bool) -> None:
    """Print one JSON object, or the lines for people."""
    if json_output:
        print_json(value)
        return
    for line in lines:
        show(line)


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr."""
    for note in notes:
        say(note)


def print_plan(plan: Plan, json_output: bool, out_folder: str = "") -> None:
    """Print the plan of a run."""
    from racdeploy.cli.plan import write_plan

    if json_output:
        print_json(plan.to_json())
        return
    for line in write_plan(plan, min(out.width, _WIDEST), out_folder):
        show(line)


def print_first_line(line: str, quiet: bool) -> None:
    """Print the first line of a command, before any long work; only in the first process."""
    if not quiet and os.environ.get("RANK", "0") == "0":
        say(line, "bold")


def call_with_progress(function: Callable[[T, Progress], R], options: T, quiet: bool = False) -> R:
    """Call a function with its options, and with progress on stderr."""
    from racdeploy.cli.progress import show_progress

    with show_progress(err, quiet) as progress:
        return function(options, progress)


def finish(verdict: Verdict, json_output: bool, last_lines: Sequence[str] = ()) -> None:
    """Print a report, and exit with the code of its verdict."""
    from racdeploy.report.terminal import print_report

    if json_output:
        print_json(verdict.report.model_dump(mode="json"))
    else:
        print_report(verdict.report, out)

    print_notes(last_lines)
    end(verdict, json_output)


def end(verdict: Verdict, json_output: bool) -> None:
    """Print a verdict, and exit with its code."""
    from racdeploy.report.terminal import print_verdict

    if not json_output:
        print_verdict(verdict.report, out)
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)


class _Terminated(SystemExit):
    """A signal asks the process to end; a chat survives KeyboardInterrupt, but not this."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that open files are closed.

    A signal that is ignored, as under nohup, or has another handler is left alone.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    default_signals = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        default_signals = []

    def end(number: int, frame: FrameType | None) -> None:
        for other in default_signals:  # a second signal would interrupt the closing
            signal.signal(other, signal.SIG_IGN)
        raise _Terminated(signal.Signals(number).name)

    for number in default_signals:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in default_signals:
            if signal.getsignal(number) is end:  # unchanged since: no signal came
                signal.signal(number, signal.SIG_DFL)


def report_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors, Ctrl-C and other signals into a message, a remedy and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json = bool(kwargs.get("json_output"))

        try:
            with _ended_by_signals():
                return command(*args, **kwargs)
        except BrokenPipeError:  # of stdout: main() chooses the exit code
            raise
        except (RacdeployError, OSError) as error:
            _fail(_to_racdeploy_error(error), as_json)
        except (KeyboardInterrupt, _Terminated) as interruption:
            _end_early(str(interruption), as_json)
        except (typer.Exit, typer.Abort, typer.BadParameter, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # native libraries may raise others than Exception
            if os.environ.get(_TRACEBACK):
                raise

            # A bug in racdeploy, without traceback, and with no verdict's exit code.
            message = " ".join(str(error).split())[:_MAX_QUOTED]
            kind = type(error).__name__
            _fail(
                EnvironmentFailure(
                    "unexpected-error",
                    f"racdeploy failed where it should not: {kind}: {message}",
                    remedy=f"please report it, with the command and what {_TRACEBACK}=1 shows",
                ),
                as_json,
            )

    return run


def _end_early(signal_name: str, as_json: bool) -> NoReturn:
    """Print how to resume after a signal; the name is empty for Ctrl-C."""
    again = shlex.join(["racdeploy", *sys.argv[1:]])
    outcome = f"interrupted by {signal_name}" if signal_name else "interrupted"
    if as_json:
        print_json(
            {
                "code": "run-interrupted",
                "error": f"{outcome}; finished work is kept",
                "remedy": again,
                "exit_code": INTERRUPTED,
                "kind": "Interrupted",
            }
        )
    else:
        say(f"{outcome}; finished work is kept. Resume with:", "yellow")
        say(f"  {again}")
    raise typer.Exit(INTERRUPTED) from None


def _to_racdeploy_error(error: RacdeployError | OSError) -> RacdeployError:
    """Return the RacdeployError for an OSError; others unchanged."""
    if isinstance(error, RacdeployError):
        return error
    prefix = f"{error.filename}: " if error.filename else ""
    return EnvironmentFailure("os-error", f"{prefix}{error.strerror or error}", remedy=_DISK_REMEDY)


def describe_error(error: RacdeployError) -> dict[str, object]:
    """Return an error as an object for ``--json``."""
    return {
        "code": error.code,
        "error": error.message,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
        "kind": type(error).__name__,
    }


def _fail(error: RacdeployError, as_json: bool) -> NoReturn:
    if as_json:
        print_json(describe_error(error))
    else:
        if isinstance(error, ArtifactError):  # values of a file must not look like lines of ours
            error.message = " ".join(error.message.split())
        say_error(error)
    raise typer.Exit(error.exit_code) from error
