"""Run the command line: within the test's process, or in one of its own as a user does."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from racdeploy import cli

_CODE = r"([a-z0-9]+(?:-[a-z0-9]+)+)"
_ERROR_CODE = re.compile(rf'error: .*? \[{_CODE}\](?:\s|$)|"code": "{_CODE}"', re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """Exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def error_code(self) -> str:
        """The code of the error that was printed, or nothing."""
        return find_error_code(self.out + self.err)


def find_error_code(printed: str) -> str:
    """Return the code of the error in what a command printed, or nothing."""
    found = _ERROR_CODE.search(printed)
    return found[1] or found[2] if found else ""


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment, with the package found and no Hub reached."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", **extra}


def command(*arguments: object) -> list[str]:
    """Return the command line of ``racdeploy`` with this interpreter."""
    return [
        sys.executable,
        "-c",
        "import racdeploy.cli; racdeploy.cli.main()",
        *map(str, arguments),
    ]


def command_with_torch(*arguments: object) -> list[str]:
    """Return the same as a child that ends with this process and is forked with torch imported.

    :mod:`tests.support.prefork` forks it where it is given no folder and no function to begin with.
    """
    runner = [sys.executable, "-P", "-m", "racdeploy.processes.die_with_parent"]
    limits = ("0", "0")
    return [*runner, str(os.getpid()), *limits, "racdeploy.__main__", *map(str, arguments)]


def racdeploy(*arguments: object, cwd: Path | None = None, **extra: str) -> Outcome:
    """Run ``racdeploy`` to its end in this process, which has torch already.

    Neither signals nor what a process leaves behind are seen so: see :func:`racdeploy_alone`.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["racdeploy", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, environment(**extra)),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        code = _call_main()

    return Outcome(code, out.getvalue(), err.getvalue())


def _call_main() -> int:
    """Return the exit code of the command line."""
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def racdeploy_alone(*arguments: object, cwd: Path | None = None, **extra: str) -> Outcome:
    """Run ``racdeploy`` to its end in a process of its own."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**extra),
        timeout=900,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
