"""New weights for a running server: it loads a model's folder before that model answers.

A server keeps the tensor shapes that it started with. Its prefix cache belongs to the old weights,
and is dropped with them.
Source: SGLang, docs/advanced_features/sglang_for_rl.md (Update Weights from Disk), and its
TokenizerManager, which renames the model; vLLM, docs/training/layerwise.md (reload_weights), and
vllm/entrypoints/serve (rpc, cache).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from racdeploy.engines.backends.server.http import Client, RefusedError
from racdeploy.errors import EngineError, RacdeployError
from racdeploy.recipe import Traces

_NEEDS = {
    "sglang": "SGLang must see this folder under the same path",
    "vllm": "vLLM must see this folder under the same path, and run with VLLM_SERVER_DEV_MODE=1",
}


@contextlib.contextmanager
def loaded_weights(
    settings: Traces, folder: Path, dense: Path, notify: Callable[[str], None]
) -> Iterator[None]:
    """Let the server answer with the weights of a folder; afterwards it loads the dense ones.

    A failure to load the dense model is only a notice: the next run loads the model that it needs.

    Raises:
        EngineError: the server does not load the folder.
    """
    try:
        load_weights(settings, folder)
        yield
    finally:
        if folder != dense:
            _restore_dense(settings, folder, dense, notify)


def load_weights(settings: Traces, folder: Path) -> None:
    """Let the server load a folder; return when all answers come from its weights."""
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
        message = client.quote(str(answer.get("message", "")))
        raise RefusedError(
            "server-refuses-request",
            f"{client.url} says: {message}",
            remedy="look at the server's log",
        )


def _load_into_vllm(client: Client, path: str) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
    answer = client.ask("../collective_rpc", body)

    # One result for each worker, each None; if a worker fails, the status is 500.
    if not answer.get("results"):
        raise RefusedError(
            "server-refuses-request",
            f"{client.url} names no worker that loaded it",
            remedy="look at the server's log and version",
        )

    client.ask("../reset_prefix_cache", {}, may_be_empty=True)


def _restore_dense(
    settings: Traces, folder: Path, dense: Path, notify: Callable[[str], None]
) -> None:
    try:
        load_weights(settings, dense)
    except RacdeployError as error:
        notify(
            f"start the server again before others use it: it may have the weights of {folder}, "
            f"since {error.message}"
        )
