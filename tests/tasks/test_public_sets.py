"""Public sets by name: from a file, a folder and the Hub, split as they were published."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from racdeploy import tasks
from racdeploy.extras import is_installed
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.report import markdown
from racdeploy.results.answers import TaskRow
from racdeploy.tasks import TaskSet
from racdeploy.tasks.public_dataset import PublicDataset, SplitRows
from racdeploy.tasks.scoring import score
from racdeploy.tasks.sets import aime24, gpqa_diamond, gsm8k
from racdeploy.tasks.task import Task
from tests.support.dataset_hub import serve_dataset
from tests.support.errors import raises
from tests.support.sample_report import build_report

NEEDS_DATASETS = pytest.mark.skipif(
    not is_installed("datasets"), reason='needs datasets: pip install "racdeploy[tasks]"'
)
PUBLISHED_TEST = Path(os.environ.get("RACDEPLOY_GSM8K", "gsm8k/test.jsonl"))
README = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: test
    path: socratic/test-*
---
"""


def _rows(start: int, count: int) -> list[dict[str, Any]]:
    """Return rows as GSM8K has them; a line separator of Unicode is inside of a question."""
    return [
        {"question": f"{i} and\u2028 1?", "answer": f"Add.\n#### {i + 1:,}"}
        for i in range(start, start + count)
    ]


def _make_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _make_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows]), data)
    return data.getvalue()


def _golds(task: Task) -> list[str]:
    return [problem.gold for problem in task.pool]


def test_every_form_of_a_file_gives_the_same_problems(tmp_path: Path) -> None:
    """Lines of JSON, a list, both called .json, and CSV with a byte order mark."""
    rows = _rows(998, 4)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    texts = {
        "lines.jsonl": lines,
        "lines.json": lines,
        "list.json": json.dumps(rows),
        "table.csv": "\ufeff" + _make_csv(rows),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")

    pools = [tasks.load(f"gsm8k:{tmp_path / name}").pool for name in texts]
    assert len(pools[0]) == 4
    assert pools == [pools[0]] * len(texts)
    assert [problem.gold for problem in pools[0]] == ["999", "1,000", "1,001", "1,002"]


@pytest.mark.skipif(not is_installed("pyarrow"), reason="needs pyarrow, of racdeploy[tasks]")
def test_parquet_is_read_as_published(tmp_path: Path) -> None:
    """Lists of options stay lists; a file of something else is refused."""
    rows = [{"question": "Even?", "options": ["1", "2"], "answer": "B", "answer_index": 1}]
    (tmp_path / "test.parquet").write_bytes(_make_parquet(rows))
    assert _golds(tasks.load(f"mmlu_pro:{tmp_path / 'test.parquet'}")) == ["B"]

    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with raises("not-parquet", "bad.parquet"):
        tasks.load(f"mmlu_pro:{tmp_path / 'bad.parquet'}")


@NEEDS_DATASETS
@pytest.mark.filterwarnings("default")  # what datasets brings may warn of its own code
def test_folders_keep_the_splits_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the Hub's, and what save_to_disk leaves of several splits or of one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    copied = tmp_path / "copy" / "main"
    copied.mkdir(parents=True)
    (tmp_path / "copy" / "README.md").write_bytes(README)
    (copied / "train-0.parquet").write_bytes(_make_parquet(_rows(100, 3)))
    (copied / "test-0.parquet").write_bytes(_make_parquet(_rows(0, 3)))

    both = datasets.load_dataset(str(tmp_path / "copy"), "main")
    both.save_to_disk(str(tmp_path / "both"))
    both["test"].save_to_disk(str(tmp_path / "one"))

    for name in ("both", "copy"):
        task = tasks.load(f"gsm8k:{tmp_path / name}")
        assert _golds(task) == ["1", "2", "3"]
        assert [problem.gold for problem in task.calibration_pool or ()] == ["101", "102", "103"]
    assert tasks.load(f"gsm8k:{tmp_path / 'one'}").calibration_pool is None

    renamed = datasets.DatasetDict(train=both["train"], other=both["test"])
    renamed.save_to_disk(str(tmp_path / "untested"))
    with raises("missing-dataset-split", "'test'", "GSM8K", "train, other"):
        tasks.load(f"gsm8k:{tmp_path / 'untested'}")


@pytest.mark.parametrize(
    ("spec", "text", "code", "named"),
    [
        ("gsm8k", '{"question": "?", "answer": "4"}', "no-final-answer", "row 1"),
        ("aime24", '{"problem": "?", "answer": "1000"}', "answer-out-of-range", "'1000'"),
        ("math500", '{"problem": "?", "solution": "two"}', "no-final-answer", "row 1"),
        (
            "mmlu_pro",
            '{"question": "?", "options": ["1"], "answer": "B"}',
            "answer-not-an-option",
            "'B'",
        ),
        (
            "mmlu_pro",
            '{"question": "?", "options": "[1]", "answer": "A"}',
            "options-not-a-list",
            "parquet",
        ),
        ("gsm8k", "[1]", "row-not-an-object", "row 1"),
        ("gsm8k", "{", "invalid-json", "rows.json"),
        ("gsm8k", "", "empty-task-file", "rows.json"),
    ],
)
def test_a_row_that_is_not_as_published_is_refused(
    tmp_path: Path, spec: str, text: str, code: str, named: str
) -> None:
    """With its number and what is wrong."""
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    with raises(code, named):
        tasks.load(f"{spec}:{file}")


@pytest.mark.parametrize(
    ("spec", "code", "told"),
    [
        ("gsm8k", "task-needs-questions", "--tasks hub:gsm8k"),
        ("gsm8k", "task-needs-questions", "--tasks gsm8k:PATH"),
        ("hub:openai/gsm8k", "dataset-as-task", "--tasks hub:gsm8k"),
        ("hub:gsm8", "unknown-public-set", "'gsm8k'"),
        ("hub:gcd", "unknown-public-set", "--tasks jsonl:FILE"),
        ("hub:", "unknown-public-set", "--tasks jsonl:FILE"),
        ("gsm8k:notes.txt", "unknown-suffix", ".jsonl, .json, .csv, .parquet"),
        ("gsm8k:absent.csv", "file-unreadable", "absent.csv"),
    ],
)
def test_a_name_that_is_not_enough_gets_the_ways_that_work(spec: str, code: str, told: str) -> None:
    """Nothing is downloaded but for the word hub."""
    with raises(code, told):
        tasks.load(spec)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of the Hub without it: 40 questions to evaluate on, 60 to calibrate where published."""

    def read(published: PublicDataset) -> SplitRows:
        if published is aime24.DATASET:
            rows = [{"problem": f"{i}?", "answer": i} for i in range(30)]
            return tuple(rows), ()
        return tuple(_rows(0, 40)), tuple(_rows(100, 60))

    monkeypatch.setattr(tasks, "read_hub", read)


@pytest.mark.usefixtures("hub")
def test_published_splits_are_kept_apart() -> None:
    """All questions of test are for evaluation, all of train for calibration."""
    found = TaskSet.load(["hub:gsm8k"], [])
    evaluation = {problem.gold for problem in found.draw("evaluation", 0, 500)}
    calibration = {problem.gold for problem in found.draw("calibration", 0, 500)}
    assert evaluation == {str(i + 1) for i in range(40)}
    assert calibration == {str(i + 101) for i in range(60)}
    assert found.sources[0] == (
        "hub:gsm8k: 40 questions of GSM8K (test), calibration on the 60 of its train split"
    )


@pytest.mark.usefixtures("hub")
def test_calibration_alone_never_takes_the_test_questions() -> None:
    """Where something else is evaluated, train is all that calibrates."""
    found = TaskSet.load(["gcd"], ["hub:gsm8k"])
    assert len(found.draw("calibration", 0, 500)) == 60
    assert found.identify_calibration()[0]["name"] == "gsm8k"


@pytest.mark.usefixtures("hub")
def test_a_set_without_training_questions_needs_something_to_calibrate_on() -> None:
    """Refused alone and by name; beside others those calibrate, which the plan says."""
    for calibration in ([], ["hub:aime24"]):
        with raises("no-training-questions", "AIME 2024", "--calibration-tasks hub:math500"):
            TaskSet.load(["hub:aime24"], calibration)

    found = TaskSet.load(["hub:aime24", "hub:gsm8k"], [])
    assert {problem.task for problem in found.draw("calibration", 0, 500)} == {"hub:gsm8k"}
    assert "hub:aime24 is only evaluated on; calibration: hub:gsm8k" in found.sources

    assert len(TaskSet.load(["gcd"], ["hub:aime24"]).draw("calibration", 0, 500)) == 30


def test_one_file_is_split_by_a_hash_and_two_are_whole(tmp_path: Path) -> None:
    """The plan says which."""
    for name, start in (("test", 0), ("train", 100)):
        lines = [json.dumps(row) for row in _rows(start, 40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    test, train = (f"gsm8k:{tmp_path / name}.jsonl" for name in ("test", "train"))

    alone = TaskSet.load([test], [])
    halves = [len(alone.draw(split, 0, 500)) for split in ("calibration", "evaluation")]
    assert sum(halves) == 40
    assert alone.sources[0].endswith("for evaluation, split by a hash of each")
    assert alone.sources[1].startswith("GSM8K is asked and scored as in lm-eval")

    apart = TaskSet.load([test], [train])
    assert [len(apart.draw(split, 0, 500)) for split in ("calibration", "evaluation")] == [40, 40]
    beside = TaskSet.load([test, "gcd"], ["gcd"])
    assert len([p for p in beside.draw("evaluation", 0, 80) if p.task == test]) == 40


@pytest.mark.usefixtures("hub")
def test_thoughts_that_will_be_cut_are_foreseen() -> None:
    """One sentence for each task, with the key that cuts them."""
    values = {
        "tasks": ["hub:aime24"],
        "calibration_tasks": ["hub:gsm8k"],
        "traces": {"max_new_tokens": 1024},
        "verify": {"max_new_tokens": 8192, "context_tokens": 16384},
    }
    job = Job(Recipe.combine(None, values))
    assert job.predict_truncation("evaluation") == [
        "8,192 tokens cut about half of AIME 2024's thoughts (typical: 13,400): "
        "raise verify.max_new_tokens"
    ]
    assert job.predict_truncation("calibration") == [
        "1,024 tokens cut most of GSM8K's thoughts (typical: 2,500): raise traces.max_new_tokens"
    ]

    values["verify"] = {"max_new_tokens": 16384, "context_tokens": 20000}
    assert Job(Recipe.combine(None, values)).predict_truncation("evaluation") == []
    assert Job(Recipe()).predict_truncation("evaluation") == []


def test_the_right_option_is_in_every_place() -> None:
    """By the question alone: the same in every run, and no letter is favoured."""
    places = dict.fromkeys("ABCD", 0)
    for i in range(400):
        wrong = {f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}
        row = {"Question": f"{i}?", "Correct Answer": "yes", **wrong}
        problem = gpqa_diamond.make_problem(row)
        assert problem == gpqa_diamond.make_problem(row)
        assert f"\n{problem.gold}) yes" in problem.question
        places[problem.gold] += 1

    # Five standard deviations of a binomial with 400 draws at one in four are 43.
    assert all(57 <= count <= 143 for count in places.values())


def test_answers_to_gsm8k_are_scored_as_recorded() -> None:
    """Beside lm-evaluation-harness and lighteval; benchmarks/extractors.py recorded all three."""
    file = Path(__file__).with_name("gsm8k_answers.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 200

    for row in rows:
        problem = gsm8k.make_problem({"question": "?", "answer": row["solution"]})
        assert score(problem.scorer, row["answer"], problem.gold).correct == row["racdeploy"], row

    differs = {row["form"] for row in rows if row["racdeploy"] != row["right"]}
    assert differs == {"sentence, numbers after it"}


def test_answers_of_a_model_to_gsm8k_are_scored_as_recorded() -> None:
    """The number found is compared too; benchmarks/RESULTS-archive.md has what harnesses find."""
    file = Path(__file__).with_name("gsm8k_model.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["index"] for row in rows] == list(range(200))

    for row in rows:
        problem = gsm8k.make_problem({"question": "?", "answer": f"#### {row['gold']}"})
        scored = score(problem.scorer, row["answer"], problem.gold)
        assert (scored.extracted, scored.correct) == (row["found"], row["racdeploy"]), row["index"]
        assert row["racdeploy"] == row["lm_eval"] == row["lighteval"]

    others = {
        name: [row["index"] for row in rows if not row[f"{name}_same"]]
        for name in ("lm_eval", "lighteval")
    }
    assert others == {
        "lm_eval": [38, 94, 111, 184],
        "lighteval": [4, 6, 8, 23, 53, 64, 100, 111, 123, 181],
    }


@pytest.mark.skipif(
    not PUBLISHED_TEST.is_file(), reason="RACDEPLOY_GSM8K names GSM8K's test.jsonl where it is"
)
def test_the_published_file_is_read_whole() -> None:
    """1319 questions, each with a whole number."""
    task = tasks.load(f"gsm8k:{PUBLISHED_TEST}")
    assert len(task.pool) + task.duplicate_count == 1319
    golds = [problem.gold.replace(",", "").removeprefix("-") for problem in task.pool]
    assert all(gold.isdecimal() for gold in golds)


_READ = """
from racdeploy.tasks import TaskSet
task = TaskSet.load(["hub:gsm8k"], []).evaluation["hub:gsm8k"]
print(*(each.gold for each in (*task.pool, *task.calibration_pool)))
"""


def _read_hub(cache: Path, **environment: str) -> tuple[str, str]:
    """Read GSM8K in a process of its own: the Hub's address is read when it is imported."""
    settings = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", _READ],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout, (done.stderr.strip().splitlines() or [""])[-2:][0]


@NEEDS_DATASETS
def test_a_set_of_the_hub_is_read_and_kept(tmp_path: Path) -> None:
    """Both splits at the pinned commit; afterwards without a network; without either, one line."""
    part = gsm8k.DATASET.evaluation
    files = {
        "README.md": README,
        "main/train-00000-of-00001.parquet": _make_parquet(_rows(100, 2)),
        "main/test-00000-of-00001.parquet": _make_parquet(_rows(0, 2)),
        "socratic/test-00000-of-00001.parquet": _make_parquet(_rows(500, 2)),
    }
    with serve_dataset(part.dataset, part.revision, files) as address:
        read, _ = _read_hub(tmp_path / "cache", HF_ENDPOINT=address)
    assert read.split() == ["1", "2", "101", "102"]

    again, _ = _read_hub(tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert again == read

    nothing, told = _read_hub(tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert nothing == ""
    assert "EnvironmentFailure: cannot read openai/gsm8k from the Hub: " in told


@NEEDS_DATASETS
def test_a_gated_set_says_how_to_get_it(tmp_path: Path) -> None:
    """Its page, where its terms are accepted."""
    part = gsm8k.DATASET.evaluation
    with serve_dataset(part.dataset, part.revision, {}, gated=True) as address:
        nothing, told = _read_hub(tmp_path / "cache", HF_ENDPOINT=address)
    assert nothing == ""
    assert "gated" in told


def test_a_report_names_the_harness_beside_the_task() -> None:
    """With its version; nothing for a task of ours, or for one that this version has not."""
    assert [tasks.find_protocol(spec) for spec in ("gcd", "jsonl:a.jsonl", "gone:a.jsonl")] == [
        ""
    ] * 3

    row = TaskRow(task="hub:aime24", prompts=30, dense_correct=9, pruned_correct=8)
    row = row.model_copy(update={"protocol": tasks.find_protocol(row.task)})
    report = build_report().model_copy(update={"tasks": (row,)})
    assert "| hub:aime24, as lighteval 0.13.0 (aime24) | 30 |" in markdown.render(report)
