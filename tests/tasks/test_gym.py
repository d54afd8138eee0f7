"""Generators of reasoning-gym as tasks: items anybody can make again, scored in a sandbox."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy import tasks
from racdeploy.tasks import TaskSet, scoring
from tests.support.errors import raises

reasoning_gym = pytest.importorskip("reasoning_gym")

QUICK = (
    "chain_sum",
    "coin_flip",
    "countdown",
    "family_relationships",
    "gsm_symbolic",
    "leg_counting",
    "prime_factorization",
    "spell_backward",
)
WITHOUT_GOLD = ("graph_color", "propositional_logic")
_ITEM = re.compile(r"gym:(.+)@(\d+)\+(\d+)")


def _locate(problem: tasks.Problem) -> tuple[str, int, int]:
    """Return generator, seed and index of a problem's item."""
    match = _ITEM.fullmatch(problem.scorer)
    assert match
    return match[1], int(match[2]), int(match[3])


@pytest.mark.parametrize("name", [*QUICK, *WITHOUT_GOLD])
def test_problems_are_reasoning_gyms_own_items(name: str) -> None:
    """Its own dataset of the seed has question and answer at the index."""
    problems = tasks.load(f"gym:{name}").draw_problems("evaluation", 5, 4)
    for problem in problems:
        generator, seed, index = _locate(problem)
        item = reasoning_gym.create_dataset(generator, seed=seed, size=1000)[index]
        assert problem.question.startswith(item["question"])
        assert problem.gold == (item["answer"] or "")


@pytest.mark.parametrize("name", QUICK)
def test_the_gold_answer_is_right_in_any_form_and_others_are_wrong(name: str) -> None:
    """A score of .01 or of half the letters is wrong, and so is what a scorer fails on."""
    (problem,) = tasks.load(f"gym:{name}").draw_problems("evaluation", 0, 1)
    gold = problem.gold
    for answer in (f"So it is.\n<answer>{gold}</answer>", rf"\boxed{{{gold}}}", f"Answer: {gold}"):
        assert scoring.score(problem.scorer, answer, gold).correct, answer
    for answer in ("banana", "", f"<answer>7{gold}</answer>"):
        assert not scoring.score(problem.scorer, answer, gold).correct, answer


def test_a_generator_without_gold_answers_is_scored_by_its_rules() -> None:
    """A colouring is right if no edge joins one colour."""
    (problem,) = tasks.load("gym:graph_color").draw_problems("evaluation", 0, 1)
    _, seed, index = _locate(problem)
    item = reasoning_gym.create_dataset("graph_color", seed=seed, size=1000)[index]
    vertices = item["metadata"]["puzzle"]["vertices"]
    solution = item["metadata"]["possible_answer"]
    same = dict.fromkeys(vertices, 1)
    as_json = "{" + ", ".join(f'"{vertex}": {solution[vertex]}' for vertex in vertices) + "}"
    assert scoring.score(problem.scorer, f"<answer>{as_json}</answer>", "").correct
    assert not scoring.score(problem.scorer, f"<answer>{same}</answer>", "").correct


def test_an_answer_that_is_evaluated_has_no_effect(tmp_path: Path) -> None:
    """The scorer of countdown evaluates an expression that a model wrote."""
    (problem,) = tasks.load("gym:countdown").draw_problems("evaluation", 0, 1)
    target = tmp_path / "written"
    for attack in (
        f"__import__('os').system('touch {target}')",
        f"open('{target}', 'w').write('x')",
        "__import__('os')._exit(0)",
    ):
        scored = scoring.score(problem.scorer, f"<answer>{attack}</answer>", problem.gold)
        assert not scored.correct, attack
    assert not target.exists()
    assert scoring.score(problem.scorer, problem.gold, problem.gold).correct


def test_splits_and_seeds_are_far_apart() -> None:
    """No question is in two splits, no item of one is near an item of another."""
    task = tasks.load("gym:coin_flip")
    drawn = {
        split: [problem for seed in range(3) for problem in task.draw_problems(split, seed, 20)]
        for split in ("training", "calibration", "evaluation")
    }
    questions = {split: {each.question for each in problems} for split, problems in drawn.items()}
    assert not questions["calibration"] & questions["evaluation"]
    assert not questions["calibration"] & questions["training"]
    numbers = {split: [sum(_locate(each)[1:]) for each in drawn[split]] for split in drawn}
    assert min(numbers["evaluation"]) - max(numbers["calibration"]) >= 10_000_000
    assert min(numbers["calibration"]) - max(numbers["training"]) >= 10_000_000
    assert task.draw_problems("evaluation", 1, 5) != task.draw_problems("evaluation", 2, 5)
    assert task.draw_problems("evaluation", 1, 5) == task.draw_problems("evaluation", 1, 5)


def test_parameters_and_templates_are_part_of_the_task() -> None:
    """Difficulty is the generator's own; templates can be held apart."""
    (long,) = tasks.load("gym:chain_sum:min_terms=9:max_terms=9").draw_problems("evaluation", 0, 1)
    assert long.question.count(" + ") + long.question.count(" - ") == 8

    for problem in tasks.load("gym:gsm_symbolic:task_indices=3,5-6").draw_problems(
        "evaluation", 0, 6
    ):
        _, seed, index = _locate(problem)
        dataset = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=1000)
        made = []
        for template in (3, 5, 6):
            dataset.task_indices = [template] * 1000
            made.append(dataset[index]["question"])
        assert any(map(problem.question.startswith, made))


def test_calibration_depends_on_generator_and_version() -> None:
    """Traces of another generator, or of another version of its items, are not reused."""
    identities = set()
    for spec in ("gym:chain_sum", "gym:chain_sum:max_terms=4", "gym:coin_flip"):
        (identity,) = TaskSet.load([spec], []).identify_calibration()
        identities.add(identity["name"])
    assert len(identities) == 3
    assert all(re.search(r"/\d+\.\d+", name) for name in identities)


def test_an_item_of_another_version_is_an_error_and_no_wrong_answer() -> None:
    """Else every answer would be wrong, and nobody would know why."""
    (problem,) = tasks.load("gym:chain_sum").draw_problems("evaluation", 0, 1)
    other = replace(problem, gold="1")
    with raises("generator-changed"):
        scoring.score(other.scorer, "1", other.gold)


def test_generators_write_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """A few print dots, which would spoil what a program reads."""
    tasks.load("gym:bf").draw_problems("evaluation", 0, 8)
    assert capfd.readouterr().out == ""


BAD = {
    "gym": "task-needs-generator",
    "gym:": "task-needs-generator",
    "gym:gsm_symbolik": "unknown-generator",
    "gym:composite": "generator-refuses",
    "gym:gsm_symbolic:difficulty=2": "generator-refuses",
    "gym:gsm_symbolic:difficulty": "generator-parameter",
    "gym:gsm_symbolic:depth=2": "generator-parameter",
    "gym:gsm_symbolic:seed=2": "generator-parameter",
    "gym:gcd:task_indices=1": "generator-parameter",
    "gym:gsm_symbolic:task_indices=90-200": "unknown-template",
    "gym:gsm_symbolic:task_indices=all": "unknown-template",
    "gym:gsm_symbolic:task_indices=97-98": "unknown-template",  # known to be wrong
}


@pytest.mark.parametrize("spec", BAD)
def test_what_cannot_be_asked_is_refused_before_work(spec: str) -> None:
    """One line each, with what to write instead."""
    with raises(BAD[spec]):
        tasks.load(spec)


def test_a_typing_error_gets_a_suggestion() -> None:
    """The nearest name is shown."""
    with raises("unknown-generator", "gsm_symbolic"):
        tasks.load("gym:gsm_symbolik")
