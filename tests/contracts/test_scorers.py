"""What every scorer promises, and what each finds in the answers that models write."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from racdeploy import plugins, tasks
from racdeploy.tasks import scoring
from racdeploy.tasks.scorers import math
from racdeploy.tasks.scoring import AnswerScore
from tests.support.errors import raises

# By scorer: answer, gold, whether it is right, what is extracted, and how.
Case = tuple[str, str, bool, str | None, str]
_INSTRUCTIONS = json.dumps(
    {
        "prompt": "Name an oak without commas.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": ["oak"]}],
    }
)
CASES: dict[str, list[Case]] = {
    "gym:leg_counting@3000000000+1": [
        ("13 * 6 ...\n<answer>118</answer>", "118", True, "118", "between <answer> and </answer>"),
        (r"\boxed{118}", "118", True, "118", "boxed"),
        ("Well.\n**Answer:** 118.", "118", True, "118", "last line"),
        ("<answer>118 legs</answer>", "118", False, "118 legs", "between <answer> and </answer>"),
        ("I do not know", "118", False, "I do not know", "last line"),
    ],
    "auto": [
        (r"\boxed{\$1{,}234}", "1,234", True, r"\$1{,}234", "boxed"),
        (r"\boxed{m+n = 12\%}", "12", True, r"m+n = 12\%", "boxed"),
        (r"so \boxed{42}.", "42", True, "42", "boxed"),
        ("#### 42", "42", True, "42", "after ####"),
        ("It is 42, not 41.", "41", True, "41", "last number"),
        ("The answer is Paris.", "Paris", True, "Paris", "last words"),
        (r"\boxed{Rome}, and not Paris", "Paris", False, "Rome", "boxed"),
        ("I do not know.", "42", False, None, "no box, no ####, no number"),
    ],
    "boxed": [
        (r"\boxed{4}, no: \boxed{\frac{1}{2}}", "0.5", True, r"\frac{1}{2}", "boxed"),
        ("42", "42", False, None, "no complete box"),
        (r"\boxed{42", "42", False, None, "no complete box"),
    ],
    "number": [
        ("From 7 to $1,234.50.", "1234.5", True, "1,234.50", "last number"),
        ("12 of 13", "12", False, "13", "last number"),
        ("twelve", "12", False, None, "no number"),
    ],
    "choice": [
        (r"\boxed{\text{(b)}}", "B", True, "B", "boxed"),
        (
            "A is wrong. The answer is (C).",
            "C",
            True,
            "C",
            "after the word answer, choice or option",
        ),
        ("**Answer: D**", "d", True, "D", "after the word answer, choice or option"),
        ("A planet.\n\nC", "C", True, "C", "letter in the last line"),
        ("I'd take B)", "B", True, "B", "letter in the last line"),
        ("none of them", "A", False, None, "no letter"),
        (
            "Not option A: the answer is B",
            "B",
            True,
            "B",
            "after the word answer, choice or option",
        ),
        ("The answer is (B)", "A", False, "B", "after the word answer, choice or option"),
    ],
    "exact": [
        (" one\n two ", "one two", True, "one two", "whole text"),
        ("One two", "one two", False, "One two", "whole text"),
        (" \n", "one", False, None, "no text"),
    ],
    r"regex:answer=(\d+)": [
        ("answer=3 answer=42", "42", True, "42", "last match"),
        ("42", "42", False, None, "no match"),
    ],
    "regex:[a-f0-9]{4}": [("it is beef", "BEEF", True, "beef", "last match")],
    "math": [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", True, r"\frac{1}{2}", "math-verify"),
        (r"$\{2, 1\}$", r"\{1, 2\}", True, None, "math-verify"),
        (r"$x = 5$", "5", True, None, "math-verify"),
        (r"\boxed{7}", "8", False, "7", "math-verify"),
        ("I do not know.", "8", False, None, "no expression"),
    ],
    "ifeval": [
        ("An oak.", _INSTRUCTIONS, True, "2 of 2", "instructions followed"),
        ("An oak, a beech.", _INSTRUCTIONS, False, "1 of 2", "instructions followed"),
        ("", _INSTRUCTIONS, False, "0 of 2", "instructions followed"),
    ],
}
NEEDS_MATH = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason='needs math-verify: pip install "racdeploy[math]"',
)
NEEDS_HARNESS = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason='needs lm-eval: pip install "racdeploy[ifeval]"; python -m nltk.downloader punkt_tab',
)
MARKS = {"math": NEEDS_MATH, "ifeval": NEEDS_HARNESS}
WITH_ALL = [pytest.param(scorer, marks=MARKS.get(scorer, ())) for scorer in CASES]


def test_every_scorer_has_cases() -> None:
    """A new scorer is tested here before it is used."""
    assert {spec.partition(":")[0] for spec in CASES} == set(plugins.list_names("scorers"))


@pytest.mark.parametrize("spec", WITH_ALL)
def test_scorers_find_what_models_write(spec: str) -> None:
    """Right or wrong, what was compared, and where it was found; the same twice."""
    scoring.check(spec)
    for answer, gold, right, extracted, how in CASES[spec]:
        found = scoring.score(spec, answer, gold)
        assert (found.correct, found.extractor) == (right, how), answer
        if extracted is not None or not right:
            assert found.extracted == extracted, answer
        assert found == scoring.score(spec, answer, gold)


@pytest.mark.parametrize("spec", WITH_ALL)
@pytest.mark.parametrize(
    "answer", ["", " ", "\\boxed{", "}" * 3000, "\x00\ud800", "9" * 5000, "((((" * 500]
)
def test_no_text_of_a_model_raises_or_scores(spec: str, answer: str) -> None:
    """Whatever it writes, it is an answer that is wrong."""
    gold = CASES[spec][0][1] if spec.startswith("gym:") else "42"  # an item knows its own
    assert not scoring.score(spec, answer.encode("utf-8", "replace").decode(), gold).correct


@pytest.mark.parametrize(
    ("spec", "code", "values"),
    [
        ("boxd", "unknown-plugin", ["'boxd'", "'boxed'"]),
        ("boxed:3", "takes-no-argument", ["boxed"]),
        ("math:3", "takes-no-argument", ["math"]),
        ("ifeval:3", "takes-no-argument", ["ifeval"]),
        ("regex", "regex-matches-empty", []),
        ("regex:(", "invalid-regex", ["'('"]),
        ("regex:x*", "regex-matches-empty", ["'x*'"]),
    ],
)
def test_a_wrong_scorer_is_refused_with_its_line(
    tmp_path: Path, spec: str, code: str, values: list[str]
) -> None:
    """By itself, and in a problem file before any work."""
    with raises(code, *values):
        scoring.check(spec)
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "?", "answer": "42", "scorer": "%s"}\n' % spec)  # noqa: UP031 - braces
    with raises(code, "problems.jsonl:1", *values):
        tasks.load(f"jsonl:{file}")


def test_a_row_chooses_its_scorer(tmp_path: Path) -> None:
    """The others keep the default."""
    file = tmp_path / "problems.jsonl"
    file.write_text(
        '{"question": "a?", "answer": "B", "scorer": "choice"}\n{"question": "b?", "answer": "4"}\n'
    )
    assert [problem.scorer for problem in tasks.load(f"jsonl:{file}").pool] == ["choice", ""]
    file.write_text('{"question": "a?", "answer": "B", "scorer": 3}\n')
    with raises("scorer-not-a-name", "problems.jsonl:1"):
        tasks.load(f"jsonl:{file}")


def test_math_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, with the command."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises("missing-extra", 'pip install "racdeploy[math]"'):
        math.check("")


@NEEDS_MATH
def test_an_answer_that_takes_too_long_is_wrong_and_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process is ended, the record says so, and the next question has a new one."""
    assert scoring.score("math", r"\boxed{5}", "5").correct
    with monkeypatch.context() as patch:
        patch.setattr(math, "SECONDS", 0.2)
        slow = scoring.score("math", r"\boxed{9^{9^{9^{9}}}}", "7")
    assert slow == AnswerScore(
        False, None, "scorer 'math' failed: it took more than 0.2 s of processor time"
    )
    assert scoring.score("math", r"\boxed{6}", "6").correct


def test_an_unknown_scorer_is_no_scorer() -> None:
    """Scoring by a name that does not exist is an error, not a wrong answer."""
    with raises("unknown-plugin", "'nothing'"):
        scoring.score("nothing", "42", "42")
