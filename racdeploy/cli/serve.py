"""The command ``serve``, an OpenAI-compatible server for a bundle."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from racdeploy.cli.console import INTERRUPTED, show
from racdeploy.cli.options import AccelOpt, BundleArg, ContextOpt, ThreadsOpt

if TYPE_CHECKING:
    from racdeploy.serve.app import ServedModel

_QUESTION = "What is 12 times 34?"


def serve(
    bundle: BundleArg,
    host: str = typer.Option(
        "127.0.0.1", help="Address to listen on; other than localhost needs an API key."
    ),
    port: int = typer.Option(8080, min=0, max=65535, help="Port; 0 chooses a free one."),
    api_key_env: str = typer.Option(
        "", metavar="NAME", help="Environment variable that holds the API key; default: no key."
    ),
    parallel: int = typer.Option(
        4, min=1, help="Requests decoded together; each needs the memory of a context."
    ),
    context_tokens: ContextOpt = None,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    dense: Path | None = typer.Option(
        None, help="Dense artifact of the build to serve instead, without thinking control."
    ),
    alias: str = typer.Option("", help="Name of the model; default: its file's."),
) -> None:
    """Serve a bundle with an OpenAI-compatible API until Ctrl-C; see docs/run.md."""
    from racdeploy.plugins import require_package

    require_package("starlette")
    require_package("uvicorn")
    logging.getLogger("racdeploy").handlers.clear()  # all lines have the time
    logging.basicConfig(format="%(asctime)s %(message)s")
    from racdeploy.serve.server import serve as run

    if dense:
        from racdeploy.verification.baseline import Baseline

        Baseline.read(bundle).check_artifact(dense)

    was_interrupted = run(
        bundle,
        host=host,
        port=port,
        key_env=api_key_env,
        parallel=parallel,
        context_tokens=context_tokens,
        threads=threads,
        accel=accel,
        dense=dense,
        alias=alias,
        on_ready=lambda url, server: _say_ready(url, server.served, api_key_env),
    )
    if was_interrupted:
        raise typer.Exit(INTERRUPTED)


def _say_ready(url: str, served: ServedModel, key_env: str) -> None:
    """Print the model, the address and a command to try it."""
    body = json.dumps({"messages": [{"role": "user", "content": _QUESTION}]})
    key = f' -H "Authorization: Bearer ${key_env}"' if key_env else ""
    header = "-H 'Content-Type: application/json'"
    show(f"serving {served.name} at {url}")
    show(f"try: curl {url}/chat/completions {header}{key} -d '{body}'")
