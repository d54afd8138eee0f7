"""The kept inputs: replayed under the oracle, and chosen among new ones by the lines they reach."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.fuzz import oracle
from tests.fuzz.harness import CORPUS, MENDED, Harness

MAX_BYTES = 36_000
"""Of the kept inputs of a harness."""
_LARGEST = 8_000
Arcs = set[tuple[CodeType, int, int]]


def replay(harness: Harness, inputs: Iterable[bytes] | None = None) -> int:
    """Judge every seed and kept input; return how many there are."""
    count = 0
    for data in _all_inputs(harness) if inputs is None else inputs:
        try:
            oracle.judge(harness.target, data)
        except BaseException as error:
            error.add_note(f"input of {harness.name}: {data[:2000]!r}")
            raise
        count += 1
    return count


def keep(harness: Harness, work: Path) -> str:
    """Choose the kept inputs anew, small ones first: each takes a way through the code of its own.

    What a run found and is mended is kept, too, whatever way it takes.

    Args:
        work: folder of a run, with its ``corpus`` and what it ``found``.

    Returns:
        What was chosen, in words.
    """
    mended = [file.read_bytes() for file in sorted((work / "found").glob("*.input"))]
    _write(MENDED / harness.name, [data for data in mended if _holds(harness, data)])

    folder = CORPUS / harness.name
    files = [*harness.kept, *(work / "corpus").glob("*")]
    inputs = {data for data in (file.read_bytes() for file in files) if len(data) <= _LARGEST}

    reached: Arcs = set()
    for data in (*harness.seeds(), *(file.read_bytes() for file in harness.mended)):
        reached |= _trace(harness, data)

    chosen: list[bytes] = []
    size_bytes = 0
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        if size_bytes + len(data) <= MAX_BYTES and (arcs := _trace(harness, data)) - reached:
            reached |= arcs
            size_bytes += len(data)
            chosen.append(data)

    for file in harness.kept:
        file.unlink()
    _write(folder, chosen)
    return f"{len(chosen)} of {len(inputs)} inputs kept, {size_bytes:,} bytes"


def _write(folder: Path, inputs: Iterable[bytes]) -> None:
    for data in inputs:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def _holds(harness: Harness, data: bytes) -> bool:
    """Return whether an input keeps every promise, and is small enough to be kept."""
    try:
        oracle.judge(harness.target, data)
    except BaseException:  # noqa: BLE001 - it is not mended yet
        return False
    return len(data) <= _LARGEST


def measure(harness: Harness) -> dict[str, float]:
    """Return the share of the lines of each reader that seeds and kept inputs reach."""
    reached: Arcs = set()
    for data in _all_inputs(harness):
        reached |= _trace(harness, data)

    shares = {}
    for name in harness.readers:
        file = sys.modules[name].__file__
        assert file is not None
        lines = _list_lines(Path(file))
        seen = {line for code, _, line in reached if code.co_filename == file}
        shares[name] = len(lines & seen) / len(lines)
    return shares


def _all_inputs(harness: Harness) -> Iterator[bytes]:
    yield from list(harness.seeds())
    for file in (*harness.mended, *harness.kept):
        yield file.read_bytes()


def _trace(harness: Harness, data: bytes) -> Arcs:
    """Return the steps from line to line that an input makes in racdeploy."""
    arcs: Arcs = set()
    with _tracing(arcs):
        oracle.judge(harness.target, data)
    return arcs


@contextmanager
def _tracing(arcs: Arcs) -> Iterator[None]:
    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not _is_ours(code):
            return None
        last = code.co_firstlineno

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            arcs.add((code, last, frame.f_lineno))
            last = frame.f_lineno
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_PACKAGE)


def _list_lines(file: Path) -> set[int]:
    """Return the lines of the bodies of a module's functions."""
    lines: set[int] = set()
    waiting = [compile(file.read_bytes(), str(file), "exec")]
    while waiting:
        code = waiting.pop()
        waiting += [const for const in code.co_consts if isinstance(const, CodeType)]
        if code.co_flags & _OPTIMIZED:
            found = {line for _, _, line in code.co_lines() if line}
            lines |= found - {code.co_firstlineno}
    return lines


_OPTIMIZED = 1  # set in the code of a function, not in that of a module or class
_PACKAGE = str(Path(__file__).resolve().parents[2] / "racdeploy")
