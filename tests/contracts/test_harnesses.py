"""The contract of evaluation harnesses: what they are asked, and what is read of what they wrote.

``WRITTEN`` has files in the form of the real program, for two documents of which the second is
wrong. tests/end_to_end/test_harness.py runs them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy import harnesses, plugins
from racdeploy.harnesses import HarnessRequest, HarnessSettings
from tests.support.errors import raises
from tests.support.stand_in_harness import install

NAMES = plugins.list_names("harnesses")
FIGURES = {"first question": 1.0, "second question": 0.0}


def _write_lm_eval(out: Path) -> None:
    """Write what lm-eval 0.4.13 writes for a task with a filter."""
    folder = out / "a-model"
    folder.mkdir()
    results = {
        "results": {
            "sums": {
                "alias": "sums",
                "sample_len": 2,
                "exact_match,last-number": 0.5,
                "exact_match_stderr,last-number": 0.5,
            }
        },
        "group_subtasks": {},
        "higher_is_better": {"sums": {"exact_match": True}},
        "n-samples": {"sums": {"original": 12, "effective": 2}},
    }
    lines = []
    for number, (question, right) in enumerate(FIGURES.items()):
        line = {
            "doc_id": number,
            "doc": {"question": question},
            "filter": "last-number",
            "metrics": ["exact_match"],
            "doc_hash": f"hash of {question}",
            "exact_match": right,
        }
        lines.append(json.dumps(line) + "\n")

    written = "2026-11-26T22-02-42.593224"
    (folder / f"results_{written}.json").write_text(json.dumps(results))
    (folder / f"samples_sums_{written}.jsonl").write_text("".join(lines))


def _write_lighteval(out: Path) -> None:
    """Write what lighteval 0.13.0 writes; its details are parquet."""
    reason = "needs pyarrow, of racdeploy[tasks]: lighteval writes parquet"
    arrow = pytest.importorskip("pyarrow", reason=reason)
    parquet = pytest.importorskip("pyarrow.parquet")
    written = "2026-11-26T22-11-45.330871"
    folders = [out / kind / "openai" / "a-model" for kind in ("results", "details")]
    folders[1] /= written
    for folder in folders:
        folder.mkdir(parents=True)

    values = {"extractive_match": 0.5, "extractive_match_stderr": 0.5}
    metric = {"metric_name": "extractive_match", "higher_is_better": True}
    results = {
        "results": {"sums|0": values, "all": values},
        "config_tasks": {"sums|0": {"metrics": [metric]}},
    }
    (folders[0] / f"results_{written}.json").write_text(json.dumps(results))

    rows = []
    for number, (question, right) in enumerate(FIGURES.items()):
        doc = {"query": question, "id": str(number), "task_name": "sums|0"}
        rows.append({"doc": doc, "metric": {"extractive_match": right}, "model_response": {}})
    table = arrow.Table.from_pylist([{**row, "model_response": "…"} for row in rows])
    parquet.write_table(table, folders[1] / f"details_sums|0_{written}.parquet")


WRITTEN: dict[str, Callable[[Path], None]] = {
    "lm_eval": _write_lm_eval,
    "lighteval": _write_lighteval,
}


def _order(out: Path) -> HarnessRequest:
    settings = HarnessSettings(
        tasks=("sums", "words"),
        limit=7,
        max_new_tokens=321,
        context_tokens=777,
        parallel=3,
    )
    return HarnessRequest(
        settings, include=None, url="http://127.0.0.1:4321/v1", model="a-model", out=out
    )


def _everything_said(arguments: list[str], out: Path) -> str:
    """Return the command line and the files that were written for it."""
    files = [file.read_text() for file in sorted(out.rglob("*")) if file.is_file()]
    return "\n".join([*arguments, *files])


@pytest.mark.parametrize("name", NAMES)
def test_a_harness_is_told_all_of_an_order(name: str, tmp_path: Path) -> None:
    """Address, model, tasks, limit, tokens and folder; without a limit no limit."""
    harness = harnesses.load(name)
    order = _order(tmp_path)
    said = _everything_said(harness.arguments(order), tmp_path)
    settings = order.settings
    for value in (order.url, order.model, *settings.tasks, settings.max_new_tokens, tmp_path):
        assert str(value) in said
    assert "7" in harness.arguments(order)
    everything = replace(order, settings=replace(settings, limit=0))
    assert "7" not in harness.arguments(everything)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_harness_wrote_is_read(name: str, tmp_path: Path) -> None:
    """One figure with each document behind it."""
    WRITTEN[name](tmp_path)
    (score,) = harnesses.load(name).read(tmp_path, Path(sys.executable))
    assert (score.task, score.value, score.documents) == ("sums", 0.5, 2)
    assert score.larger_is_better
    assert sorted(score.by_document.values()) == [0.0, 1.0]
    (right,) = [document for document, figure in score.by_document.items() if figure]
    assert "first question" in right or right.startswith("0 ")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_written_is_an_error(name: str, tmp_path: Path) -> None:
    """A harness that ends well and writes nothing has found nothing."""
    with raises("no-harness-results", str(tmp_path)):
        harnesses.read(harnesses.load(name), Path(sys.executable), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_says_how_to(name: str, tmp_path: Path) -> None:
    """In an environment of its own, with the version that was tested; exit code 4."""
    harness = harnesses.load(name)
    for python in (install(tmp_path / "bare", {}), tmp_path / "nowhere", Path(__file__)):
        values = harness.PACKAGE, str(python), harness.INSTALL, "--harness-python"
        with raises("harness-not-installed", *values):
            harnesses.read_version(harness, python)


def test_its_environment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of our packages, and no proxy before this machine; the rest is the user's."""
    given = {"PYTHONPATH": "/ours", "HF_HOME": "/hf", "HTTP_PROXY": "http://p", "NO_PROXY": "a.b"}
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    found = harnesses.harness_environment()
    assert "PYTHONPATH" not in found
    assert (found["HF_HOME"], found["NO_PROXY"]) == ("/hf", "a.b,127.0.0.1,localhost")


def test_results_of_another_version_are_an_error(tmp_path: Path) -> None:
    """Which names the version that was tested; a figure that is no number is left out."""
    _write_lm_eval(tmp_path)
    (file,) = tmp_path.glob("*/results_*.json")
    text = file.read_text()
    lm_eval, python = harnesses.load("lm_eval"), Path(sys.executable)

    file.write_text(text.replace('_stderr,last-number": 0.5', '_stderr,last-number": NaN'))
    (score,) = harnesses.read(lm_eval, python, tmp_path)
    assert (score.value, score.stderr) == (0.5, None)
    file.write_text(text.replace(',last-number": 0.5', ',last-number": NaN'))
    assert harnesses.read(lm_eval, python, tmp_path) == []

    file.write_text(text.replace("sample_len", "samples"))
    with raises("unknown-harness-results", "lm_eval[api]==0.4.13"):
        harnesses.read(lm_eval, python, tmp_path)


def test_what_is_no_figure_of_every_document_has_no_samples(tmp_path: Path) -> None:
    """As the lists of IFEval's instructions: the value alone is taken."""
    _write_lm_eval(tmp_path)
    (file,) = tmp_path.glob("*/samples_*.jsonl")
    file.write_text(file.read_text().replace('"exact_match": 0.0', '"exact_match": [true]'))
    (score,) = harnesses.read(harnesses.load("lm_eval"), Path(sys.executable), tmp_path)
    assert (score.value, score.by_document) == (0.5, {})


def test_a_group_of_tasks_has_a_value_and_no_samples(tmp_path: Path) -> None:
    """Of all documents below it; its tasks have the logs."""
    _write_lm_eval(tmp_path)
    (file,) = tmp_path.glob("*/results_*.json")
    results = json.loads(file.read_text())
    results["results"]["all_sums"] = {"exact_match,none": 0.25, "sample_len": 8}
    file.write_text(json.dumps(results))
    _, group = harnesses.read(harnesses.load("lm_eval"), Path(sys.executable), tmp_path)
    assert (group.task, group.value, group.documents) == ("all_sums", 0.25, 8)
    assert group.by_document == {}
