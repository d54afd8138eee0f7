"""AIME 2024: 30 problems of the American Invitational Mathematics Examination, answers 0 to 999.

The prompt is lighteval 0.13.0's ``aime24``. The scorer takes the last box, as lighteval does, or
else the last number. Source of the mean thinking length: arXiv 2505.15612, table 4.
"""

from racdeploy.tasks import HubSplit, PublicDataset
from racdeploy.tasks.prompts import make_contest_problem

DATASET = PublicDataset(
    title="AIME 2024",
    evaluation=HubSplit(
        "HuggingFaceH4/aime_2024", "default", "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
    ),
    columns=("problem", "answer"),
    protocol="lighteval 0.13.0 (aime24)",
    thinking_tokens=13400,
)
make_problem = make_contest_problem
