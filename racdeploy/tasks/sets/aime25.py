"""AIME 2025: 30 problems of the American Invitational Mathematics Examination, answers 0 to 999.

The prompt is lighteval 0.13.0's ``aime25``. The scorer takes the last box, as lighteval does, or
else the last number. The mean thinking length is that of AIME 2024: arXiv 2505.15612, table 4.
"""

from racdeploy.tasks import HubSplit, PublicDataset
from racdeploy.tasks.prompts import make_contest_problem

DATASET = PublicDataset(
    title="AIME 2025",
    evaluation=HubSplit(
        "yentinglin/aime_2025", "default", "train", "6f71d77b0b89b9dabe07ab466c51df33f514df7f"
    ),
    columns=("problem", "answer"),
    protocol="lighteval 0.13.0 (aime25)",
    thinking_tokens=13400,
)
make_problem = make_contest_problem
