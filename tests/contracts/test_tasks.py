"""What every task promises."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from racdeploy import plugins, scorers, tasks
from racdeploy.errors import UsageError

SPLITS = ("training", "calibration", "evaluation")


def _score(answer: str, gold: str) -> bool:
    return scorers.score("", answer, gold).correct


@pytest.fixture(params=tasks.procedural_names())
def task(request: pytest.FixtureRequest) -> tasks.Task:
    return tasks.load(request.param)


def test_seeds_decide_the_problems(task: tasks.Task) -> None:
    """The same seed gives the same problems, another seed gives others."""
    first, again, other = (task.problems("evaluation", seed, 20) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_splits_never_share_a_question(task: tasks.Task) -> None:
    """Calibration, training and evaluation are disjoint, whatever the seeds."""
    asked = [
        {p.question for seed in range(5) for p in task.problems(split, seed, 60)}  # type: ignore[arg-type]
        for split in SPLITS
    ]
    assert not asked[0] & asked[1]
    assert not asked[0] & asked[2]
    assert not asked[1] & asked[2]


def test_there_are_enough_evaluation_problems(task: tasks.Task) -> None:
    """A benchmark of 600 prompts over six tasks finds its share, all different."""
    questions = {problem.question for problem in task.problems("evaluation", 0, 200)}
    assert len(questions) == 200


def test_the_worked_solution_leads_to_the_gold_answer(task: tasks.Task) -> None:
    """The thinking is complete: its last line holds the answer."""
    for problem in task.problems("training", 3, 50):
        assert problem.thinking is not None
        assert problem.gold in problem.thinking


def test_score_takes_the_gold_answer_and_refuses_others(task: tasks.Task) -> None:
    """The gold answer scores in a box and in a sentence; a wrong or missing one does not."""
    for problem in task.problems("evaluation", 4, 20):
        assert _score(rf"The answer is \boxed{{{problem.gold}}}.", problem.gold)
        assert _score(f"It is {problem.gold}", problem.gold)
        assert not _score(rf"The answer is \boxed{{{problem.gold}1}}.", problem.gold)
        assert not _score("I do not know.", problem.gold)


def test_every_task_file_draws_or_reads() -> None:
    """A task is procedural or reads a file."""
    for name in plugins.names("tasks"):
        module = plugins.load("tasks", name)
        assert hasattr(module, "draw") != hasattr(module, "read"), name


def test_problems_of_shares_evenly() -> None:
    """Seven problems over three tasks are three, two and two, interleaved."""
    chosen = [tasks.load(name) for name in tasks.procedural_names()[:3]]
    names = [problem.task for problem in tasks.problems_of(chosen, "evaluation", 0, 7)]
    assert [names.count(task.spec) for task in chosen] == [3, 2, 2]
    assert names[:3] == [task.spec for task in chosen]


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl"
    rows = [
        {"question": f"What is {i} plus 1?", "answer": f"Add one.\n#### {i + 1:,}"}
        for i in range(2000, 2080)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_jsonl_reads_gsm8k_answers(problem_file: Path) -> None:
    """What follows the mark is the gold answer, and thousands separators do not matter."""
    task = tasks.load(f"jsonl:{problem_file}")
    problem = task.pool[0]
    assert problem.gold == "2,001"
    assert _score(r"\boxed{2001}", problem.gold)
    assert _score("so it is 2001.", problem.gold)
    assert not _score("so it is 2002.", problem.gold)


def test_one_file_is_split_into_disjoint_halves(problem_file: Path) -> None:
    """A file given alone serves calibration and evaluation without sharing a question."""
    task = tasks.load(f"jsonl:{problem_file}")
    halves = [
        {p.question for p in task.problems(split, 0, task.available(split) or 0)}  # type: ignore[arg-type]
        for split in ("calibration", "evaluation")
    ]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 80


def test_too_few_problems_is_an_error(problem_file: Path) -> None:
    """Asking for more than there are names both numbers."""
    with pytest.raises(UsageError, match=r"has \d+ evaluation problems, 500 were asked for"):
        tasks.load(f"jsonl:{problem_file}").problems("evaluation", 0, 500)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "is not JSON"),
        ('{"answer": "4"}', "has no question"),
        ('{"question": "2+2?"}', "has no answer"),
        ('{"question": "2+2?", "answer": null}', "has no answer"),
        ('["2+2?", "4"]', "has no question"),
        ("", "holds no problems"),
    ],
)
def test_a_damaged_file_names_its_line(tmp_path: Path, line: str, complaint: str) -> None:
    """Bad lines are refused with their number; an empty file is refused too."""
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=complaint):
        tasks.load(f"jsonl:{file}")


@pytest.mark.parametrize("spec", ["jsonl", "gcd:file"])
def test_an_argument_is_given_where_it_belongs(spec: str) -> None:
    """Only tasks that read a file take one."""
    with pytest.raises(UsageError, match="file|argument"):
        tasks.load(spec)


def test_draws_vary() -> None:
    """A generator that always draws the same would pass for a task."""
    for name in tasks.procedural_names():
        draw = plugins.load("tasks", name).draw
        assert len({draw(Random(seed)).question for seed in range(50)}) > 40, name


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The answer is Paris.", "Paris", True),
        ("It is not Paris but Rome.", "Paris", False),
        (r"\boxed{\frac{1}{2}}", "1/2", True),
        (r"\boxed{x = 5}", "5", True),
        (r"\boxed{12 apples}", "12", True),
        (r"\boxed{12\text{ cm}}", "12", True),
        (r"\boxed{1e999999/1e-999999}", "3", False),
        (r"\boxed{3/0}", "3", False),
        (r"first \boxed{4}, no: \boxed{5}", "5", True),
        (r"\boxed{5", "5", True),
        ("$1,234.50", "1234.5", True),
        ("", "5", False),
    ],
)
def test_jsonl_answers_are_read_as_written(answer: str, gold: str, right: bool) -> None:
    """Fractions, units, separators and words count; no text of a model raises."""
    assert right == _score(answer, gold)


def test_two_files_are_used_whole(problem_file: Path) -> None:
    """A file that serves a single split gives all it has."""
    task = tasks.load(f"jsonl:{problem_file}")
    assert task.serving("evaluation", whole=True).available("evaluation") == 80
