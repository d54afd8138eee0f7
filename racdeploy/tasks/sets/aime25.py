"""AIME 2025: 30 problems of the American Invitational Mathematics Examination, answers 0 to 999.

The prompt is lighteval 0.13.0's ``aime25``. The score takes the last box as lighteval does, then
the last number. The mean length of thoughts is the one of AIME 2024: arXiv 2505.15612, table 4.
"""

from __future__ import annotations

from racdeploy.tasks.prompts import ask_contest
from racdeploy.tasks.published import HubSplit, Published

SET = Published(
    title="AIME 2025",
    evaluation=HubSplit(
        "yentinglin/aime_2025", "default", "train", "6f71d77b0b89b9dabe07ab466c51df33f514df7f"
    ),
    calibration=None,
    columns=("problem", "answer"),
    follows="lighteval 0.13.0 (aime25)",
    thinking_tokens=13400,
)
ask = ask_contest
