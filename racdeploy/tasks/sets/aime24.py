"""AIME 2024: 30 problems of the American Invitational Mathematics Examination, answers 0 to 999.

The prompt is lighteval 0.13.0's ``aime24``. The score takes the last box as lighteval does, then
the last number. The mean length of thoughts is arXiv 2505.15612's, table 4.
"""

from __future__ import annotations

from racdeploy.tasks.prompts import ask_contest
from racdeploy.tasks.published import HubSplit, Published

SET = Published(
    title="AIME 2024",
    evaluation=HubSplit(
        "HuggingFaceH4/aime_2024", "default", "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
    ),
    calibration=None,
    columns=("problem", "answer"),
    follows="lighteval 0.13.0 (aime24)",
    thinking_tokens=13400,
)
ask = ask_contest
