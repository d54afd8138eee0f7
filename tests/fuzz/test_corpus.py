"""Every kept input through every harness, under the promises that fuzzing checks; without atheris.

In processes of their own: memory is counted from a fresh start, and an audit hook stays for ever.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.changed import select_harnesses
from tests.fuzz.kept import MAX_BYTES

ROOT = Path(__file__).resolve().parents[2]
NAMES = harness.names()
CASES = (
    *("raise", "lines", "nothing", "half", "allocate", "hurry", "write", "remove", "read", "start"),
)
_PLANTED = """
import json
from tests.fuzz import harness, oracle
from tests.fuzz.harnesses import _toy
toy = harness.load("_toy")
oracle.MAX_SECONDS = 0.1
found = {}
for name, data in [*_toy.defects(), *enumerate(toy.seeds())]:
    try:
        oracle.judge(toy.target, data)
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error!r}"
print(json.dumps(found))
"""


def _python(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


@cache
def _replay() -> dict[str, str]:
    """Return what the replay says of each harness."""
    done = _python("-m", "tests.fuzz", "--replay")
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert said.keys() >= set(NAMES), done.stdout + done.stderr
    return said


def test_a_change_to_a_reader_names_its_harness() -> None:
    """Its own file does, too; another file names none."""
    assert select_harnesses({"racdeploy/manifest.py", "docs/faq.md"}) == ["manifest"]
    assert select_harnesses({"tests/fuzz/harnesses/gguf.py"}) == ["gguf"]
    assert select_harnesses({"racdeploy/cli/app.py"}) == []


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_keep_every_promise(name: str) -> None:
    assert _replay()[name].endswith("inputs replayed"), _replay()[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_is_small(name: str) -> None:
    """It is in the repository, so it is what reaches new code and no more."""
    files = harness.load(name).kept
    assert files
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


@cache
def _planted() -> dict[str, str]:
    done = _python("-c", _PLANTED)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_planted_defect_is_found(name: str) -> None:
    kind = "ValueError" if name == "raise" else "BrokenPromise"
    kind = "UnicodeEncodeError" if name == "half" else kind
    assert _planted()[name].startswith(kind)


def test_what_does_no_harm_is_not_found() -> None:
    assert _planted().keys() == set(CASES)


needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: pip install 'racdeploy[fuzz]' on Linux",
)


@pytest.mark.slow
@needs_atheris
def test_libfuzzer_finds_a_planted_defect(tmp_path: Path) -> None:
    """No seed holds it."""
    done = _python("-m", "tests.fuzz", "_toy", "--seconds", "20", "--work", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FOUND" in done.stdout


@pytest.mark.slow
@needs_atheris
@pytest.mark.parametrize("name", NAMES)
def test_a_minute_of_fuzzing_finds_nothing(name: str, tmp_path: Path) -> None:
    done = _python("-m", "tests.fuzz", name, "--seconds", "60", "--work", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
