"""What every test runs under: a kept heap, one core a worker, the same examples each time."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from racdeploy.processes.heap import keep_heap
from tests.support import durations, prefork, shared
from tests.support.signals import let_children_take_signals

FIRST = (
    "end_to_end/test_tune.py",
    "end_to_end/test_interruption.py",
    "end_to_end/*.py",
    "attacks/test_computing.py",
    "pruning/*.py",
    "exporting/test_oracle.py",
)
"""Files that come first, as patterns: the longest, so that at the end no worker waits for another.

The first two are begun together, one by each of two workers: the second one does not need the
embedded model's build, which the first one makes for all.
"""

_BEGAN_S = pytest.StashKey[float]()

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
let_children_take_signals()
prefork.install()


def _take_own_core() -> None:
    """Give each of pytest-xdist's workers a core of its own, where there are enough.

    llama.cpp's and OpenMP's threads wait for each other in a loop; two that share a core are fifty
    times slower than one.
    """
    worker = re.fullmatch(r"gw(\d+)", os.environ.get("PYTEST_XDIST_WORKER", ""))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[1]) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"


_take_own_core()  # before the conftest.py of a folder imports torch, which reads the variable once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first; the order of all others stays."""
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    matches = (place for place, pattern in enumerate(FIRST) if item.path.match(pattern))
    return next(matches, len(FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare each collection of garbage the thousands of tests and their modules, which stay.

    Bytecode is written until then. A child whose files are limited in size would leave half of a
    module's, without an error of Python's, for all that come after it.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when a test begins, its fixtures included."""
    item.stash[_BEGAN_S] = durations.read_processor_s()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the processor time of each test in the JUnit file, which has it from its last phase."""
    report = yield
    if call.when == "teardown":
        took_s = durations.read_processor_s() - item.stash[_BEGAN_S]
        report.user_properties.append((durations.PROPERTY, f"{took_s:.2f}"))
    return report


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep this machine's user's kernels away from tests that ask for none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RACDEPLOY_ACCEL", str(tmp_path_factory.mktemp("accel")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _share_what_is_built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Name one folder for all workers: a worker's own is in that of the run."""
    own = tmp_path_factory.getbasetemp()
    run = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(shared.VARIABLE, str(run / "shared"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _keep_heap() -> None:
    """Make torch on CPU several times faster, as the engines do."""
    keep_heap()
