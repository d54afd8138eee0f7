"""CI tells the reviewer how many lines each room has, and what the branch changes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.room_lines import count_lines, find_base, list_rows


def _git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    command = ["git", "-C", str(repository), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _commit(repository: Path, **rooms: str) -> str:
    """Commit one file for each room; return the commit."""
    for room, text in rooms.items():
        folder = repository / "racdeploy" / room
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(text)

    _git(repository, "add", ".")
    _git(repository, "commit", "--quiet", "--message", "A change", "--no-verify")
    return _git(repository, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    _git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    _commit(tmp_path, quant="x = 1\n\n\ny = 2\n", cli="x = 1\n")
    return tmp_path


def _words(repository: Path) -> list[list[str]]:
    return [row.split() for row in list_rows(repository)[1:]]


def test_blank_lines_do_not_count(repository: Path) -> None:
    (repository / "racdeploy" / "notes.txt").write_text("not Python\n")
    assert {"quant": 2, "cli": 1} == count_lines(repository) == count_lines(repository, "HEAD")


def test_the_change_is_since_the_branch_left_main(repository: Path) -> None:
    """What main has done since is not the branch's; what is not committed is."""
    left = _git(repository, "rev-parse", "HEAD")
    _git(repository, "checkout", "--quiet", "-b", "branch")
    _commit(repository, quant="x = 1\n")
    _git(repository, "checkout", "--quiet", "main")
    _commit(repository, cli="x = 1\ny = 2\n")
    _git(repository, "checkout", "--quiet", "branch")
    (repository / "racdeploy" / "tasks.py").write_text("a = 1\nb = 2\nc = 3\n")

    assert find_base(repository) == left
    expected = [
        ["cli", "1", "+0"],
        ["quant", "1", "-1"],
        ["tasks.py", "3", "+3"],
        ["all", "5", "+2"],
    ]
    assert expected == _words(repository)


def test_main_is_compared_with_the_commit_before(repository: Path) -> None:
    _commit(repository, quant="", cli="x = 1\n")
    assert _words(repository) == [["cli", "1", "+0"], ["quant", "0", "-2"], ["all", "1", "-2"]]


def test_a_history_of_one_commit_has_no_change(repository: Path) -> None:
    """As a clone of depth 1 has it."""
    assert find_base(repository) == ""
    assert "unknown" in list_rows(repository)[0]
    assert _words(repository)[-1] == ["all", "3", "+0"]
