"""No test lets the clock decide: what may be slow on a busy machine is waited for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import waiting

ROOT = Path(__file__).parents[1]
CLOCKS = {"monotonic", "perf_counter", "process_time", "time", "clock_gettime"}
LIMITED = {"join", "result", "settimeout", "wait"}
"""Methods whose only argument is a time limit."""
LEAST_S = 60.0

EXCEPTIONS = {
    "sleep": {
        "tests/attacks/test_fork.py: test_a_parent_killed_while_its_child_starts_leaves_none": (
            "moments of a start are its cases, and each of them has to end well"
        ),
        "tests/attacks/test_server.py: say": "a slow sender, whose limit is the product's",
        "tests/engines/test_batching.py: decode": "lets other threads run, as an engine does",
        "tests/processes/test_child_process.py: test_a_child_gives_a_value_or_the_reason_why_not": (
            "the limit under test ends it"
        ),
        "tests/runtime/test_together.py: read_slowly": "a slow reader is ended by its own loop",
        "tests/serve/test_app.py: receive": "polls a condition within its event loop",
        "tests/serve/test_process.py: hold": "its loop runs the timer under test first",
        "tests/support/hub_server.py: _answer": "a slow Hub, whose limit is the product's",
        "tests/support/prefork.py: _try_wait": "polls whether a child has ended",
        "tests/support/stand_in_harness.py: main": "hangs until it is killed",
        "tests/support/waiting.py: wait_for": "polls the condition",
    },
    "clock": {
        "tests/attacks/conftest.py: _clock_of": "compared with a yardstick of the same moment",
        "tests/attacks/conftest.py: processor_s": "compared with a yardstick of the same moment",
        "tests/cli/test_cache.py: work": "sets the age of a file",
        "tests/cli/test_progress.py: "
        "test_stages_without_tokens_know_the_time_left_from_the_first_unit": "counts minutes",
        "tests/fuzz/harnesses/_toy.py: _hurry": "takes the time that the oracle has to notice",
        "tests/fuzz/oracle.py: judge": "compared with a yardstick of the same moment",
        "tests/fuzz/run.py: run": "how long to fuzz",
        "tests/pruning/test_kills.py: test_kills_at_random_moments_leave_the_same_bytes": (
            "draws the moments, of which each has to end well"
        ),
        "tests/pruning/test_two_hosts.py: _finish": "the limit of the product's heartbeat",
        "tests/support/long_thoughts.py: main": "prints it, and nothing decides by it",
        "tests/support/pasting.py: _answer_until_end": "patience of minutes",
        "tests/support/terminal.py: __init__": "records when what was printed",
        "tests/support/terminal.py: _read": "records when what was printed",
        "tests/support/terminal.py: _wait_until": "patience",
        "tests/support/terminal.py: wait": "patience",
        "tests/support/waiting.py: wait_for": "patience",
        "tests/support/yardstick.py: measure_slowness": "is the yardstick",
        "tests/tasks/test_growth.py: measure_seconds": "compared with a shorter text's, in turn",
    },
    "limit": {
        "tests/support/pasting.py: __enter__": "polls whether the shell has ended",
    },
}
"""Why each place may do it, by file and function."""


def find(source: str) -> Iterator[tuple[str, str]]:
    """Yield what a file does, sleep, clock or limit, and the function in which it does."""
    yield from _visit(ast.parse(source), "<module>")


def _visit(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node.name
    for kind in _name_kinds(node):
        yield kind, function
    for child in ast.iter_child_nodes(node):
        yield from _visit(child, function)


def _name_kinds(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and node.attr == "sleep":
        yield "sleep"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        if "sleep(" in node.value:  # of a child
            yield "sleep"
    elif isinstance(node, ast.Call):
        if _reads_clock(node.func):
            yield "clock"
        if any(_is_short(limit) for limit in _list_limits(node)):
            yield "limit"


def _reads_clock(called: ast.expr) -> bool:
    return (
        isinstance(called, ast.Attribute)
        and isinstance(called.value, ast.Name)
        and called.value.id == "time"
        and called.attr in CLOCKS
    )


def _list_limits(call: ast.Call) -> Iterator[ast.expr]:
    yield from (given.value for given in call.keywords if given.arg == "timeout")
    if isinstance(call.func, ast.Attribute) and call.func.attr in LIMITED:
        yield from call.args


def _is_short(limit: ast.expr) -> bool:
    is_number = isinstance(limit, ast.Constant) and isinstance(limit.value, int | float)
    return is_number and 0 < limit.value < LEAST_S


def test_no_test_lets_the_clock_decide() -> None:
    """Each sleep, clock and short limit is named above with its reason, and no other is."""
    found: dict[str, set[str]] = {kind: set() for kind in EXCEPTIONS}
    for file in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "kernels/tests").rglob("*.py")]):
        if file != Path(__file__):
            for kind, function in find(file.read_text(encoding="utf-8")):
                found[kind].add(f"{file.relative_to(ROOT).as_posix()}: {function}")

    assert found == {kind: set(places) for kind, places in EXCEPTIONS.items()}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("sleep", "def f():\n    time.sleep(1)"),
        ("sleep", "async def f():\n    await asyncio.sleep(1)"),
        ("sleep", "def f():\n    run('import time; time.sleep(1)')"),
        ("clock", "def f():\n    while time.monotonic() < end: pass"),
        ("limit", "def f():\n    process.communicate(timeout=5)"),
        ("limit", "def f():\n    process.wait(59.5)"),
    ],
)
def test_a_new_place_is_found(kind: str, source: str) -> None:
    assert list(find(source)) == [(kind, "f")]


def test_who_waits_in_vain_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.01)
    with pytest.raises(AssertionError, match=r"waited 0 s for a miracle"):
        waiting.wait_for(lambda: False, "a miracle")
