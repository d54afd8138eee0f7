"""SIGTERM and SIGHUP end a command as Ctrl-C does; what kill -9 leaves is swept by the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import command, environment

pytestmark = [
    pytest.mark.answers("L4"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are for Linux"),
]
# It says its version at once, and compiles until it is ended.
COMPILER = """#!/bin/sh
case "$1" in --version) echo slow 1.0; exit;; esac
touch "$STARTED"
exec sleep 60
"""


@pytest.fixture
def building(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that compiles for a minute."""
    compiler = tmp_path / "slow-c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    own = {"CXX": str(compiler), "RACDEPLOY_ACCEL": str(tmp_path / "accel")}
    return environment() | own | {"STARTED": str(tmp_path / "started")}


def _start(variables: dict[str, str], *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command("accel", "build", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        text=True,
    )
    while not Path(variables["STARTED"]).exists():
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_command_with_a_word_and_a_clean_folder(
    building: dict[str, str], name: str
) -> None:
    """Exit code 130, the command that resumes, and no traceback."""
    with _start(building) as process:
        process.send_signal(signal.Signals[name])
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "finished work is kept. Resume with:\n  racdeploy accel build" in said
    assert (name in said) == (name != "SIGINT")
    assert "Traceback" not in said
    assert list(Path(building["RACDEPLOY_ACCEL"]).iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_with_json_an_interruption_is_one_object(building: dict[str, str], name: str) -> None:
    """As every other end of a command."""
    with _start(building, "--json") as process:
        process.send_signal(signal.Signals[name])
        out, _ = process.communicate(timeout=60)
    found = json.loads(out)
    assert (process.returncode, found["exit_code"], found["kind"]) == (130, 130, "Interrupted")
    assert found["remedy"] == "racdeploy accel build --json"


def test_an_ignored_signal_stays_ignored(building: dict[str, str]) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = _start(building)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=60)


def test_what_a_killed_build_left_is_swept_by_the_next(building: dict[str, str]) -> None:
    """Not while it runs."""
    folder = Path(building["RACDEPLOY_ACCEL"])
    with _start(building) as killed:
        (left,) = folder.iterdir()
        os.remove(building["STARTED"])
        with _start(building) as second:
            assert len(list(folder.iterdir())) == 2
            second.terminate()
            second.communicate(timeout=60)
        assert [left] == list(folder.iterdir())
        killed.kill()

    os.remove(building["STARTED"])
    with _start(building) as third:
        assert left not in folder.iterdir()
        third.terminate()
        third.communicate(timeout=60)
    assert list(folder.iterdir()) == []
