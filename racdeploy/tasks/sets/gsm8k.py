"""GSM8K: word problems of grade school, a whole number after ``####`` in the published answer.

The prompt is lm-evaluation-harness 0.4.13's ``gsm8k_cot_zeroshot``. Like its ``flexible-extract``,
the scorer takes the last number without thousands separators, but it looks for a box and for
``####`` first, and compares values, so that 42.00 is 42. benchmarks/RESULTS-archive.md lists all
differences from that harness and from lighteval over 200 answers. Source: arXiv 2110.14168; mean
thinking length: github.com/Muqi1029/NoThink-project.
"""

from __future__ import annotations

from racdeploy.errors import UsageError
from racdeploy.tasks import HubSplit, Problem, PublicDataset, Row
from racdeploy.tasks.extraction import extract_hash_mark

_REVISION = "740312add88f781978c0658806c59bc2815b9866"
DATASET = PublicDataset(
    title="GSM8K",
    evaluation=HubSplit("openai/gsm8k", "main", "test", _REVISION),
    calibration=HubSplit("openai/gsm8k", "main", "train", _REVISION),
    columns=("question", "answer"),
    protocol="lm-evaluation-harness 0.4.13 (gsm8k_cot_zeroshot, flexible-extract)",
    thinking_tokens=2500,
)


def make_problem(row: Row) -> Problem:
    """Make a problem; the gold answer follows ``####``."""
    gold = extract_hash_mark(row["answer"])
    if gold is None:
        raise UsageError("no-final-answer", "the answer has no '#### ' with the number after it")

    question = f"Q: {row['question']}\nA: Let's think step by step."
    return Problem(question, gold=gold)
