"""Servers in a process of their own, and a model for them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import resolve_model
from tests.support.commands import environment
from tests.support.waiting import PATIENCE_S, wait_for


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(*command: object) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server on a free port; yield its address and its process."""
    port = free_port()
    process = subprocess.Popen(
        [*map(str, command), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(PYTHONWARNINGS="ignore"),
    )
    try:
        wait_for(lambda: _is_up(port), f"{command} to answer", process)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()


def llama_cpp_server(model: Path) -> tuple[object, ...]:
    """Return the command of the server in llama-cpp-python, for a GGUF file."""
    options = ("--model_alias", "tiny", "--n_ctx", 1024, "--n_threads", 1, "--verbose", "false")
    return (sys.executable, "-m", "llama_cpp.server", "--model", model, *options)


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/v1/models", timeout=PATIENCE_S
        ) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def write_model(folder: Path) -> Path:
    """Copy the embedded model, and export it beside its weights."""
    shutil.copytree(resolve_model("tiny-reasoner").folder, folder)
    gguf.export(Checkpoint(folder), folder / "model.gguf", quant="f32")
    return folder


def hide_tags(folder: Path) -> Path:
    """Make control tokens of the thinking tags, which plain servers leave out; export again."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["special"] = True
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    gguf.export(Checkpoint(folder), folder / "model.gguf", quant="f32")
    return folder
