"""What an engine and a reader can do beside computing: nothing, where the system has Landlock."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from racdeploy.cli import doctor
from racdeploy.engines.engine import EngineSettings
from racdeploy.engines.subprocess_engine import SubprocessEngine
from racdeploy.errors import EngineError
from racdeploy.processes import landlock
from racdeploy.sandbox.client import Sandbox, SandboxRequest
from tests.support.errors import raises

needs_landlock = pytest.mark.skipif(
    landlock.version() < 6, reason="this system has no Landlock, or an older one"
)
SETTINGS = EngineSettings(context_tokens=64, parallel=1, threads=1)
ALLOWED = {"read", "device", "end"}


@needs_landlock
def test_an_engine_starts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads, and computes: nor into the caches of its user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    victim = tmp_path / "authorized_keys"
    victim.write_text("of the user")

    with socket.create_server(("127.0.0.1", 0)) as server:
        given = {
            "victim": str(victim),
            "kept": str(tmp_path / "cache"),
            "port": server.getsockname()[1],
        }
        with pytest.raises(EngineError) as caught:
            SubprocessEngine("tests.support.escaping", "the engine", victim, SETTINGS, **given)

    went = json.loads(caught.value.message)
    assert {name for name, did in went.items() if did} == ALLOWED
    assert victim.read_text() == "of the user"
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "authorized_keys"}


@needs_landlock
@pytest.mark.parametrize("op", ["program", "connect", "remove"])
def test_a_reader_that_opens_files_does_no_more(tmp_path: Path, op: str) -> None:
    """Scorers import what they need late."""
    victim = tmp_path / "authorized_keys"
    victim.write_text("of the user")
    reader = Sandbox("tests.support.opening", opens_files=True)
    with raises("file-not-read", "PermissionError"):
        reader.ask(SandboxRequest(op, {"path": str(victim)}))
    reader.ask(SandboxRequest("file", {}))
    reader.close()
    assert victim.read_text() == "of the user"


def test_without_it_nothing_changes_and_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert landlock.restrict(landlock.ALL, {}) is False
    (found,) = [each for each in doctor.examine() if each["what"] == "limits"]
    assert found["state"] == "unused"
    assert "no Landlock" in found["detail"]


@needs_landlock
def test_doctor_says_what_holds() -> None:
    (found,) = [each for each in doctor.examine() if each["what"] == "limits"]
    assert (found["state"], "Landlock, version" in found["detail"]) == ("ok", True)
