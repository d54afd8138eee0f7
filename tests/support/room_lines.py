"""Print the lines of each room and the change: ``python -m tests.support.room_lines``.

Lines are those of Python that are not blank: the reviewer sees where a branch adds or removes code,
and no test goes by them. The change is since the commit at which the branch has left main, on main
itself since the commit before.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "racdeploy"
MAIN_BRANCHES = ("origin/main", "main")


def count_lines(repository: Path, commit: str = "") -> Counter[str]:
    """Return the non-blank lines of Python by room.

    Args:
        repository: a folder with a git repository that holds the package.
        commit: what to count; empty: the files as they are, unless git ignores them.
    """
    pattern = ["-e", "[^[:space:]]"]
    where = [commit] if commit else ["--untracked"]
    counted = _git(repository, "grep", "-c", *pattern, *where, "--", f"{PACKAGE}/*.py")

    lines: Counter[str] = Counter()
    for row in counted.splitlines():
        file, _, number = row.removeprefix(f"{commit}:").rpartition(":")
        room = Path(file).relative_to(PACKAGE).parts[0]
        lines[room] += int(number)
    return lines


def find_base(repository: Path) -> str:
    """Return the commit to compare with; empty where the history does not reach it."""
    head = _git(repository, "rev-parse", "HEAD")
    for branch in MAIN_BRANCHES:
        base = _git(repository, "merge-base", "HEAD", branch)
        if base and base != head:
            return base

    return _git(repository, "rev-parse", "--verify", "--quiet", "HEAD~1")


def list_rows(repository: Path) -> list[str]:
    """Return the rows to print."""
    after = count_lines(repository)
    base = find_base(repository)
    before = count_lines(repository, base) if base else after

    title = f"since {base[:8]}" if base else "unknown: the history ends here"
    rows = [f"{'room':20} {'lines':>7}  change {title}"]
    for room in sorted(before | after):
        change = after[room] - before[room]
        rows.append(f"{room:20} {after[room]:7,}  {change:+,}")

    rows.append(f"{'all':20} {after.total():7,}  {after.total() - before.total():+,}")
    return rows


def _git(repository: Path, *arguments: str) -> str:
    """Return what git prints; empty where it finds nothing."""
    command = ["git", "-C", str(repository), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    print("\n".join(list_rows(Path(sys.argv[1]) if sys.argv[1:] else ROOT)))
