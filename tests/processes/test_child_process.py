"""Child processes: what they find, and what is reported of their end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from racdeploy.processes.child_process import ChildResult, ProcessLimits, run_module


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import racdeploy; print('noise'); print('[1, 2]')", ChildResult([1, 2])),
        ("import json, sys, os; print(json.dumps(os.environ['WORD']))", ChildResult("given")),
        ("print('no JSON')", ChildResult(None)),
        ("", ChildResult(None)),
        ("raise SystemExit(3)", ChildResult(None, "ended with exit code 3: it wrote nothing")),
        (
            "raise SystemExit('no such layer')",
            ChildResult(None, "ended with exit code 1: no such layer"),
        ),
        (
            "from racdeploy.errors import ModelError; raise ModelError('a', 'no such', remedy='x')",
            ChildResult(None, "ended with exit code 1: racdeploy.errors.ModelError: no such"),
        ),
        ("import os; os.abort()", ChildResult(None, "died with SIGABRT: it wrote nothing")),
        ("import time; time.sleep(60)", ChildResult(None, "did not end within 2 s")),
    ],
)
def test_a_child_gives_a_value_or_the_reason_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, outcome: ChildResult
) -> None:
    """It imports racdeploy and what its parent can, and not json.py of its folder as json."""
    (tmp_path / "child_of_a_test.py").write_text(code)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    timeout_s = 2.0 if "sleep" in code else 60.0
    found = run_module("child_of_a_test", timeout_s=timeout_s, variables={"WORD": "given"})
    assert found == outcome


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone bounds memory")
@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import sys, numpy; print(int(sys.argv[1:] == ['a', '-b']))", ChildResult(1)),
        ("import os; print(int('OPENAI_API_KEY' in os.environ))", ChildResult(0)),
        ("import os; print('\"' + os.environ['HF_HUB_OFFLINE'] + '\"')", ChildResult("1")),
        ("bytes(600 * 2**20)", ChildResult(None, "ended with exit code 1: MemoryError")),
        ("while True: pass", ChildResult(None, "died with SIGXCPU: it wrote nothing")),
    ],
)
def test_a_child_for_a_strangers_file_has_limits_and_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, outcome: ChildResult
) -> None:
    """Memory and processor time, and what is named for it of the environment."""
    (tmp_path / "child_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    limits = ProcessLimits(memory_bytes=500 * 2**20, cpu_s=2)
    named = {"HF_HUB_OFFLINE": "1"}
    found = run_module("child_of_a_test", "a", "-b", variables=named, limits=limits)
    assert found == outcome
