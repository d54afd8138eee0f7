"""What `make test` installs, archive by archive: ``python -m tests.support.lock`` writes it again.

pip chooses the archives and says their hashes; the index that they come from is the machine's own
and is not written down. ``fits`` ends with an error where the archives are of another machine,
``versions`` prints the lock as constraints. Both use the standard library alone: they run before
anything is installed. Source: pip's documentation, "Secure installs" and "Installation Report".
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "locked.txt"
PIP = ROOT / "requirements" / "pip.txt"
UNLOCKED = {
    "torch": "its build for CPU, CUDA or ROCm is the machine's, and each has another hash",
}
"""What is installed by its range, with the reason."""
_OF_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton.*|pytorch-triton.*")
_GLIBC = (2, 34)  # older ones take other wheels of the same versions
_HEADER = """\
# What `make test` installs on CPython 3.11, Linux, x86-64. Written by: python -m tests.support.lock
# Not here: torch ({torch}).
"""
_ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})*)$")


@dataclass(frozen=True)
class Locked:
    """A package of the lock: its version, and the SHA-256 of each archive that may be taken."""

    version: str
    hashes: tuple[str, ...]


def read(file: Path = LOCK) -> dict[str, Locked]:
    """Return what a lock holds, by the normal form of each name; an odd line is an error."""
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue

        match = _ENTRY.match(line)
        assert match, f"{file.name} has a line that pins nothing: {line}"
        hashes = tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})", match[3]))
        found[normal(match[1])] = Locked(match[2], hashes)
    return found


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def refuse_machine() -> str:
    """Return why the locked archives are not for this machine, or an empty string."""
    here = f"{platform.python_implementation()} {'.'.join(platform.python_version_tuple()[:2])}"
    here += f", {platform.system()}, {platform.machine()}"
    if here != "CPython 3.11, Linux, x86_64":
        return here

    library = os.confstr("CS_GNU_LIBC_VERSION") or "no glibc"
    numbers = tuple(map(int, re.findall(r"\d+", library)))[:2]
    return library if numbers < _GLIBC else ""


def write(file: Path, wanted: str, header: str = "") -> None:
    """Ask pip what it would install here, and write it with the hashes of its archives."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    done = subprocess.run(
        [*command, "--report", "-", wanted], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )

    entries = []
    for found in json.loads(done.stdout)["install"]:
        name = normal(found["metadata"]["name"])
        if name in UNLOCKED or name == "racdeploy" or _OF_TORCH.fullmatch(name):
            continue
        entries.append(_write_entry(name, found))

    file.write_text(header + "".join(sorted(entries)), encoding="utf-8")


def _write_entry(name: str, found: dict[str, Any]) -> str:
    sha256 = found["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name}=={found['metadata']['version']} \\\n    --hash=sha256:{sha256}\n"


def main() -> None:
    """Write the lock again, or answer the Makefile."""
    asked = sys.argv[1:]
    reason = refuse_machine()

    if asked == ["fits"]:
        sys.exit(f"== {LOCK.name} is not for {reason}: versions by range" if reason else 0)
    if asked == ["versions"]:
        for name, locked in read().items():
            print(f"{name}=={locked.version}")
        return

    assert not reason, f"a lock is written on the machine that it is for, and this is {reason}"
    write(PIP, "pip", "# pip, which checks the hashes of everything else.\n")
    write(LOCK, ".[dev]", _HEADER.format(torch=UNLOCKED["torch"]))


if __name__ == "__main__":
    main()
