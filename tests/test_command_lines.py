"""Every command line of the documents is one that the command line takes."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from racdeploy.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "Dockerfile",
]
CHEAP = {"targets", "plugins", "init", "doctor", "cache"}
"""Verbs whose lines are run as well; so is every plan of the embedded model."""


def _blocks(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        yield from re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    else:
        yield "\n".join(line[2:] for line in text.splitlines() if line.startswith("#   docker run"))


def _lines(file: Path) -> Iterator[list[str]]:
    """Yield the words behind ``racdeploy`` of every command in a document's blocks."""
    for block in _blocks(file):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            yield from _commands(list(lexer))


def _commands(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if not re.fullmatch(r"[;&|<>()]+", word):
            command.append(word)
            continue
        while command and re.match(r"\w+=", command[0]):
            command.pop(0)

        # The same command, from a registry, in a container or in an environment.
        if command[:1] == ["uvx"] or command[:2] == ["docker", "run"]:
            del command[: len(command) - 1 - command[::-1].index("racdeploy")]
        if command and command[0].removeprefix(".venv/bin/") == "racdeploy":
            yield command[1:]
        command = []


FOUND = [
    pytest.param(words, id=f"{file.relative_to(ROOT)}: {shlex.join(words)}")
    for file in DOCUMENTS
    for words in _lines(file)
]


def _parse(words: list[str]) -> None:
    """Parse words as the command line does, without running anything."""
    command: Any = get_command(app)
    name = "racdeploy"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    with contextlib.suppress(typer.Exit):  # after --help or --version
        command.make_context(name, list(words))


def test_the_documents_have_command_lines() -> None:
    """Of nearly every verb."""
    verbs = {param.values[0][0] for param in FOUND}  # type: ignore[index]
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert len(FOUND) > 60
    assert known - verbs <= {"unpack", "export", "traces", "plugins", "targets", "cache"}


@pytest.mark.parametrize("words", FOUND)
def test_a_documented_line_is_taken(words: list[str]) -> None:
    """Its command, options and values exist."""
    _parse(words)


def test_a_wrong_line_is_not_taken() -> None:
    """So that the test above can fail."""
    for line in ("biuld", "build --sparcity 0.5", "verify", "bench b --rounds many"):
        with pytest.raises((AssertionError, Exception)) as caught:
            _parse(line.split())
        assert not isinstance(caught.value, typer.Exit)


@pytest.mark.parametrize(
    "words",
    [
        param
        for param in FOUND
        if param.values[0][0] in CHEAP  # type: ignore[index]
        or ("--dry-run" in param.values[0] and "tiny-reasoner" in param.values[0])  # type: ignore[operator]
    ],
)
def test_a_cheap_line_runs(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is written, in an empty folder with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RACDEPLOY_WORK", str(tmp_path / "work"))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
