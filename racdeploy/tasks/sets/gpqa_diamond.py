"""GPQA Diamond: 198 questions of graduate-level science with four options; the answer is a letter.

The prompt is lighteval 0.13.0's ``gpqa:diamond``. lighteval draws the position of the right option
in every run; here the question's text decides it. Source: arXiv 2311.12022; mean thinking length:
arXiv 2505.15612, figure 2, of DeepSeek-R1-Distill-Qwen-1.5B on GPQA.
"""

from __future__ import annotations

from random import Random

from racdeploy.tasks import HubSplit, Problem, PublicDataset, Row
from racdeploy.tasks.prompts import make_choice_problem

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
DATASET = PublicDataset(
    title="GPQA Diamond",
    evaluation=HubSplit(
        "Idavidrein/gpqa", "gpqa_diamond", "train", "633f5ee89ab8ad4522a9f850766b73f62147ffdd"
    ),
    columns=("Question", "Correct Answer", *_WRONG),
    protocol="lighteval 0.13.0 (gpqa:diamond)",
    thinking_tokens=11200,
    caution="its authors ask not to publish the questions; a bundle's records hold them",
)


def make_problem(row: Row) -> Problem:
    """Make a problem; the position of the right option depends on the question alone."""
    question = row["Question"].strip()
    options = [row[column].strip() for column in _WRONG]

    index = Random(question).randint(0, len(options))
    options.insert(index, row["Correct Answer"].strip())

    # Options are listed as in lighteval.
    listed = "\n".join(
        f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=True)
    )
    return make_choice_problem(f"{question}\n\n{listed}", "ABCD", "ABCD"[index])
