"""A Hub on loopback, and the command line as a user with a token runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from racdeploy.cli.app import app
from tests.support.hub_server import READS, WRITES, Hub, hub_server, point_at

Run = Callable[..., Result]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub that the real client of this process asks."""
    with hub_server() as server:
        point_at(server.address, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", WRITES)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def run(hub: Hub) -> Run:
    """Run a command and return its streams and exit code; no token is ever printed."""

    def call(*arguments: object) -> Result:
        done = CliRunner().invoke(app, [str(part) for part in arguments])
        assert not any(token in done.output for token in (WRITES, READS))
        return done

    return call
