"""Children that tests fork from a server do what a new process does, and cost no import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import prefork
from tests.support.commands import command_with_torch, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sends open files to a process")

SERVER = "racdeploy.sandbox.worker"
ARGUMENTS = ("racdeploy.sandbox.text_operations", "0", "0")


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start the child that reads texts, which waits for its standard input."""
    runner = [sys.executable, "-P", "-m", "racdeploy.processes.die_with_parent"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*runner, str(os.getpid()), "0", "0", SERVER, *(arguments or ARGUMENTS)]
    return subprocess.Popen(command, **(pipes | options))


def find_parent(process: subprocess.Popen[bytes]) -> int:
    """Return the process that has started another one."""
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def run(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run racdeploy where torch is imported; return its exit code and both streams."""
    done = subprocess.run(
        command_with_torch(*arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_server_forks_the_children_of_one_module() -> None:
    """They are not this process's own, and run at the same time."""
    with start() as first, start() as second:
        parents = {find_parent(first), find_parent(second)}
        for process in (first, second):
            assert process.poll() is None
            process.kill()
    assert len(parents) == 1
    assert os.getpid() not in parents


def test_a_process_that_has_to_be_new_is_started() -> None:
    """On request, in a folder of its own, or if it is none of racdeploy's."""
    with prefork.exec_children(), start() as asked:
        assert find_parent(asked) == os.getpid()
        asked.kill()
    with start(cwd="/") as elsewhere:
        assert find_parent(elsewhere) == os.getpid()
        elsewhere.kill()
    with subprocess.Popen(["sleep", "60"]) as other:
        assert find_parent(other) == os.getpid()
        other.kill()


def test_it_prints_and_ends_as_a_new_process() -> None:
    """Both streams and the exit code: of success, of an error, and of a traceback."""
    outcomes = [("--version",), ("families", "--check", "/nowhere")]
    forked = [run(*arguments) for arguments in outcomes]
    with prefork.exec_children():
        assert forked == [run(*arguments) for arguments in outcomes]
    assert [code for code, _, _ in forked] == [0, 4]

    with start(ARGUMENTS[0]) as broken:  # without the limits that follow
        _, errors = broken.communicate(timeout=60)
    assert broken.returncode == 1
    assert errors.startswith(b"Traceback")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_that_ends_it_is_its_exit_code(number: signal.Signals) -> None:
    with start() as process:
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=60) == -number


def test_it_ends_when_its_input_does() -> None:
    """The pipe that this process has is the only one."""
    with start() as process:
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_variables_are_those_that_it_is_given() -> None:
    """Also such that are read while modules are imported, which needs another server."""
    with start(env=environment(OMP_NUM_THREADS="3")) as other, start() as usual:
        variables = Path(f"/proc/{find_parent(other)}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=3" in variables
        assert find_parent(other) != find_parent(usual)
        for process in (other, usual):
            process.kill()

    # No module reads this one when it is imported: the child finds it.
    narrow = run("build", "--help", COLUMNS="60")[1].splitlines()
    wide = run("build", "--help", COLUMNS="90")[1].splitlines()
    assert max(map(len, narrow)) <= 60 < max(map(len, wide))


def test_it_has_a_session_of_its_own_on_request() -> None:
    with start(start_new_session=True) as own, start() as shared:
        assert os.getsid(own.pid) == own.pid
        assert os.getsid(shared.pid) != shared.pid
        for process in (own, shared):
            process.kill()


def test_its_processor_time_is_counted() -> None:
    before_s = prefork.read_children_s()
    run("--version")
    assert prefork.read_children_s() > before_s
