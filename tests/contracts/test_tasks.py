"""What every task promises."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from racdeploy import plugins, tasks
from racdeploy.extras import is_installed
from racdeploy.tasks import scoring
from tests.support.errors import raises

SPLITS = ("training", "calibration", "evaluation")


@dataclass(frozen=True)
class Example:
    """A row of our own in the published form, the prompt made of it, and answers to it."""

    row: Mapping[str, Any]
    prompt: str
    right: str
    wrong: str
    needs: tuple[str, ...] = ()


_SUM = "What is $1 + 1$?"
_BOXED = f"""
Solve the following math problem efficiently and clearly.  The last line of your response should \
be of the following format: 'Therefore, the final answer is: $\\boxed{{ANSWER}}$. I hope it is \
correct' (without quotes) where ANSWER is just the final number or expression that solves the \
problem. Think step by step before answering.

{_SUM}
"""
_CHOICE = """Answer the following multiple choice question. The last line of your response should \
be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of %s. Think \
step by step before answering.

"""
_AIME = Example({"problem": _SUM, "answer": "002"}, _BOXED, r"it is $\boxed{2}$", r"\boxed{3}")
PUBLIC = {
    "gsm8k": Example(
        {"question": "Ann has 1,000 apples and buys 1.", "answer": "1000 + 1\n#### 1,001"},
        "Q: Ann has 1,000 apples and buys 1.\nA: Let's think step by step.",
        "She has $1001.",
        "She has 1000.",
    ),
    "math500": Example(
        {"problem": _SUM, "solution": r"It is $\boxed{\frac{4}{2}}$.", "answer": r"\frac{4}{2}"},
        _BOXED,
        r"Therefore, the final answer is: $\boxed{2}$. I hope it is correct.",
        r"Therefore, the final answer is: $\boxed{3}$. I hope it is correct.",
        ("math_verify",),
    ),
    "aime24": _AIME,
    "aime25": _AIME,
    "gpqa_diamond": Example(
        {
            "Question": "Which is a metal? ",
            "Correct Answer": "iron",
            "Incorrect Answer 1": "helium\n",
            "Incorrect Answer 2": "neon",
            "Incorrect Answer 3": "argon",
        },
        f"{_CHOICE % 'ABCD'}Which is a metal?\n\nA) helium\nB) neon\nC) iron\nD) argon",
        "Iron is.\nAnswer: C",
        "Answer: A",
    ),
    "mmlu_pro": Example(
        {"question": "Which is even?", "options": ["1", "2", "3", "5", "7"], "answer": "B"},
        f"{_CHOICE % 'ABCDE'}Which is even?\n\nA: 1\nB: 2\nC: 3\nD: 5\nE: 7\n\nAnswer:",
        "Answer: B",
        "Answer: E",
    ),
    "ifeval": Example(
        {
            "prompt": "Name a tree without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"keyword": None}],
        },
        "Name a tree without commas.",
        "An oak.",
        "An oak, a beech.",
        ("lm_eval", "langdetect"),
    ),
}


def _score(answer: str, gold: str) -> bool:
    return scoring.score("", answer, gold).correct


@pytest.fixture(params=tasks.list_procedural_tasks())
def task(request: pytest.FixtureRequest) -> tasks.Task:
    return tasks.load(request.param)


def test_seeds_decide_the_problems(task: tasks.Task) -> None:
    """The same seed gives the same problems, another seed gives others."""
    first, again, other = (task.draw_problems("evaluation", seed, 20) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_splits_never_share_a_question(task: tasks.Task) -> None:
    """Calibration, training and evaluation are disjoint, whatever the seeds."""
    asked = [
        {p.question for seed in range(5) for p in task.draw_problems(split, seed, 60)}  # type: ignore[arg-type]
        for split in SPLITS
    ]
    assert not asked[0] & asked[1]
    assert not asked[0] & asked[2]
    assert not asked[1] & asked[2]


def test_there_are_enough_evaluation_problems(task: tasks.Task) -> None:
    """A benchmark of 600 prompts over six tasks finds its share, all different."""
    questions = {problem.question for problem in task.draw_problems("evaluation", 0, 200)}
    assert len(questions) == 200


def test_the_worked_solution_leads_to_the_gold_answer(task: tasks.Task) -> None:
    """The thinking is complete: its last line holds the answer."""
    for problem in task.draw_problems("training", 3, 50):
        assert problem.thinking is not None
        assert problem.gold in problem.thinking


def test_score_takes_the_gold_answer_and_refuses_others(task: tasks.Task) -> None:
    """The gold answer scores in a box and in a sentence; a wrong or missing one does not."""
    for problem in task.draw_problems("evaluation", 4, 20):
        assert _score(rf"The answer is \boxed{{{problem.gold}}}.", problem.gold)
        assert _score(f"It is {problem.gold}", problem.gold)
        assert not _score(rf"The answer is \boxed{{{problem.gold}1}}.", problem.gold)
        assert not _score("I do not know.", problem.gold)


def test_every_task_file_draws_reads_or_asks() -> None:
    """A task is procedural, reads a file, is a public set, or a library of generators."""
    for name in plugins.list_names("tasks"):
        module = plugins.load("tasks", name)
        ways = [hasattr(module, way) for way in ("draw", "read", "make_problem", "open_generator")]
        assert ways.count(True) == 1, name
        assert hasattr(module, "DATASET") == hasattr(module, "make_problem"), name


@pytest.fixture(params=tasks.list_public_tasks())
def public(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_public_set_is_pinned_and_says_whom_it_follows(public: str) -> None:
    """A commit of the Hub for each split; a harness with its version; an example below."""
    published = plugins.load("tasks", public).DATASET
    for split in filter(None, (published.evaluation, published.calibration)):
        assert re.fullmatch("[0-9a-f]{40}", split.revision)
        assert re.fullmatch(r"[\w-]+/[\w-]+", split.dataset)
    assert re.match(
        r"(lm-evaluation-harness|lighteval) \d+\.\d+", tasks.find_protocol(f"hub:{public}")
    )
    assert public in PUBLIC, "a new set needs an example of its rows here"


def test_a_public_set_asks_as_its_harness_does(public: str, tmp_path: Path) -> None:
    """Word by word, and the gold answer scores while another does not."""
    example = PUBLIC[public]
    file = tmp_path / "published.jsonl"
    file.write_text(json.dumps(example.row) + "\n", encoding="utf-8")
    if missing := [name for name in example.needs if not is_installed(name)]:
        pytest.skip(f"needs {', '.join(missing)}")

    (problem,) = tasks.load(f"{public}:{file}").pool
    assert example.prompt == problem.question
    assert scoring.score(problem.scorer, example.right, problem.gold).correct
    assert not scoring.score(problem.scorer, example.wrong, problem.gold).correct


def test_a_public_set_refuses_rows_without_a_column(public: str, tmp_path: Path) -> None:
    """With the column, those that are there, and where the set is published."""
    row = dict(PUBLIC[public].row)
    published = plugins.load("tasks", public).DATASET
    del row[published.columns[-1]]
    file = tmp_path / "published.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")
    dataset = f"huggingface.co/datasets/{published.evaluation.dataset}"
    with raises("missing-column", "row 1", f"'{published.columns[-1]}'", dataset):
        tasks.load(f"{public}:{file}")


def test_problems_of_shares_evenly() -> None:
    """Seven problems over three tasks are three, two and two, interleaved."""
    chosen = [tasks.load(name) for name in tasks.list_procedural_tasks()[:3]]
    names = [problem.task for problem in tasks.draw_from_tasks(chosen, "evaluation", 0, 7)]
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
        {p.question for p in task.draw_problems(split, 0, task.count_available(split) or 0)}  # type: ignore[arg-type]
        for split in ("calibration", "evaluation")
    ]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 80


def test_too_few_problems_is_an_error(problem_file: Path) -> None:
    """Asking for more than there are names both numbers."""
    task = tasks.load(f"jsonl:{problem_file}")
    with raises("too-few-problems", f"{task.count_available('evaluation')} ", "500"):
        task.draw_problems("evaluation", 0, 500)


@pytest.mark.parametrize(
    ("line", "code", "value"),
    [
        ("not json", "invalid-json", "bad.jsonl:1"),
        ('{"answer": "4"}', "missing-question", "bad.jsonl:1"),
        ('{"question": "2+2?"}', "missing-answer", "bad.jsonl:1"),
        ('{"question": "2+2?", "answer": null}', "missing-answer", "bad.jsonl:1"),
        ('["2+2?", "4"]', "missing-question", "bad.jsonl:1"),
        ("", "empty-task-file", "bad.jsonl"),
    ],
)
def test_a_damaged_file_names_its_line(tmp_path: Path, line: str, code: str, value: str) -> None:
    """Bad lines are refused with their number; an empty file is refused too."""
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with raises(code, value):
        tasks.load(f"jsonl:{file}")


@pytest.mark.parametrize(
    ("spec", "code"), [("jsonl", "task-needs-file"), ("gcd:file", "takes-no-argument")]
)
def test_an_argument_is_given_where_it_belongs(spec: str, code: str) -> None:
    """Only tasks that read a file take one."""
    with raises(code, spec.partition(":")[0]):
        tasks.load(spec)


def test_draws_vary() -> None:
    """A generator that always draws the same would pass for a task."""
    for name in tasks.list_procedural_tasks():
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
    assert task.for_split("evaluation", whole=True).count_available("evaluation") == 80
