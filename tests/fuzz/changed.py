"""Which harnesses a change is about: their readers, or their own file, are in it."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from pathlib import Path

from tests.fuzz import harness
from tests.support.room_lines import find_base


def find_changed_files(repository: Path) -> set[str]:
    """Return what differs from the commit that a change is compared with, uncommitted too."""
    command = ["git", "diff", "--name-only", find_base(repository) or "HEAD"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def select_harnesses(changed: Collection[str]) -> list[str]:
    """Return the names of the harnesses whose file, or the file of a reader, has changed."""
    return [name for name in harness.names() if not _list_files(name).isdisjoint(changed)]


def _list_files(name: str) -> set[str]:
    files = {f"tests/fuzz/harnesses/{name}.py"}
    for module in harness.load(name).readers:
        path = module.replace(".", "/")
        files |= {f"{path}.py", f"{path}/__init__.py"}
    return files
