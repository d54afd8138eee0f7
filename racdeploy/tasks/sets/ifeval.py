"""IFEval: 541 prompts with instructions that a program can check, such as "in at most 50 words".

The prompt is the published one alone, as in lm-evaluation-harness 0.4.13's ``ifeval``; the score is
its ``prompt_level_strict_acc``, computed by its own code. Source: arXiv 2311.07911.
"""

from __future__ import annotations

import json

from racdeploy.tasks import HubSplit, Problem, PublicDataset, Row

DATASET = PublicDataset(
    title="IFEval",
    evaluation=HubSplit(
        "google/IFEval", "default", "train", "966cd89545d6b6acfd7638bc708b98261ca58e84"
    ),
    columns=("prompt", "instruction_id_list", "kwargs"),
    protocol="lm-evaluation-harness 0.4.13 (ifeval, prompt_level_strict_acc)",
)


def make_problem(row: Row) -> Problem:
    """Make a problem; its gold answer lists the instructions as JSON."""
    columns = {column: row[column] for column in DATASET.columns}
    return Problem(row["prompt"], gold=json.dumps(columns, ensure_ascii=False), scorer="ifeval")
