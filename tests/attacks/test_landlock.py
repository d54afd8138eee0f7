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
from racdeploy.processes import landlock, privileges
from racdeploy.sandbox.client import Sandbox, SandboxRequest
from tests.support.errors import raises

needs_landlock = pytest.mark.skipif(
    landlock.version() < 6, reason="this system has no Landlock, or an older one"
)
SETTINGS = EngineSettings(context_tokens=64, parallel=1, threads=1)
ALLOWED = {"read", "device", "end"}
DRIVERS = {"thread", "unix socket", "shared memory", "memory file"}
needs_seccomp = pytest.mark.skipif(
    not privileges.system_calls(), reason="this system has no seccomp, or another processor"
)


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
    done = {name for name, did in went.items() if did}
    assert done >= ALLOWED
    if privileges.system_calls():
        assert done == ALLOWED | DRIVERS
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


@needs_seccomp
@pytest.mark.parametrize("opens_files", [False, True])
def test_a_reader_starts_threads_and_changes_nothing(tmp_path: Path, opens_files: bool) -> None:
    """No process, socket, shared memory; no mode, time or owner of a file; root or not."""
    victim = tmp_path / "authorized_keys"
    victim.write_text("of the user")
    before = victim.stat()
    reader = Sandbox("tests.support.opening", opens_files=opens_files)
    answer = reader.ask(SandboxRequest("all", {"path": str(victim), "opens_files": opens_files}))
    reader.close()
    assert answer["went"] == ["thread"]
    assert victim.stat() == before


@needs_seccomp
def test_another_interface_of_the_processor_is_denied() -> None:
    """A filter by numbers is passed by with those of 32 bits, unless it looks at their kind."""
    calls = privileges.system_calls()
    steps = privileges.make_filter("reader")
    allow, refuse = 0x7FFF0000, 0x50001
    number = calls["socket"]
    own = calls["architecture"]
    assert _run(steps, number, own ^ 1, (0, 0)) == refuse
    assert _run(steps, number | 0x40000000, own, (2, 0)) == refuse
    assert _run(steps, 0, own, (0, 0)) == allow  # read, or io_setup
    assert _run(steps, calls["clone"], own, (0x10000, 0)) == allow
    assert _run(steps, calls["clone"], own, (17, 0)) == refuse
    assert _run(steps, calls["mmap"], own, (0, 2)) == allow
    assert _run(steps, calls["mmap"], own, (0, 1)) == refuse
    loose = privileges.make_filter("engine")
    assert [_run(loose, number, own, (family, 0)) for family in (1, 2, 10)] == [
        allow,
        refuse,
        refuse,
    ]
    assert _run(loose, calls["mmap"], own, (0, 1)) == allow


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_both_processors_deny_the_same(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many numbers, but those that ARM64 never had: fork, chmod, utime, ptrace's like."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    privileges.system_calls.cache_clear()
    calls = privileges.system_calls()
    privileges.system_calls.cache_clear()
    if calls:
        assert len(calls["denied"]) == len(set(calls["denied"])) >= 28
        assert {"clone", "clone3", "socket", "mmap", "seccomp", "capset"} < calls.keys()


def _run(
    steps: list[tuple[int, ...]], number: int, architecture: int, arguments: tuple[int, int]
) -> int:
    """Run a filter as the kernel does; return its verdict."""
    data = {0: number, 4: architecture, 16: arguments[0], 40: arguments[1]}
    loaded, at = 0, 0
    while True:
        code, true, false, operand = steps[at]
        at += 1
        if code == 0x20:
            loaded = data[operand]
        elif code == 0x06:
            return operand
        else:
            holds = {0x15: loaded == operand, 0x35: loaded >= operand, 0x45: loaded & operand}
            at += true if holds[code] else false


def test_without_it_nothing_changes_and_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert landlock.restrict(landlock.ALL, {}) is False
    (found,) = [each for each in doctor.examine() if each["what"] == "limits"]
    assert found["state"] == "unused"
    assert "no Landlock" in found["detail"]


@needs_landlock
def test_doctor_says_that_system_calls_are_not_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "system_calls", dict)
    privileges.give_up("reader")  # changes nothing
    (found,) = [each for each in doctor.examine() if each["what"] == "limits"]
    assert "no seccomp" in found["detail"]


@needs_landlock
def test_doctor_says_what_holds() -> None:
    (found,) = [each for each in doctor.examine() if each["what"] == "limits"]
    assert (found["state"], "Landlock, version" in found["detail"]) == ("ok", True)
