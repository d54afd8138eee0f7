"""How the command line ends where nobody reads what it prints, or where it was typed wrongly."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMANDS = (["--help"], ["plugins"], ["plugins", "--json"], ["build", "--help"])


def _run(arguments: list[str], stdout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "racdeploy", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_closed_pipe_ends_it_as_every_unix_tool(arguments: list[str]) -> None:
    """Exit code 1 is a failed gate, and nothing else."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = _run(arguments, writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["plugins", "--json"], ["targets"], ["nothing", "--json"]])
def test_a_full_disk_under_stdout_is_an_error_of_the_machine(arguments: list[str]) -> None:
    """Also where the error itself was to be printed there."""
    full = os.open("/dev/full", os.O_WRONLY)
    ended = _run(arguments, full)
    os.close(full)
    assert ended.returncode == 4
    assert "[os-error]" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "arguments", [["verify", "--tear", "smoke"], ["nothing"], ["run", "b", "q", "--seed", "-1"]]
)
def test_wrong_usage_is_json_where_json_was_asked_for(arguments: list[str]) -> None:
    ended = _run([*arguments, "--json"], subprocess.PIPE)
    printed = json.loads(ended.stdout)
    assert (ended.returncode, printed["exit_code"], printed["code"]) == (2, 2, "wrong-usage")
    assert printed["remedy"].endswith("--help")
