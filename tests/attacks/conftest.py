"""The bar of every hostile case: its processor time and its memory are measured, not told.

A test of this folder that takes more fails, after it has passed. One that does much more than open
one thing, as fifty races, says so: ``@pytest.mark.takes(seconds, "why")``. Seconds are those of a
quiet processor: tests/support/yardstick.py tells how much more a busy one may take.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from racdeploy.processes.memory import resident_bytes
from tests.support import prefork
from tests.support.tiny_onnx import tiny_onnx
from tests.support.yardstick import is_too_long

if os.name != "nt":
    import resource

MAX_SECONDS = 2.0
"""Of processor time, of the test and of all processes that it started."""
MAX_BYTES = 300e6
"""More resident memory than before, and more in a child than a healthy engine has."""
_ENGINE_BYTES = 250e6
_RECORD = os.environ.get("RACDEPLOY_ATTACKS_RECORD")  # a file that gets a line for each test


@pytest.fixture(autouse=True)
def _children_of_their_own() -> Iterator[None]:
    """Start every child as the product does: a forked one would hide what it takes."""
    with prefork.exec_children():
        yield


@pytest.fixture(autouse=True)
def _bar(request: pytest.FixtureRequest) -> Iterator[None]:
    if os.name == "nt" or not _forget_peak():
        yield  # nothing tells the peak there
        return

    before_bytes, before_child_bytes = resident_bytes(), _child_bytes()
    began_s = processor_s()
    yield
    took_s = processor_s() - began_s
    own_bytes = resident_bytes("VmHWM") - before_bytes
    child_bytes = _child_bytes()

    if _RECORD:
        with open(_RECORD, "a", encoding="utf-8") as stream:
            taken = round(took_s, 2), round(own_bytes / 1e6), round(child_bytes / 1e6)
            stream.write(json.dumps([request.node.nodeid, *taken]) + "\n")

    marker = request.node.get_closest_marker("takes")
    bar_s = marker.args[0] if marker else MAX_SECONDS
    assert not is_too_long(took_s, bar_s), f"it took {took_s:.1f} s of processor time"
    assert own_bytes < MAX_BYTES, f"it took {own_bytes / 1e6:.0f} MB"

    # Before it is another program, a child has what this process has. The system keeps the largest
    # of all: it is of this test only where it has grown.
    healthy_bytes = max(_ENGINE_BYTES, resident_bytes("VmHWM"))
    is_small = child_bytes < healthy_bytes + MAX_BYTES or child_bytes == before_child_bytes
    assert is_small, f"a child had {child_bytes / 1e6:.0f} MB"


@pytest.fixture(scope="session")
def exported() -> None:
    """Export the tiny graphs, which takes seconds, before anything is measured."""
    tiny_onnx()


def _child_bytes() -> int:
    """Return the largest peak of all children that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def processor_s() -> float:
    """Return what this process and its children have taken, those that still run included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_clock_of, _children()))


def _children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            yield from map(int, (task / "children").read_text().split())


def _clock_of(process: int) -> float:
    """Return the processor time of another process, by the clock that Linux names after it."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:  # it has just ended
        return 0.0


def _forget_peak() -> bool:
    """Let the peak of resident memory begin again; False where the system has none such."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return bool(resident_bytes("VmHWM"))
