"""New weights for a server that runs: it loads a model's folder before that model is asked.

A server keeps the shapes that it was started with. What it computed of prompts belongs to the old
weights, and is dropped with them.
Source: SGLang, docs/advanced_features/sglang_for_rl.md (Update Weights from Disk), and its
TokenizerManager, which renames the model; vLLM, docs/training/layerwise.md (reload_weights), and
vllm/entrypoints/serve (rpc, cache).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from racdeploy.engines.backends.openai.http import Client, RefusedError
from racdeploy.errors import EngineError, RacdeployError
from racdeploy.recipe import Traces

_NEEDS = {
    "sglang": "SGLang must see this folder under the same path",
    "vllm": "vLLM must see this folder under the same path, and run with VLLM_SERVER_DEV_MODE=1",
}


@contextlib.contextmanager
def loaded(
    settings: Traces, folder: Path, dense: Path, notify: Callable[[str], None]
) -> Iterator[None]:
    """Let the server answer with the weights of a folder; in the end it has the dense ones.

    Raises EngineError where it does not load the folder. If it does not take the dense model back,
    that is only a notice: the next run loads the model that it asks.
    """
    try:
        load(settings, folder)
        yield
    finally:
        if folder != dense:
            _give_back(settings, folder, dense, notify)


def load(settings: Traces, folder: Path) -> None:
    """Let the server load a folder, and return when every answer is of its weights."""
    path = str(folder.resolve())
    client = Client(settings.server, settings.server_key_env, settings.server_timeout_s)

    try:
        if settings.server_reload == "sglang":
            _load_into_sglang(client, path)
        else:
            _load_into_vllm(client, path)
    except EngineError as error:
        raise EngineError(
            "model-not-loaded",
            f"the server did not load {path}: {error.message}",
            remedy=f"{error.remedy}; {_NEEDS[settings.server_reload]}",
        ) from error


def _load_into_sglang(client: Client, path: str) -> None:
    body = {"model_path": path, "flush_cache": True}
    answer = client.ask("../update_weights_from_disk", body)

    if answer.get("success") is not True:
        said = client.quote(str(answer.get("message", "")))
        raise RefusedError(
            "server-refuses-request",
            f"{client.url} says: {said}",
            remedy="look at the server's log",
        )


def _load_into_vllm(client: Client, path: str) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
    answer = client.ask("../collective_rpc", body)

    # One for each worker, each of them None; a worker that fails makes it a status of 500.
    if not answer.get("results"):
        raise RefusedError(
            "server-refuses-request",
            f"{client.url} names no worker that did",
            remedy="look at the server's log and version",
        )

    client.ask("../reset_prefix_cache", {}, may_be_empty=True)


def _give_back(settings: Traces, folder: Path, dense: Path, notify: Callable[[str], None]) -> None:
    try:
        load(settings, dense)
    except RacdeployError as error:
        notify(
            f"start the server again before others use it: it may have the weights of {folder}, "
            f"since {error.message}"
        )
