"""Server process: bind an address, load a bundle, serve, shut down on a signal.

After the first signal no request is accepted and running ones get ``SHUTDOWN_GRACE_S`` seconds; a
second signal stops them at once. A model of which a process has died is loaded again, after
``RELOAD_EVERY_S`` seconds where that has just been done.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import current_thread, main_thread
from typing import Any

import uvicorn

from racdeploy.errors import EngineError, EnvironmentFailure, RacdeployError, UsageError
from racdeploy.processes.access import is_loopback, read_key
from racdeploy.runtime import Model, load
from racdeploy.runtime.streams import DaemonThreadPool
from racdeploy.serve.app import ServedModel, make_app
from racdeploy.serve.connections import MAX_HEADER_BYTES, LimitedConnection
from racdeploy.sparse_kernels import AccelMode

SHUTDOWN_GRACE_S = 5
RELOAD_EVERY_S = 60.0
WATCH_EVERY_S = 0.5
_LOG = logging.getLogger("racdeploy.serve")
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
    alias: str = "",
    on_ready: Callable[[str, BundleServer], None],
) -> bool:
    """Serve a bundle until a signal; return True if it was SIGINT (Ctrl-C).

    Args:
        port: 0 selects a free one.
        key_env: environment variable with the API key; empty requires no key.
        dense: dense artifact to serve instead of the pruned one.
        alias: name of the model; empty takes that of its file, which tells quant and pruning.
        on_ready: called once with the URL of the API and the server, when it answers.

    Raises:
        UsageError: the key is not set, or is missing although other machines can reach the host.
        EnvironmentFailure: the address cannot be bound.
        EngineError: the engine died, and the model cannot be loaded again.
    """
    key = read_key(key_env)
    if not key and not is_loopback(host):
        raise UsageError(
            "no-api-key",
            f"{host} can be reached from other machines, and there is no API key",
            remedy="export RACDEPLOY_KEY=…, and add --api-key-env RACDEPLOY_KEY",
        )

    load_model = partial(
        load,
        bundle,
        threads=threads,
        parallel=parallel,
        context_tokens=context_tokens,
        accel=accel,
        dense=dense,
    )

    with _bind(host, port) as address:
        model = load_model()
        file = dense or Path(model.settings.artifact.path)

        with closing(ServedModel(model, alias or file.stem, parallel)) as served:
            name, number = address.getsockname()[:2]
            named = f"[{name}]" if ":" in name else name
            url = f"http://{named}:{number}/v1"
            server = BundleServer(served, key, load_model, lambda: on_ready(url, server))
            asyncio.run(server.serve(sockets=[address]))

    if server.failure:
        raise server.failure
    return server.signal == signal.SIGINT


@contextmanager
def serving(bundle: Path, **options: Any) -> Iterator[tuple[str, str]]:
    """Serve a bundle in a thread during the body; yield the URL of the API and the model's name.

    Args:
        options: of :func:`serve`.
    """
    _LOG.setLevel(logging.WARNING)  # no line for each request
    ready = SimpleQueue[Any]()
    options |= {"host": "127.0.0.1", "port": 0, "on_ready": lambda *known: ready.put(known)}
    ended: Future[Any] = DaemonThreadPool(1).submit(partial(serve, bundle, **options))
    ended.add_done_callback(lambda _: ready.put(()))

    url, server = ready.get() or ended.result()  # which raises its error
    try:
        yield url, server.served.name
    finally:
        server.should_exit = True
        ended.result()


class BundleServer(uvicorn.Server):
    """uvicorn's server with a ready callback; returns after a signal instead of re-raising it.

    ``failure`` is the error that stopped it, if one did.
    """

    def __init__(
        self,
        served: ServedModel,
        key: str,
        load_model: Callable[[], Model],
        on_ready: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            make_app(served, key),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http=partial(LimitedConnection, {}),  # type: ignore[arg-type]
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
        super().__init__(config)
        self.signal = 0
        self.failure: EngineError | None = None
        self.served = served
        self._load_model = load_model
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watcher = asyncio.create_task(self._watch_model())
        self._on_ready()

    async def _watch_model(self) -> None:
        """Load the model again when a process of it has died; stop the server where that fails."""
        clock = asyncio.get_running_loop().time
        earliest_s = clock()
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if self.served.model.is_alive() or clock() < earliest_s:
                continue

            _LOG.warning("the model has died, and is loaded again")
            earliest_s = clock() + RELOAD_EVERY_S
            try:
                # In a daemon thread, so that a signal ends the server meanwhile.
                loading = DaemonThreadPool(1).submit(self._load_model)
                model = await asyncio.wrap_future(loading)
            except (RacdeployError, OSError) as error:
                self.failure = EngineError(
                    "engine-not-reloaded",
                    f"the model died, and cannot be loaded again: {error}",
                )
                self.should_exit = True
                return
            self.served.close()
            self.served.model = model

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = _SIGNALS if current_thread() is main_thread() else ()
        for number in signals:
            loop.add_signal_handler(number, self._stop, number)

        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.signal = self.signal or number


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
