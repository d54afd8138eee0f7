"""Files of problems as users have them: marked, repeated, too few, of another form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from racdeploy.pipeline.job import Job
from racdeploy.pipeline.structure import plan_cut
from racdeploy.recipe import Recipe
from racdeploy.tasks import TaskSet, load
from tests.support.errors import raises


def _write(file: Path, rows: Sequence[object], encoding: str = "utf-8") -> str:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text(text, encoding=encoding)
    return f"jsonl:{file}"


def _rows(count: int) -> list[dict[str, object]]:
    return [{"question": f"{i} plus 1?", "answer": i + 1} for i in range(count)]


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    """Excel and Windows write one; the first question is whole."""
    task = load(_write(tmp_path / "excel.jsonl", _rows(3), "utf-8-sig"))
    assert [problem.question for problem in task.pool] == ["0 plus 1?", "1 plus 1?", "2 plus 1?"]


def test_another_encoding_is_named_with_what_turns_it(tmp_path: Path) -> None:
    """The byte that is no UTF-8, and a command."""
    spec = _write(tmp_path / "old.jsonl", [{"question": "é?", "answer": "é"}], "latin-1")
    with raises("text-not-utf8", "byte 14", "iconv -f latin1 -t utf8"):
        load(spec)


def test_whole_numbers_and_fractions_are_answers(tmp_path: Path) -> None:
    """Written as numbers of JSON, without quotes."""
    rows = [{"question": "6 times 7?", "answer": 42}, {"question": "1 by 4?", "answer": 0.25}]
    task = load(_write(tmp_path / "numbers.jsonl", rows))
    assert [problem.gold for problem in task.pool] == ["42", "0.25"]


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    """U+2028 and U+0085 in a question end none."""
    question = "What is\u2028one and\u0085one?"
    task = load(_write(tmp_path / "lines.jsonl", [{"question": question, "answer": "2"}]))
    assert [problem.question for problem in task.pool] == [question]


def test_all_questions_of_a_file_count_where_nothing_calibrates(tmp_path: Path) -> None:
    """A build needs half of them for calibration."""
    spec = _write(tmp_path / "all.jsonl", _rows(40))
    asked = TaskSet.load_evaluation([spec]).draw("evaluation", 0, 40)
    assert {problem.question for problem in asked} == {row["question"] for row in _rows(40)}
    assert len(TaskSet.load([spec], []).draw("evaluation", 0, 40)) < 40
    with raises("task-named-twice"):
        TaskSet.load_evaluation([spec, spec])


def test_repeated_questions_are_reported(tmp_path: Path) -> None:
    """Each counts once; the plan and the notes of a report say how many there were."""
    spec = _write(tmp_path / "twice.jsonl", [*_rows(40), *_rows(30)])
    told = f"{spec} has 30 lines that repeat another question: each of 40 questions"
    assert len(load(spec).pool) == 40
    assert TaskSet.load([spec], []).notes == (f"{told} counts once",)
    assert told in plan_cut(Job(Recipe(tasks=(spec,)))).note
    assert TaskSet.load(["gcd", _write(tmp_path / "once.jsonl", _rows(40))], []).notes == ()


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        (_rows(1), "1 question: "),
        (_rows(1) * 300, "299 of its 300 lines"),
    ],
)
def test_too_few_problems_are_counted_by_half(
    tmp_path: Path, rows: list[object], counted: str
) -> None:
    """How many fell into which half, and how many are needed."""
    found = TaskSet.load([_write(tmp_path / "few.jsonl", rows)], [])
    halves = ("0 for calibration, 1 for evaluation", "20 different ones", "400 for the 200")
    with raises("no-problems-for-split", counted, *halves):
        found.draw("calibration", 0, 200)


@pytest.mark.parametrize(
    ("row", "code", "told"),
    [
        ({"prompt": "2 + 2?", "solution": 4}, "missing-question", "prompt, solution"),
        ({"question": "2 + 2?", "gold": 4}, "missing-answer", "question, gold"),
        ({"question": "2 + 2?", "answer": None}, "missing-answer", "None"),
        ({"question": " ", "answer": 4}, "missing-question", "' '"),
        (["2 + 2?", 4], "missing-question", "list"),
    ],
)
def test_a_wrong_line_is_shown_with_what_it_has(
    tmp_path: Path, row: object, code: str, told: str
) -> None:
    """The keys that are there, or the value that is no answer."""
    spec = _write(tmp_path / "keys.jsonl", [row])
    with raises(code, "keys.jsonl:1", told):
        load(spec)


@pytest.mark.parametrize(
    ("spec", "code", "remedy"),
    [
        ("three.jsonl", "file-as-task", "--tasks jsonl:three.jsonl"),
        ("data/three.json", "file-as-task", "--tasks jsonl:data/three.json"),
        ("data.csv", "table-as-task", "< data.csv > data.jsonl, then --tasks jsonl:data.jsonl"),
        (
            "jsonl:data.csv",
            "table-as-task",
            "< data.csv > data.jsonl, then --tasks jsonl:data.jsonl",
        ),
        ("data.parquet", "table-as-task", '{"question": "…", "answer": "…"}'),
    ],
)
def test_a_file_in_place_of_a_task_gets_the_way_to_give_it(
    spec: str, code: str, remedy: str
) -> None:
    """A name of a file is no misspelled task."""
    with raises(code, remedy):
        load(spec)
