"""``serve``: a bundle behind OpenAI's API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from racdeploy.cli.console import INTERRUPTED, reported, show
from racdeploy.cli.options import AccelOpt, BundleArg, ThreadsOpt

if TYPE_CHECKING:
    from racdeploy.serve.app import Served

_QUESTION = "What is 12 times 34?"


@reported
def serve(
    bundle: BundleArg,
    host: str = typer.Option("127.0.0.1", help="Address to listen on; others need a key."),
    port: int = typer.Option(8080, min=0, max=65535, help="0 takes a free one."),
    api_key_env: str = typer.Option(
        "", metavar="NAME", help="Environment variable that holds the API key; default: no key."
    ),
    parallel: int = typer.Option(
        4, min=1, help="Requests decoded together; each takes memory for a context."
    ),
    context_tokens: int | None = typer.Option(
        None, min=1, help="Longest prompt and completion together; default: the bundle's."
    ),
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    dense: Path | None = typer.Option(
        None, help="Serve the dense artifact of the build in its place, its thinking free."
    ),
) -> None:
    """Serve a bundle with an OpenAI-compatible API until Ctrl-C; see docs/serve.md."""
    from racdeploy.plugins import require

    require("starlette")
    require("uvicorn")
    from racdeploy.serve.server import serve as run

    if dense:
        from racdeploy.verify.baseline import Baseline

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
        on_ready=lambda url, served: _say_ready(url, served, api_key_env),
    )
    if was_interrupted:
        raise typer.Exit(INTERRUPTED)


def _say_ready(url: str, served: Served, key_env: str) -> None:
    """Say what it is, where it is, and how to try it."""
    body = json.dumps({"messages": [{"role": "user", "content": _QUESTION}]})
    key = f' -H "Authorization: Bearer ${key_env}"' if key_env else ""
    header = "-H 'Content-Type: application/json'"
    command = f"curl {url}/chat/completions {header}{key} -d '{body}'"
    for line in (f"serving {served.name} at {url}", f"try: {command}"):
        show(line)
