"""Paths that a stranger's recipe or a user's option names: read in bounds, and only if named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from racdeploy import tasks
from racdeploy.bundles.bundle import BundleToVerify
from racdeploy.errors import UsageError
from racdeploy.files.texts import read_texts
from racdeploy.recipe import Recipe
from racdeploy.tasks import TaskSet
from racdeploy.verification.gate import Gate
from tests.support.errors import raises


def _make(recipe: dict[str, Any], *named: str) -> BundleToVerify:
    """Return a bundle of no records whose recipe is a stranger's, at the tier release."""
    bundle = BundleToVerify(Path("bundle"), None, "release", named)
    contents = SimpleNamespace(recipe=Recipe.model_validate(recipe), problems=[], planned=0)
    vars(bundle).update(contents=contents, gate=Gate())
    return bundle


@pytest.mark.parametrize("key", ["tasks", "calibration_tasks"])
@pytest.mark.parametrize(
    "spec", ["jsonl:/dev/zero", "gsm8k:PIPE", "math500:/etc", "hub:gsm8k", "ifeval:FILE"]
)
def test_a_recipe_of_a_bundle_reads_no_file(
    tmp_path: Path, key: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a device nor a pipe, nor a file of the user, nor the Hub."""
    monkeypatch.setattr(TaskSet, "load", lambda *specs: pytest.fail("a task was loaded"))
    (tmp_path / "FILE").write_text('{"prompt": "private"}')
    os.mkfifo(tmp_path / "PIPE")
    monkeypatch.chdir(tmp_path)
    with raises("tasks-not-named", spec, "--tasks"):
        _ = _make({key: ["gcd", spec]}).problems


def test_a_task_that_the_user_names_is_read(tmp_path: Path) -> None:
    """All that are named, and those that draw without a file."""
    file = tmp_path / "mine.jsonl"
    rows = [json.dumps({"question": f"{n} + 1?", "answer": n + 1}) for n in range(500)]
    file.write_text("\n".join(rows))
    spec = f"jsonl:{file}"
    drawn = _make({"tasks": ["gcd", spec]}, spec).problems
    assert {"gcd", spec} == {problem.task for problem in drawn}
    assert _make({}).problems


FILES = ("jsonl:NAME", "gsm8k:NAME.csv", "gsm8k:NAME.json", "mmlu_pro:NAME.parquet")


@pytest.mark.parametrize("spec", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_a_task_file_of_the_user_is_a_file_of_some_size(
    tmp_path: Path, spec: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe is not waited for, a device and a file of 40 GB are not read."""
    name = spec.partition(":")[2]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "device":
        os.symlink("/dev/zero", name)
    else:
        with open(name, "wb") as stream:
            stream.truncate(40_000_000_000)

    code = "file-too-large" if kind == "huge" else "not-a-regular-file"
    with raises(code, name):
        tasks.load(spec)
    with raises(code, name):
        read_texts([name], "recover.extra_text")


LINES = {
    "a number of 5,000 digits": '{"question": "?", "answer": ' + "9" * 5000 + "}",
    "half a character": r'{"question": "\ud83d?", "answer": 1}',
    "half a character as key": r'{"question": "?", "answer": 1, "\udc00": 1}',
    "deep": "[" * 100_000,
    "5 million lists": "[" + "[]," * 5_000_000 + "1]",
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("spec", ["jsonl:f.jsonl", "gsm8k:f.jsonl", "gsm8k:f.json"])
def test_a_line_that_json_cannot_hold_is_named(
    tmp_path: Path, name: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of error with exit code 2, and what a line looks like."""
    monkeypatch.chdir(tmp_path)
    Path(spec.partition(":")[2]).write_text(LINES[name])
    with pytest.raises(UsageError, match=r"f\.json"):
        tasks.load(spec)


@pytest.mark.parametrize("text", ["question,answer\n" + "x" * 200_000, 'question\n"1 + 1?",2,3\n'])
def test_a_table_of_any_shape_is_an_error(tmp_path: Path, text: str) -> None:
    """A field above the reader's limit, and a row that is longer than the header."""
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UsageError, match=r"t\.csv"):
        tasks.load(f"gsm8k:{tmp_path / 't.csv'}")
