"""Planted defects, one for each promise: what shows that the oracle and libFuzzer find such things.

An input is one of the words behind ``RACTOY``. The dictionary has them; no seed is harmful.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from racdeploy.errors import ArtifactError
from tests.fuzz import oracle
from tests.fuzz.oracle import place, scratch
from tests.support.yardstick import MARGIN, measure_slowness

READERS = ("racdeploy.errors",)
_MAGIC = b"RACTOY"


def target(data: bytes) -> None:
    """Carry out the planted defect that the input names; refuse whatever else."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise ArtifactError("no-toy", "no toy", remedy="write RACTOY")
    action = ACTIONS.get(data[len(_MAGIC) :].strip().decode("utf-8", "replace"))
    if action is None:
        raise ArtifactError("idle-toy", "a toy that does nothing", remedy="name one of its actions")
    action()


def _raise() -> None:
    raise ValueError("planted")


def _say_lines() -> None:
    raise ArtifactError("two-lines", "one line\nand another")


def _say_nothing() -> None:
    raise ArtifactError("says-nothing", "")


def _say_half() -> None:
    raise ArtifactError("half-a-character", "half a character: \ud800")


def _allocate() -> None:
    held = bytearray(350_000_000)
    held[::4096] = b"\1" * len(held[::4096])


def _hurry() -> None:
    end = time.process_time() + 2 * MARGIN * measure_slowness() * oracle.MAX_SECONDS
    while time.process_time() < end:
        pass


def _write() -> None:
    (scratch().parent / f"{scratch().name}-outside").touch()


def _remove() -> None:
    (scratch().parent / f"{scratch().name}-outside").unlink(missing_ok=True)


def _read() -> None:
    Path("/etc/hostname").read_bytes()


def _start() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def _behave() -> None:
    place("inside", b"").read_bytes()


def _refuse() -> None:
    raise ArtifactError("toy-refused", "refused in one line", remedy="and what to do")


ACTIONS: Mapping[str, Callable[[], None]] = {
    "raise": _raise,
    "lines": _say_lines,
    "nothing": _say_nothing,
    "half": _say_half,
    "allocate": _allocate,
    "hurry": _hurry,
    "write": _write,
    "remove": _remove,
    "read": _read,
    "start": _start,
    "behave": _behave,
    "refuse": _refuse,
}
HARMLESS = ("behave", "refuse")
DICTIONARY = tuple(map(str.encode, ACTIONS))


def seeds() -> Iterator[bytes]:
    """Yield what does no harm."""
    yield _MAGIC
    for name in HARMLESS:
        yield _MAGIC + name.encode()


def defects() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the input of each planted defect."""
    for name in ACTIONS.keys() - set(HARMLESS):
        yield name, _MAGIC + name.encode()
