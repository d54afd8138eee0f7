"""The command line: one command per verb, no logic. A verb imports what it needs when it is called.

stdout carries the result, stderr the rest. Exit codes are those of :mod:`racdeploy.errors`, 0 where
all is well, and 130 where a run was interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from racdeploy import __version__
from racdeploy.cli import build, run, tools, verify
from racdeploy.cli.console import out

app = typer.Typer(
    name="racdeploy",
    help="Prune a reasoning model on its own chain of thought, export it, "
    "and prove that it still reasons.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
accel_app = typer.Typer(
    no_args_is_help=True, help="Kernels for sparse weights on stock engines; see docs/accel.md."
)
app.add_typer(accel_app, name="accel")

for command in (build.build, build.traces, build.prune, build.recover, build.export, verify.verify):
    app.command()(command)
for command in (run.run, run.bench, tools.inspect, tools.unpack, tools.targets):
    app.command()(command)
app.command(name="plugins")(tools.list_plugins)
app.command()(tools.init)
app.command()(tools.doctor)
accel_app.command(name="build")(tools.build_kernels)


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
