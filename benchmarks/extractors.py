r"""Do lm-evaluation-harness and lighteval find the same answers to GSM8K as racdeploy does?

    pip install lm_eval==0.4.13 lighteval==0.13.0
    python -m benchmarks.extractors --record tests/tasks/gsm8k_answers.jsonl
    python -m benchmarks.extractors --answers answers.jsonl --record tests/tasks/gsm8k_model.jsonl

Writes 40 forms of answers for five questions, or takes what a model answered
(benchmarks/gsm8k_answers.py), and scores each answer three times: with the filter and metric of
lm-evaluation-harness's ``gsm8k_cot_zeroshot`` (flexible-extract), with those of lighteval's
``gsm8k`` (``expr_gold_metric``), and with racdeploy's task. Prints the agreement, and each form on
which they differ. ``--record`` keeps the answers with all verdicts; a test scores them again
without either harness.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from racdeploy.tasks import scoring
from racdeploy.tasks.sets import gsm8k

_END = 70
PARTS = ((40, 2), (4, 3), (1200, 34), (69000, 1000), (150, 100))
"""Sums of two numbers are the gold answers."""

FORMS: Mapping[str, tuple[bool, str]] = {
    "box": (True, r"The answer is \boxed{N}."),
    "box in a sentence": (
        True,
        r"Therefore, the final answer is: $\boxed{N}$. I hope it is correct.",
    ),
    "box, amount": (True, r"She pays \boxed{\$N}."),
    "box, cents": (True, r"She pays $\boxed{N.00}$."),
    "box, separators": (True, r"\boxed{COMMAS}"),
    "box, LaTeX separators": (True, r"\boxed{BRACES}"),
    "box, unit": (True, r"\boxed{N\text{ apples}}"),
    "box, percent": (True, r"\boxed{N\%}"),
    "box, equation": (True, r"\boxed{x = N}"),
    "box, fraction": (True, r"\boxed{\frac{TWICE}{2}}"),
    "box, numbers after it": (True, r"\boxed{N}. Check: N - RIGHT = LEFT"),
    "two boxes, the second right": (True, r"\boxed{WRONG}, no: \boxed{N}"),
    "box that does not end": (True, r"The answer is \boxed{N"),
    "box, wrong": (False, r"The answer is \boxed{WRONG}."),
    "####": (True, "LEFT + RIGHT = N\n#### N"),
    "####, separators": (True, "#### COMMAS"),
    "####, amount": (True, "#### $N"),
    "####, unit": (True, "#### N apples"),
    "####, numbers after it": (True, "#### N\n(LEFT and RIGHT)"),
    "####, wrong": (False, "N is too many.\n#### WRONG"),
    "sentence": (True, "The answer is N."),
    "sentence, amount": (True, "The answer is $COMMAS."),
    "sentence, cents": (True, "The answer is $N.00."),
    "sentence, euros": (True, "He has COMMAS€ left."),
    "sentence, unit": (True, "They need N kilograms of flour."),
    "sentence, unit without a space": (True, "They need Nkg."),
    "sentence, percent": (True, "That is N%."),
    "sentence, percent in words": (True, "That is N percent."),
    "sentence, numbers after it": (True, "The answer is N, which is LEFT and RIGHT."),
    "sentence, wrong": (False, "Not N; the answer is WRONG."),
    "sentence, more digits": (False, "The answer is N.5."),
    "sentence, negative": (False, "The answer is -N."),
    "sentence, two numbers": (False, "It is N or WRONG."),
    "bold": (True, "**Answer:** N"),
    "bold number": (True, "The answer is **COMMAS**"),
    "sum": (True, "LEFT + RIGHT = N"),
    "dots": (True, "So it is N..."),
    "number alone": (True, "N"),
    "no number": (False, "I do not know."),
    "nothing": (False, ""),
}
"""By name: whether a person would call it right, and the answer."""


def make_answers() -> list[dict[str, object]]:
    """Return each form for each gold answer, with a solution as GSM8K publishes them."""
    answers: list[dict[str, object]] = []
    for form, (right, text) in FORMS.items():
        for left, second in PARTS:
            gold = left + second
            words = {
                "BRACES": f"{gold:,}".replace(",", "{,}"),
                "COMMAS": f"{gold:,}",
                "WRONG": str(gold + 3),
                "TWICE": str(2 * gold),
                "LEFT": str(left),
                "RIGHT": str(second),
                "N": str(gold),
            }
            answer = text
            for word, value in words.items():
                answer = answer.replace(word, value)

            solution = (
                f"Both are {left} + {second} = <<{left}+{second}={gold}>>{gold}.\n#### {gold}"
            )
            answers.append({"form": form, "solution": solution, "answer": answer, "right": right})

    return answers


def read_answers(file: Path) -> list[dict[str, object]]:
    """Return a model's answers, with what racdeploy finds in each."""
    answers: list[dict[str, object]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        problem = gsm8k.make_problem({"question": "?", "answer": f"#### {row['gold']}"})
        found = scoring.score(problem.scorer, row["answer"], problem.gold)
        answers.append(row | {"found": found.extracted, "how": found.extractor})
    return answers


def score_ours(answer: str, solution: str) -> bool:
    """Score as a build and a verification do."""
    problem = gsm8k.make_problem({"question": "?", "answer": solution})
    return scoring.score(problem.scorer, answer, problem.gold).correct


def score_lm_eval(answer: str, solution: str) -> bool:
    """Score with lm-evaluation-harness's filter and metric, set as in ``gsm8k_cot_zeroshot``."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    flexible = RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    ((found,),) = flexible.apply([[answer]], [{}])
    score = exact_match_hf_evaluate(
        predictions=[found],
        references=[solution],
        regexes_to_ignore=[",", r"\$", "(?s).*#### ", r"\.$"],
        ignore_case=True,
        ignore_punctuation=False,
    )
    return bool(score["exact_match"] == 1)


def score_lighteval(answer: str, solution: str) -> bool:
    """Score with lighteval's metric, set up as its ``expr_gold_metric``."""
    from lighteval.metrics.dynamic_metrics import (
        ExprExtractionConfig,
        LatexExtractionConfig,
        MultilingualExtractiveMatchMetric,
    )
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    metric = MultilingualExtractiveMatchMetric(
        fallback_mode="first_match",
        precision=5,
        gold_extraction_target=(ExprExtractionConfig(),),
        pred_extraction_target=(
            ExprExtractionConfig(),
            LatexExtractionConfig(boxed_match_priority=0),
        ),
        aggregation_function=max,
    )
    doc = Doc(query="", choices=[f" {solution}"], gold_index=0)
    return bool(metric.compute(doc, ModelResponse(text=[answer])) == 1)


SCORERS: Mapping[str, Callable[[str, str], bool]] = {
    "racdeploy": score_ours,
    "lm_eval": score_lm_eval,
    "lighteval": score_lighteval,
}


def main() -> None:
    """Score every answer three times, print where they differ, and keep the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, help="what a model answered, in place of the forms")
    parser.add_argument("--record", type=Path, help="write the answers with their verdicts here")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # lighteval warns of each answer without a number

    if arguments.answers:
        answers = read_answers(arguments.answers)
        compare_found(answers)
    else:
        answers = make_answers()
        for row in answers:
            answer, solution = str(row["answer"]), str(row["solution"])
            row |= {name: score(answer, solution) for name, score in SCORERS.items()}
        print_agreement(answers, ("lm_eval", "lighteval", "right"))
        print_differences(answers)

    if arguments.record:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answers]
        arguments.record.write_text("".join(lines), encoding="utf-8")


def print_agreement(answers: Sequence[Mapping[str, object]], judges: Sequence[str]) -> None:
    """Print how often racdeploy and another judge say the same."""
    for name in judges:
        same = sum(row["racdeploy"] == row[name] for row in answers)
        print(f"racdeploy as {name}: {same} of {len(answers)}")


def compare_found(answers: Sequence[dict[str, object]]) -> None:
    """Score a model's answers, and ask each harness whether it finds the answer that we find.

    A weak model is wrong whatever is found. So what racdeploy finds is given to the harnesses as
    the gold answer, too: ``lm_eval_same`` and ``lighteval_same`` say whether they find it.
    """
    for row in answers:
        answer = str(row["answer"])
        row |= {name: score(answer, f"#### {row['gold']}") for name, score in SCORERS.items()}
        for name in ("lm_eval", "lighteval"):
            # Where there is no number, there is nothing to be found.
            is_empty = row["found"] is None
            row[f"{name}_same"] = is_empty or SCORERS[name](answer, f"#### {row['found']}")

    print_agreement(answers, ("lm_eval", "lighteval"))
    print(f"right: {sum(bool(row['racdeploy']) for row in answers)}")
    print(f"without a number: {sum(row['found'] is None for row in answers)}")
    for name in ("lm_eval", "lighteval"):
        same = sum(bool(row[f"{name}_same"]) for row in answers)
        print(f"{name} finds what racdeploy finds: {same} of {len(answers)}")

    print("\n| question | racdeploy finds | lm_eval | lighteval | the answer ends |")
    print("|---|---|---|---|---|")
    for row in answers:
        same_by = [bool(row[f"{name}_same"]) for name in ("lm_eval", "lighteval")]
        if not all(same_by):
            words = " | ".join("the same" if each else "another" for each in same_by)
            end = str(row["answer"])[-_END:].replace("\n", " ⏎ ").replace("|", "\\|")
            print(f"| {row['index']} | {row['found']} ({row['how']}) | {words} | `…{end}` |")


def print_differences(answers: Sequence[Mapping[str, object]]) -> None:
    """Print a table of the forms on which any two differ: how many of five each calls right."""
    print("\n| form | example | a person | racdeploy | lm_eval | lighteval |")
    print("|---|---|---|---|---|---|")
    for form in FORMS:
        rows = [row for row in answers if row["form"] == form]
        names = ("right", *SCORERS)
        right = Counter({name: sum(bool(row[name]) for row in rows) for name in names})
        if len(set(right.values())) > 1:
            example = str(rows[2]["answer"]).replace("\n", " ⏎ ")
            print(f"| {form} | `{example}` | {' | '.join(str(right[name]) for name in names)} |")


if __name__ == "__main__":
    main()
