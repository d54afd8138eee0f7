"""The command line: one command per verb, without logic; its imports happen when it is called.

stdout has the result, stderr everything else. Exit codes are 0, those of :mod:`racdeploy.errors`,
and 130 after an interruption.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from racdeploy.cli import (
    build,
    cache,
    chat,
    compare,
    hub,
    report,
    run,
    serve,
    sign,
    tools,
    tune,
    verify,
)
from racdeploy.cli.console import (
    BROKEN_PIPE,
    Notices,
    describe_error,
    out,
    print_json,
    report_errors,
    say_error,
)
from racdeploy.errors import EnvironmentFailure, UsageError

app = typer.Typer(
    name="racdeploy",
    help="Prune a reasoning model on its own chain of thought, export it, "
    "and prove that it still reasons.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
_MORE = "More"
_MIN_ADDRESS_BYTES = 2**28
_FIRST: dict[str, Callable[..., None]] = {
    "racdeploy build ./my-model --sparsity 0.5 --out bundle": build.build,
    "racdeploy tune ./my-model --max-bytes 1.5GB --budget 2h": tune.tune,
    'racdeploy run bundle "What is 12 times 34?" --show-thinking': run.run,
    "racdeploy chat bundle --max-thinking-tokens 512": chat.chat,
    "racdeploy serve bundle --port 8080": serve.serve,
    "racdeploy verify bundle --junit junit.xml": verify.verify,
    "racdeploy compare q4.gguf --against f16.gguf --tasks gsm8k:test.jsonl": compare.compare,
    "racdeploy report bundle": report.report,
    "racdeploy inspect bundle --summary": tools.inspect,
}
_OTHERS: dict[str, Callable[..., None]] = {
    "racdeploy traces ./my-model --trace-prompts 64": build.traces,
    "racdeploy prune ./my-model --keep ffn=0.75": build.prune,
    "racdeploy recover ./my-model PRUNED --recover-tokens 1000000": build.recover,
    "racdeploy export ./my-model --quant q8_0": build.export,
    "racdeploy record f16.gguf --tasks gsm8k:test.jsonl --out reference": compare.record,
    "racdeploy bench bundle --rounds 3": run.bench,
    "racdeploy push bundle me/my-model-GGUF --dry-run": hub.push,
    "racdeploy pull me/my-model-GGUF --quant q8_0 --out bundle": hub.pull,
    "racdeploy sign bundle --key key.pem": sign.sign,
    "racdeploy unpack model.racgguf": tools.unpack,
    "racdeploy targets": tools.targets,
    "racdeploy plugins": tools.list_plugins,
    "racdeploy families": tools.families,
    "racdeploy init recipe.toml": tools.init,
    "racdeploy doctor": tools.doctor,
}

for panel, verbs in ((None, _FIRST), (_MORE, _OTHERS)):
    for example, command in verbs.items():
        verb = example.split()[1]
        add = app.command(verb, epilog=f"Example: {example}", rich_help_panel=panel)
        add(report_errors(command))

cache_app = typer.Typer(no_args_is_help=True, help="List and remove cached results of builds.")
app.add_typer(cache_app, name="cache", rich_help_panel=_MORE)
cache_app.command(name="ls", epilog="Example: racdeploy cache ls")(report_errors(cache.list_cache))
cache_app.command(name="rm", epilog="Example: racdeploy cache rm --older 30")(
    report_errors(cache.remove)
)

_WRONG_USAGE: Any = typer.BadParameter.__mro__[1]  # click's, or typer's own copy
_VERSION = typer.Option("--version", metavar="", help="Print the version.")


def main() -> None:
    """Run the command line.

    A closed pipe ends it with 141, as it ends other programs, whoever noticed it: rich and typer
    exit with 1, which is a failed gate's code.
    """
    log = logging.getLogger("racdeploy")
    log.setLevel(logging.INFO)
    log.handlers = [Notices()]  # serve takes it away
    code: Any = 0
    try:
        _check_address_space()
        code = _run()
        sys.stdout.flush()  # at the interpreter's end, an error has an exit code of its own
    except EnvironmentFailure as error:
        say_error(error)
        code = error.exit_code
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            code = BROKEN_PIPE
        elif not code:
            say_error(error)
            code = EnvironmentFailure.exit_code

    sys.exit(code)


def _check_address_space() -> None:
    """Refuse a limit at which OpenBLAS, when numpy is imported, exits with 1 by itself."""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit_bytes < _MIN_ADDRESS_BYTES:
        raise EnvironmentFailure(
            "address-space-too-small",
            f"this process may use {limit_bytes / 1e6:.0f} MB of addresses, too few to start",
            remedy="raise the limit, as with ulimit -v unlimited",
        )


def _run() -> Any:
    """Run the command line, and return its exit code."""
    try:
        return app(standalone_mode="--json" not in sys.argv)
    except SystemExit as ending:
        return BROKEN_PIPE if isinstance(ending.__context__, BrokenPipeError) else ending.code
    except _WRONG_USAGE as error:
        remedy = f"{error.ctx.command_path} --help"
        refused = UsageError("wrong-usage", error.format_message(), remedy=remedy)
        print_json(describe_error(refused))
        return refused.exit_code


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, _VERSION] = False,
) -> None:
    if version:
        from racdeploy import __version__

        out.print(__version__)
        raise typer.Exit
