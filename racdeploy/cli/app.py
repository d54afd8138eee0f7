"""The command line: one command per verb, no logic. A verb imports what it needs when it is called.

stdout carries the result, stderr the rest. Exit codes are those of :mod:`racdeploy.errors`, 0 where
all is well, and 130 where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from racdeploy.cli import (
    build,
    cache,
    chat,
    hub,
    report,
    run,
    serve,
    sign,
    tools,
    tune,
    verify,
)
from racdeploy.cli.console import out

app = typer.Typer(
    name="racdeploy",
    help="Prune a reasoning model on its own chain of thought, export it, "
    "and prove that it still reasons.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
_MORE = "More"
_FIRST: dict[str, tuple[Callable[..., None], str]] = {
    "build": (build.build, "racdeploy build ./my-model --sparsity 0.5 --out bundle"),
    "tune": (tune.tune, "racdeploy tune ./my-model --max-bytes 1.5GB --budget 2h"),
    "run": (run.run, 'racdeploy run bundle "What is 12 times 34?" --show-thinking'),
    "chat": (chat.chat, "racdeploy chat bundle --max-thinking-tokens 512"),
    "serve": (serve.serve, "racdeploy serve bundle --port 8080"),
    "verify": (verify.verify, "racdeploy verify bundle --junit junit.xml"),
    "report": (report.report, "racdeploy report bundle"),
    "inspect": (tools.inspect, "racdeploy inspect bundle --summary"),
}
_OTHERS: dict[str, tuple[Callable[..., None], str]] = {
    "traces": (build.traces, "racdeploy traces ./my-model --trace-prompts 64"),
    "prune": (build.prune, "racdeploy prune ./my-model --keep ffn=0.75"),
    "recover": (build.recover, "racdeploy recover ./my-model PRUNED --recover-tokens 1000000"),
    "export": (build.export, "racdeploy export ./my-model --quant q8_0"),
    "bench": (run.bench, "racdeploy bench bundle --rounds 3"),
    "push": (hub.push, "racdeploy push bundle me/my-model-GGUF --dry-run"),
    "pull": (hub.pull, "racdeploy pull me/my-model-GGUF --quant q8_0 --out bundle"),
    "sign": (sign.sign, "racdeploy sign bundle --key key.pem"),
    "unpack": (tools.unpack, "racdeploy unpack model.racgguf"),
    "targets": (tools.targets, "racdeploy targets"),
    "plugins": (tools.list_plugins, "racdeploy plugins"),
    "families": (tools.families, "racdeploy families"),
    "init": (tools.init, "racdeploy init recipe.toml"),
    "doctor": (tools.doctor, "racdeploy doctor"),
}

for panel, verbs in ((None, _FIRST), (_MORE, _OTHERS)):
    for verb, (command, example) in verbs.items():
        app.command(verb, epilog=f"Example: {example}", rich_help_panel=panel)(command)

cache_app = typer.Typer(no_args_is_help=True, help="What builds left behind, and how to remove it.")
app.add_typer(cache_app, name="cache", rich_help_panel=_MORE)
cache_app.command(name="ls", epilog="Example: racdeploy cache ls")(cache.list_cache)
cache_app.command(name="rm", epilog="Example: racdeploy cache rm --older 30")(cache.remove)

_VERSION = typer.Option("--version", metavar="", help="Print the version.")


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, _VERSION] = False,
) -> None:
    if version:
        from racdeploy import __version__

        out.print(__version__)
        raise typer.Exit
