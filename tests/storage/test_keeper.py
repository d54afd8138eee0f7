"""Programs that end with us, with all that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from racdeploy.storage.keeper import keep

# Starts a child of its own, says who both are, and waits.
_PARENT = (
    "import os, subprocess, sys, time; "
    "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
    "print(os.getpid(), other.pid, flush=True); time.sleep(300)"
)
_HOLDER = (
    "import os, sys, time; from pathlib import Path; from racdeploy.storage.keeper import keep\n"
    "with keep([sys.executable, '-c', sys.argv[1]], Path(sys.argv[2]), Path('.'), os.environ):\n"
    "    time.sleep(300)"
)
_DEADLINE_S = 60


def _wait_for_pids(log: Path) -> list[int]:
    for _ in range(10 * _DEADLINE_S):
        if log.is_file() and log.read_text().endswith("\n"):
            return [int(pid) for pid in log.read_text().split()]
        time.sleep(0.1)
    raise AssertionError("the program did not start")


def _wait_until_gone(pids: list[int]) -> None:
    for _ in range(10 * _DEADLINE_S):
        if not any(map(_runs, pids)):
            return
        time.sleep(0.1)
    raise AssertionError(f"some of {pids} still run")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(3)", 3), ("pass", 0)])
def test_the_exit_code_is_that_of_the_program(tmp_path: Path, code: str, expected: int) -> None:
    """Its output is in the log, and its environment is the given one."""
    log = tmp_path / "log"
    say = f"import os; print(sorted(os.environ)[0], os.getcwd()); {code}"
    with keep([sys.executable, "-c", say], log, tmp_path, {"A_NAME": "x"}) as process:
        assert process.wait(_DEADLINE_S) == expected
    assert log.read_text() == f"A_NAME {tmp_path}\n"


def test_it_ends_with_the_body(tmp_path: Path) -> None:
    """Its own child too."""
    log = tmp_path / "log"
    with keep([sys.executable, "-c", _PARENT], log, tmp_path, os.environ):
        pids = _wait_for_pids(log)
        assert all(map(_runs, pids))
    _wait_until_gone(pids)


def test_one_that_will_not_end_is_killed(tmp_path: Path) -> None:
    """After the time that it has to end by itself."""
    log = tmp_path / "log"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + _PARENT
    with keep([sys.executable, "-c", deaf], log, tmp_path, os.environ):
        pids = _wait_for_pids(log)
    _wait_until_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """``kill -9`` gives nobody a chance to tidy up."""
    log = tmp_path / "log"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, _PARENT, str(log)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = _wait_for_pids(log)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    _wait_until_gone(pids)
