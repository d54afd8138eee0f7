"""GPQA Diamond: 198 questions of graduate-level science with four options; the answer is a letter.

The prompt is lighteval 0.13.0's ``gpqa:diamond``. lighteval draws the place of the right option
with every run; here a hash of the question decides it. Source: arXiv 2311.12022; the mean length of
thoughts is arXiv 2505.15612's, figure 2, of DeepSeek-R1-Distill-Qwen-1.5B on GPQA.
"""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem
from racdeploy.tasks.prompts import ask_choice
from racdeploy.tasks.published import HubSplit, Published
from racdeploy.tasks.rows import Row

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
SET = Published(
    title="GPQA Diamond",
    evaluation=HubSplit(
        "Idavidrein/gpqa", "gpqa_diamond", "train", "633f5ee89ab8ad4522a9f850766b73f62147ffdd"
    ),
    calibration=None,
    columns=("Question", "Correct Answer", *_WRONG),
    follows="lighteval 0.13.0 (gpqa:diamond)",
    thinking_tokens=11200,
    caution="its authors ask not to publish the questions; a bundle's records hold them",
)


def ask(row: Row) -> Problem:
    """Ask one question, the right option in a place that its text decides."""
    question = row["Question"].strip()
    options = [row[column].strip() for column in _WRONG]

    place = Random(question).randint(0, len(options))
    options.insert(place, row["Correct Answer"].strip())

    # Its options as lighteval lists them.
    listed = "\n".join(
        f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=True)
    )
    return ask_choice(f"{question}\n\n{listed}", "ABCD", "ABCD"[place])
