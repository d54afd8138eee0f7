"""Run the command line in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """Exit code and both streams."""

    code: int
    out: str
    err: str


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


def racdeploy(*arguments: object, cwd: Path | None = None, **extra: str) -> Outcome:
    """Run ``racdeploy`` to its end."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**extra),
        timeout=900,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
