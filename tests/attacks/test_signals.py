"""SIGTERM and SIGHUP end a command as Ctrl-C does; what kill -9 leaves is swept by the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import environment
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = [
    pytest.mark.answers("L4"),
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]
# An export that writes its tensors until it is ended.
STALLED = """
import os, pathlib, threading
from racdeploy.exporting.gguf import writer
def write_parts(*arguments):
    pathlib.Path(os.environ["STARTED"]).touch()
    threading.Event().wait()
writer._write_parts = write_parts
import racdeploy.cli; racdeploy.cli.main()
"""


@pytest.fixture
def exporting(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that takes a minute to write into a folder."""
    (tmp_path / "out").mkdir()
    return environment() | {"STARTED": str(tmp_path / "started"), "OUT": str(tmp_path / "out")}


def _command(variables: dict[str, str], *options: str) -> list[str]:
    return ["export", "tiny-reasoner", "--out", f"{variables['OUT']}/m.gguf", *options]


def _start(variables: dict[str, str], *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, *_command(variables, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        text=True,
    )
    wait_for(Path(variables["STARTED"]).exists, "the export to write", process)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_command_with_a_word_and_a_clean_folder(
    exporting: dict[str, str], name: str
) -> None:
    """Exit code 130, the command that resumes, and no traceback."""
    with _start(exporting) as process:
        process.send_signal(signal.Signals[name])
        out, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, "")
    again = " ".join(["racdeploy", *_command(exporting)])
    assert f"finished work is kept. Resume with:\n  {again}" in said
    assert (name in said) == (name != "SIGINT")
    assert "Traceback" not in said
    assert list(Path(exporting["OUT"]).iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_with_json_an_interruption_is_one_object(exporting: dict[str, str], name: str) -> None:
    """As every other end of a command."""
    with _start(exporting, "--json") as process:
        process.send_signal(signal.Signals[name])
        out, _ = process.communicate(timeout=PATIENCE_S)
    found = json.loads(out)
    assert (process.returncode, found["exit_code"], found["kind"]) == (130, 130, "Interrupted")
    assert found["code"] == "run-interrupted"
    assert found["remedy"] == " ".join(["racdeploy", *_command(exporting, "--json")])


def test_an_ignored_signal_stays_ignored(exporting: dict[str, str]) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = _start(exporting)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        process.send_signal(signal.SIGHUP)
        process.terminate()  # of two signals that wait, the first has the smaller number
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "SIGTERM" in said


@pytest.mark.takes(6, "three commands are started")
def test_what_a_killed_export_left_is_swept_by_the_next(exporting: dict[str, str]) -> None:
    """Not while it runs."""
    folder = Path(exporting["OUT"])
    with _start(exporting) as killed:
        (left,) = folder.iterdir()
        os.remove(exporting["STARTED"])
        with _start(exporting) as second:
            assert len(list(folder.iterdir())) == 2
            second.terminate()
            second.communicate(timeout=PATIENCE_S)
        assert [left] == list(folder.iterdir())
        killed.kill()

    os.remove(exporting["STARTED"])
    with _start(exporting) as third:
        assert left not in folder.iterdir()
        third.terminate()
        third.communicate(timeout=PATIENCE_S)
    assert list(folder.iterdir()) == []
