"""Questions of a comparison and of a recorded reference: the same ones, all of a file."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import racdeploy
from racdeploy.api import jobs
from tests.support.tiny_artifacts import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def _fill(function: Any, **options: Any) -> dict[str, Any]:
    """Return the options of a function of the library, with its defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters} | options


@pytest.mark.parametrize("asked", [4, 3, 200])
def test_a_file_is_asked_whole(bundle: Path, tmp_path: Path, asked: int) -> None:
    """Or as much of it as is wanted; the settings count the questions that there are."""
    rows = [{"question": f"{i} plus 1?", "answer": i + 1} for i in range(4)]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    options: dict[str, Any] = {"task": [f"jsonl:{file}"], "prompts": asked, "work": tmp_path}
    recorded, _, _ = jobs.open_recording(_fill(racdeploy.record, model=bundle, **options))
    compared = jobs.open_comparison(
        _fill(racdeploy.compare, candidates=[bundle], against=bundle, **options)
    )
    assert len(recorded.problems) == min(asked, 4)
    assert recorded.settings.count == min(asked, 4)
    assert recorded.problems == compared.examiner.problems
