"""Server process: bind an address, load a bundle, serve, shut down on a signal.

After the first signal no request is accepted and running ones get ``SHUTDOWN_GRACE_S`` seconds; a
second signal stops them at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.runtime import load
from racdeploy.runtime.loading import load_dense
from racdeploy.serve.access import is_loopback
from racdeploy.serve.app import ServedModel, make_app
from racdeploy.sparse_kernels import AccelMode

SHUTDOWN_GRACE_S = 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    bundle: Path,
    *,
    host: str,
    port: int,
    key_env: str = "",
    parallel: int = 4,
    context_tokens: int | None = None,
    threads: int = 0,
    accel: AccelMode = "auto",
    dense: Path | None = None,
    on_ready: Callable[[str, ServedModel], None],
) -> bool:
    """Serve a bundle until a signal; return True if it was SIGINT (Ctrl-C).

    Args:
        port: 0 selects a free one.
        key_env: environment variable with the API key; empty requires no key.
        dense: dense artifact to serve instead of the pruned one.
        on_ready: called once with the URL of the API and the served model, when it answers.

    Raises:
        UsageError: the key is not set, or is missing although other machines can reach the host.
        EnvironmentFailure: the address cannot be bound.
    """
    key = _read_key(key_env)
    if not key and not is_loopback(host):
        raise UsageError(
            "no-api-key",
            f"{host} can be reached from other machines, and there is no API key",
            remedy="export RACDEPLOY_KEY=…, and add --api-key-env RACDEPLOY_KEY",
        )

    with _bind(host, port) as address:
        if dense:
            model = load_dense(
                bundle, dense, threads=threads, parallel=parallel, context_tokens=context_tokens
            )
        else:
            model = load(
                bundle,
                threads=threads,
                parallel=parallel,
                context_tokens=context_tokens,
                accel=accel,
            )

        with model:
            # The model is named by its artifact, whose name tells quant and pruning.
            file = dense or Path(model.manifest.artifacts[0].path)
            served = ServedModel(model, file.stem, parallel)
            url = _url(address)
            server = _Server(served, key, lambda: on_ready(url, served))
            asyncio.run(server.serve(sockets=[address]))

    return server.signal == signal.SIGINT


class _Server(uvicorn.Server):
    """uvicorn's server with a ready callback; returns after a signal instead of re-raising it."""

    def __init__(self, served: ServedModel, key: str, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            make_app(served, key),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
        super().__init__(config)
        self.signal = 0
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop, number)

        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.signal = self.signal or number


def _read_key(name: str) -> str:
    if not name:
        return ""

    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(
            "api-key-not-set",
            f"{name} is not set, so there is no API key",
            remedy=f"export {name}=…",
        )
    return key


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = socket.socket(family)

    try:
        address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address.bind((host, port))
    except OSError as error:
        address.close()
        raise EnvironmentFailure(
            "cannot-listen",
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            remedy="choose another --port, or 0 for a free one",
        ) from error

    return address


def _url(address: socket.socket) -> str:
    host, port = address.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
