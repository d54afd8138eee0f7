"""``racdeploy verify --harness``: a harness asks both models behind ``racdeploy serve``.

By default the harness is tests/support/stand_in_harness.py. The real ones run where
RACDEPLOY_HARNESS_PYTHON names a Python that has them, as docs/tasks.md says to install them:
``RACDEPLOY_HARNESS_PYTHON=… pytest -m slow tests/end_to_end/test_harness.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from racdeploy.bundles.bench import find_dense_artifact
from racdeploy.report.files import read_records, read_report
from racdeploy.results.answers import HarnessRow
from tests.support.commands import command, environment, racdeploy
from tests.support.own_server import children
from tests.support.stand_in_harness import install
from tests.support.waiting import PATIENCE_S, wait_for, wait_for_end

DOCUMENTS = 6
REAL = os.environ.get("RACDEPLOY_HARNESS_PYTHON", "")
_TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: true, temperature: 1.0, max_gen_toks: 8}}
filter_list:
  - name: last-number
    filter:
      - {{function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
_TASKS_TABLE = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def ask(line, task_name=None):
    return Doc(task_name=task_name, query=line["question"], choices=[line["answer"]], gold_index=0)


TASKS_TABLE = [
    LightevalTaskConfig(
        name="sums",
        prompt_function=ask,
        hf_repo="{folder}",
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=8,
        metrics=[Metrics.expr_gold_metric],
    )
]
"""


@pytest.fixture
def work(built: Path, tmp_path: Path) -> Path:
    """A copy of the build's work folder for each test: what one leaves there, another counts."""
    return Path(shutil.copytree(built.parent / "work", tmp_path / "work"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which the stand-in is installed."""
    return install(tmp_path_factory.mktemp("harness") / "venv")


@pytest.fixture(scope="module")
def questions(built: Path) -> list[dict[str, Any]]:
    """Questions of the bundle's own verification, with what both models made of them there."""
    records = read_records(built)
    by_arm = {arm: [r for r in records if r.arm == arm] for arm in ("dense", "pruned")}
    rows: list[dict[str, Any]] = []
    for dense, pruned in zip(by_arm["dense"], by_arm["pruned"], strict=True):
        if dense.question not in [row["question"] for row in rows]:
            right = {"dense": dense.correct, "pruned": pruned.correct}
            rows.append({"question": dense.question, "answer": dense.gold, **right})

    # Those that the models differ on first: a paired comparison has something to count.
    rows.sort(key=lambda row: row["dense"] == row["pruned"])
    return rows[: DOCUMENTS + 2]


@pytest.fixture
def include(tmp_path: Path, questions: list[dict[str, Any]]) -> Path:
    """A folder with the task ``sums``, as lm-eval and the stand-in read it."""
    folder = tmp_path / "include"
    folder.mkdir()
    file = folder / "questions.jsonl"
    lines = [json.dumps({key: row[key] for key in ("question", "answer")}) for row in questions]
    file.write_text("".join(f"{line}\n" for line in lines))
    (folder / "sums.yaml").write_text(_TASK.format(file=file))
    return folder


def _arguments(bundle: Path, work: Path, include: Path, python: Path) -> tuple[object, ...]:
    return (
        *("verify", bundle, "--work", work, "--threads", 1, "--tier", "smoke", "--exit-zero"),
        *("--harness", "lm-eval", "--harness-tasks", "sums", "--harness-limit", DOCUMENTS),
        *("--harness-include", include, "--harness-python", python),
    )


def _row(folder: Path, metric: str) -> HarnessRow:
    run = read_report(folder).harness
    assert run is not None
    (row,) = [row for row in run.rows if row.metric == metric]
    return row


def _stages(work: Path) -> list[Path]:
    return sorted(work.glob("harness-*"))


def test_both_models_are_asked_and_paired(
    built: Path,
    work: Path,
    include: Path,
    python: Path,
    questions: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Each answers as it did in the bundle's own verification; every form of the report has it."""
    arguments = _arguments(built, work, include, python)
    reports = tmp_path / "reports"
    outcome = racdeploy(*arguments, "--reports", reports)
    assert outcome.code == 0, outcome.err

    asked = questions[:DOCUMENTS]
    row = _row(reports, "exact_match")
    assert row.documents == DOCUMENTS
    assert row.dense == sum(each["dense"] for each in asked) / DOCUMENTS
    assert row.pruned == sum(each["pruned"] for each in asked) / DOCUMENTS
    assert row.lost == sum(each["dense"] and not each["pruned"] for each in asked)
    assert row.unpaired_reason == ""
    words = _row(reports, "words")
    assert words.lower is not None
    assert not words.larger_is_better

    report = read_report(reports)
    assert report.harness is not None
    assert report.harness.version == "0.4.13"
    assert report.harness.settings["max_new_tokens"] == report.recipe["verify"]["max_new_tokens"]
    assert "harness" in [check.name for check in report.checks]
    assert "scores the answer without the thinking" in " ".join(report.notes)

    for form in ("report.md", "report.html"):
        text = (reports / form).read_text(encoding="utf-8")
        assert "lm-eval 0.4.13" in text
        assert "sums, exact_match" in text.replace("\\_", "_")
    cases = ElementTree.parse(reports / "junit.xml").iter("testcase")
    assert "harness" in [case.get("name") for case in cases]
    assert "sums, exact_match" in outcome.out

    # Again: neither model is asked once more, and the report says so.
    before = [(stage / "stage.json").stat().st_mtime_ns for stage in _stages(work)]
    again = racdeploy(*arguments, "--reports", tmp_path / "again")
    assert again.code == 0, again.err
    assert [(stage / "stage.json").stat().st_mtime_ns for stage in _stages(work)] == before
    assert _row(tmp_path / "again", "exact_match") == row
    assert "the scores of the dense model by" in again.out

    # Another document is another question.
    (include / "questions.jsonl").write_text('{"question": "What is 2 + 2?", "answer": "4"}\n')
    other = racdeploy(*arguments, "--reports", tmp_path / "other")
    assert other.code == 0, other.err
    assert _row(tmp_path / "other", "exact_match").documents == 1
    assert len(_stages(work)) == 4


def test_a_harness_that_fails_is_quoted(
    built: Path, work: Path, include: Path, python: Path
) -> None:
    """Its last words, and where all of them are."""
    (include / "sums.yaml").unlink()
    outcome = racdeploy(*_arguments(built, work, include, python))
    assert (outcome.code, outcome.error_code) == (4, "harness-failed")
    assert "Tasks not found: sums" in outcome.err
    log = Path(outcome.err.split("its whole output is in ")[1].strip())
    assert "Tasks not found: sums" in log.read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_child(
    built: Path, work: Path, include: Path, python: Path, number: signal.Signals
) -> None:
    """Neither the engine nor the harness; the command that resumes is printed."""
    (include / "hang").touch()
    process = subprocess.Popen(
        command(*_arguments(built, work, include, python)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        wait_for((include / "hang").read_text, "the harness to hang", process)

        pids = _descendants(process.pid)
        process.send_signal(number)
        said = process.communicate(timeout=PATIENCE_S)[1]

    if number != signal.SIGKILL:
        assert "--harness lm-eval" in said
        assert process.returncode == 130
    assert len(pids) >= 3  # the harness, the engine of its server, and what reads texts
    assert int((include / "hang").read_text()) in pids
    for pid in pids:
        wait_for_end(pid)


def _descendants(pid: int) -> list[int]:
    own = children(pid)
    return own + [below for child in own for below in _descendants(child)]


@pytest.mark.parametrize(
    ("options", "code", "error", "named"),
    [
        (("--harness", "lm-evil", "--harness-tasks", "x"), 2, "unknown-plugin", "'lm_evil'"),
        (("--harness", "lm-eval"), 2, "no-harness-tasks", "--harness-tasks"),
        (("--harness-tasks", "gsm8k"), 2, "missing-main-option", "--harness"),
        (
            ("--harness", "lm-eval", "--server", "http://127.0.0.1:1/v1"),
            2,
            "harness-with-server",
            "--server",
        ),
        (
            ("--harness", "lm-eval", "--harness-tasks", "x"),
            4,
            "harness-not-installed",
            "lm_eval[api]==0.4.13",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    built: Path,
    work: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    error: str,
    named: str,
) -> None:
    """Wrong usage with exit code 2, what is missing with 4; nothing is served or asked."""
    bare = install(tmp_path / "bare", {})
    python = () if code == 2 else ("--harness-python", bare)
    outcome = racdeploy("verify", built, "--work", work, *options, *python)
    assert (outcome.code, outcome.error_code) == (code, error), outcome.err
    assert named in outcome.err
    assert "verify" not in outcome.err.partition("error:")[0]


def test_without_the_dense_artifact_nothing_is_asked(
    built: Path, work: Path, include: Path, python: Path, tmp_path: Path
) -> None:
    """The error says where it may be; a plan names the one that is found, or given."""
    arguments = _arguments(built, tmp_path / "empty", include, python)
    outcome = racdeploy(*arguments)
    assert (outcome.code, outcome.error_code) == (2, "no-dense-for-harness")
    assert "--baseline" in outcome.err

    dense = find_dense_artifact(built, work)
    given = racdeploy(*arguments, "--baseline", dense, "--plan")
    assert given.code == 0, given.err
    said = " ".join(given.out.split())
    assert "lm-eval 0.4.13 asks both models sums, 6 documents of each" in said

    wrong = racdeploy("serve", built, "--port", 0, "--dense", include / "sums.yaml")
    assert (wrong.code, wrong.error_code) == (2, "not-the-dense-artifact")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="RACDEPLOY_HARNESS_PYTHON names no Python with a harness")
@pytest.mark.parametrize("harness", ["lm-eval", "lighteval"])
def test_the_real_harness_agrees_with_our_own_verification(
    built: Path,
    work: Path,
    include: Path,
    questions: list[dict[str, Any]],
    tmp_path: Path,
    harness: str,
) -> None:
    """On questions of one number each model is as often right as in the bundle's records.

    The tasks ask for 8 tokens and, in lm-eval, for sampling: what racdeploy asks wins.
    """
    tasks: Path = include
    if harness == "lighteval":
        data = tmp_path / "data"
        data.mkdir()
        (data / "test.jsonl").write_text((include / "questions.jsonl").read_text())
        tasks = tmp_path / "tasks.py"
        tasks.write_text(_TASKS_TABLE.format(folder=data))

    outcome = racdeploy(
        *("verify", built, "--work", work, "--threads", 1, "--tier", "smoke", "--exit-zero"),
        *("--harness", harness, "--harness-tasks", "sums", "--harness-include", tasks),
        *("--harness-python", REAL, "--reports", tmp_path / "reports"),
        HF_HOME=str(tmp_path / "hf"),
    )
    assert outcome.code == 0, outcome.err

    metric = {"lm-eval": "exact_match,last-number", "lighteval": "extractive_match"}[harness]
    row = _row(tmp_path / "reports", metric)
    assert row.documents == len(questions)
    assert (row.unpaired_reason, row.larger_is_better) == ("", True)
    assert row.dense == sum(each["dense"] for each in questions) / len(questions)
    assert row.pruned == sum(each["pruned"] for each in questions) / len(questions)
