"""IFEval: 541 prompts with instructions that a program can check, such as "in at most 50 words".

The prompt is the published one alone, as in lm-evaluation-harness 0.4.13's ``ifeval``; the score is
its ``prompt_level_strict_acc``, computed by its own code. Source: arXiv 2311.07911.
"""

from __future__ import annotations

import json

from racdeploy.tasks import Problem
from racdeploy.tasks.published import HubSplit, Published
from racdeploy.tasks.rows import Row

SET = Published(
    title="IFEval",
    evaluation=HubSplit(
        "google/IFEval", "default", "train", "966cd89545d6b6acfd7638bc708b98261ca58e84"
    ),
    calibration=None,
    columns=("prompt", "instruction_id_list", "kwargs"),
    follows="lm-evaluation-harness 0.4.13 (ifeval, prompt_level_strict_acc)",
)


def ask(row: Row) -> Problem:
    """Ask one prompt; its gold answer lists the instructions."""
    asked = {column: row[column] for column in SET.columns}
    return Problem(row["prompt"], gold=json.dumps(asked, ensure_ascii=False), scorer="ifeval")
