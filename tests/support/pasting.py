"""Code blocks of a document, and a terminal to paste them into.

The shell is bash. Programs that a test has a stand-in for are found first on its PATH: each asks
this process, which answers itself or names the command that runs in its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_CLIENT = """
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
program, *arguments = sys.argv[1:]
folder, variables = os.getcwd(), dict(os.environ)
asked = dict(program=program, arguments=arguments, folder=folder, variables=variables)
link.sendall(json.dumps(asked).encode() + b"\\n")
reply = json.loads(link.makefile().read())
sys.stdout.write(reply["out"])
sys.stderr.write(reply["err"])
if reply["instead"]:
    sys.stdout.flush()
    os.execvp(reply["instead"][0], reply["instead"])
sys.exit(reply["code"])
"""
_LIMIT_S = 300


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line at which it begins."""

    language: str
    text: str
    line: int

    def commands(self) -> list[str]:
        """Return its command lines, one each whatever their length, as they are written."""
        joined = re.sub(r"\\\n *", "", self.text)
        return [line for line in joined.splitlines() if line and not line.startswith("#")]


def read_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    return [
        Block(each[2], re.sub(f"^{each[1]}", "", each[3], flags=re.MULTILINE), _line(text, each))
        for each in _FENCE.finditer(text)
    ]


def _line(text: str, found: re.Match[str]) -> int:
    return text.count("\n", 0, found.start()) + 1


@dataclass(frozen=True)
class Call:
    """What the shell ran: a program's arguments, its folder and its environment."""

    arguments: list[str]
    folder: Path
    variables: dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What a stand-in prints and ends with, or the command that the shell runs in its place."""

    code: int = 0
    out: str = ""
    err: str = ""
    instead: list[str] = field(default_factory=list)


Program = Callable[[Call], Reply]


class Terminal:
    """A shell that keeps its folder from block to block; all of its state is below one folder."""

    def __init__(
        self, state: Path, folder: Path, programs: Mapping[str, Program], variables: dict[str, str]
    ) -> None:
        self.folder = folder
        self.bin = state / "bin"
        self._programs = programs
        self._state = state
        self._listener = socket.socket(socket.AF_UNIX)
        self._variables = variables | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def __enter__(self) -> Terminal:
        self.bin.mkdir(parents=True)
        address = str(self._state / "s")
        self._listener.bind(address)
        self._listener.listen()
        self._listener.settimeout(0.02)
        (self._state / "client.py").write_text(_CLIENT.format(address=address), encoding="utf-8")
        for name in self._programs:
            self.install(self.bin / name, name)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def install(self, file: Path, program: str) -> None:
        """Write an executable that stands for one of the programs."""
        file.parent.mkdir(parents=True, exist_ok=True)
        client = f'exec "{sys.executable}" -I -S "{self._state / "client.py"}" {program} "$@"\n'
        file.write_text(f"#!/bin/sh\n{client}", encoding="utf-8")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def paste(self, text: str, typed: str = "") -> str:
        """Run a block to its end and return what it printed; ``typed`` is its standard input.

        Raises:
            AssertionError: a command of it failed.
        """
        printed, stdin, left = (self._state / name for name in ("printed", "typed", "left"))
        stdin.write_text(typed, encoding="utf-8")
        with printed.open("w") as out, stdin.open() as keyboard:
            shell = subprocess.Popen(
                ["bash", "-e", "-o", "pipefail", "-c", f'{text}\npwd > "{left}"'],
                cwd=self.folder,
                env=self._variables,
                stdin=keyboard,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                self._answer_until_end(shell)
            finally:
                shell.kill()
                shell.wait()

        found = printed.read_text(encoding="utf-8", errors="replace")
        assert shell.returncode == 0, f"exit code {shell.returncode}:\n{text}\n{found[-4000:]}"
        self.folder = Path(left.read_text(encoding="utf-8").rstrip("\n"))
        return found

    def _answer_until_end(self, shell: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while shell.poll() is None:
            assert time.monotonic() < deadline, f"the block did not end within {_LIMIT_S} s"
            with contextlib.suppress(TimeoutError):
                link, _ = self._listener.accept()
                with link, link.makefile("rw") as stream:
                    stream.write(json.dumps(vars(self._answer(json.loads(stream.readline())))))

    def _answer(self, asked: dict[str, Any]) -> Reply:
        call = Call(asked["arguments"], Path(asked["folder"]), asked["variables"])
        try:
            return self._programs[asked["program"]](call)
        except Exception as error:  # noqa: BLE001 - a failed command, like any other
            return Reply(1, err=f"{type(error).__name__}: {error}\n")
