"""The problems that examples/gsm_reasoner teaches."""

from __future__ import annotations

import runpy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from racdeploy import tasks
from racdeploy.tasks import scoring
from tests.support.tiny_models import make_checkpoint

pytest.importorskip("reasoning_gym")
SCRIPT = Path(__file__).parents[2] / "examples" / "gsm_reasoner" / "teach.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """Return the names that the script defines, with few problems in its pool."""
    names = runpy.run_path(str(SCRIPT))
    names["draw_batches"].__globals__["POOL_PROBLEMS"] = 24
    return names


@pytest.fixture(scope="module")
def taught(example: dict[str, Any]) -> tasks.Task:
    return tasks.load(example["name_task"](example["TAUGHT"]))


def test_the_model_learns_a_solution_and_its_answer(
    example: dict[str, Any], taught: tasks.Task
) -> None:
    """Scored as racdeploy scores it: what follows the thought is right, and gives no more away."""
    for problem in taught.draw_problems("training", 3, 40):
        prompt, completion = example["texts"](problem)
        thought, closing, answer = completion.partition("\n</think>\n")
        assert closing
        assert prompt.endswith("<|im_start|>assistant\n<think>\n")
        assert "####" not in completion
        assert problem.gold in thought
        answered = answer.removesuffix("<|im_end|>")
        assert scoring.score(problem.scorer, answered, problem.gold).correct


@pytest.mark.parametrize(
    ("line", "spelled"),
    [
        ("So 73 students - 52 girls = 21 boys.", "73-52:3-2-0=1,7-5-0=2,21"),
        (
            "There are 34-8-16 = 10 pink blocks.",
            "34-8:14-8-0=6,3-0-1=2,26 26-16:6-6-0=0,2-1-0=1,10",
        ),
        ("In 6 years Linda will be 23*5=115.", "23*5:3*5+0=15,2*5+1=11,115"),
        ("Loaves cost €80 - €24 = €56 more.", "80-24:10-4-0=6,8-2-1=5,56"),
        ("In all 3 + 8 + 17 = 28.", "11+17:1+7+0=8,1+1+0=2,28"),
        ("He has 3 + 4 = 7 books.", ""),
        ("He has 10*0.5=5 tubes.", ""),
        ("He has 12 * 34 = 408 tubes.", ""),
        ("He has 30 + 4 = 35 tubes.", ""),
        ("She has 12 books, so 30.", ""),
    ],
)
def test_a_calculation_is_spelled_before_its_result(
    example: dict[str, Any], line: str, spelled: str
) -> None:
    """One that columns cannot spell, is easy, or is wrong stays as it is."""
    before, equals, result = line.rpartition("=")
    expected = f"{before.rstrip()} ({spelled}) {equals}{result}" if spelled else line
    assert example["spell"](line) == expected


def test_templates_are_taught_or_unseen(example: dict[str, Any]) -> None:
    """reasoning-gym draws every one of both, and no template is in both."""
    kinds = [[int(number) for number in example[name].split(",")] for name in ("TAUGHT", "UNSEEN")]
    assert not set(kinds[0]) & set(kinds[1])
    for numbers in kinds:
        for number in numbers:
            assert tasks.load(example["name_task"](number)).draw_problems("training", 0, 1)


def test_batches_are_of_the_training_split_and_new_each_time(
    example: dict[str, Any], taught: tasks.Task, tmp_path: Path
) -> None:
    """The prompt is not learnt, the completion is."""
    from tokenizers import Tokenizer

    model = make_checkpoint(tmp_path / "model", "llama")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    settings = example["Settings"](str(model), 4, 4096, 1e-2, 0)
    shown = set()
    for ids_BT, labels_BT in islice(example["draw_batches"](tokenizer, settings), 12):
        assert ids_BT.shape == labels_BT.shape
        for ids_T, labels_T in zip(ids_BT, labels_BT, strict=True):
            learnt_T = labels_T != -100
            first = int(learnt_T.nonzero()[0])
            assert (labels_T[learnt_T] == ids_T[learnt_T]).all()
            shown.add(tokenizer.decode(ids_T[:first].tolist()))

    held_out = {problem.question for problem in taught.draw_problems("evaluation", 0, 100)}
    asked = {question for question in held_out for text in shown if question in text}
    assert len(shown) > 24
    assert not asked
