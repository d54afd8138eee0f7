"""A search for the best model of a small computer: 22 candidates of a model of 135M parameters."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from racdeploy.results.tuning import (
    Candidate,
    Constraints,
    CostEstimate,
    DeviceRow,
    Estimate,
    ShareEstimate,
    Tuning,
)

# Name, kind, quant, MB, tokens/s, share right, thinking tokens, prompts, why it went no further.
_ANSWERED = """
Q8_0            | dense  | q8_0   | 145.0 | 18.2 | 0.880  | 118.0 | 400 |
Q6_K            | dense  | q6_k   | 125.0 | 17.0 | 0.878  | 119.0 | 200 | as good, and larger
Q4_0            | dense  | q4_0   | 96.4  | 25.1 | 0.868  | 121.0 | 400 |
Q4_K_M          | dense  | q4_k_m | 105.0 | 20.3 | 0.872  | 120.0 | 200 | slower than Q4_0
Q3_K            | dense  | q3_k   | 84.1  | 15.2 | 0.835  | 131.0 | 120 | surely worse
Q3_K codes      | dense  | q3_k   | 84.1  | 15.2 | 0.851  | 126.0 | 120 | surely worse
Q2_K codes      | dense  | q2_k   | 73.0  | 14.9 | 0.612  | 188.0 | 60  | surely worse
50% Q4_0 codes  | pruned | q4_0   | 82.9  | 27.4 | 0.890  | 117.5 | 400 |
50% Q8_0        | pruned | q8_0   | 113.0 | 24.6 | 0.885  | 118.3 | 200 | larger than 50% Q4_0 joint
2:4 Q4_0 codes  | pruned | q4_0   | 82.9  | 29.0 | 0.862  | 125.1 | 400 |
60% Q4_0 codes  | pruned | q4_0   | 77.2  | 30.2 | 0.845  | 131.0 | 120 | surely worse
ffn 75% Q4_0    | pruned | q4_0   | 81.0  | 31.7 | 0.801  | 140.2 | 60  | surely worse
mix at 3.4 bits | pruned | q4_0   | 85.9  | 26.8 | 0.8875 | 117.9 | 400 |
"""
# Name, kind, quant, MB, tokens/s, KL, stage, why it went no further.
_OTHERS = """
F16             | dense  | f16  | 270.9 | 9.8  |      | counted  | 271 MB are above 100 MB
Q5_0            | dense  | q5_0 | 112.1 | 19.9 |      | counted  | 112 MB are above 100 MB
70% Q8_0        | pruned | q8_0 | 92.2  | 29.9 |      | counted  | 3.1 times the least error
70% Q4_0        | pruned | q4_0 | 71.0  | 33.0 |      | counted  | 2.7 times the least error
heads 75% Q4_0  | pruned | q4_0 | 88.4  | 27.7 |      | counted  | 2.4 times the least error
Q2_K            | dense  | q2_k | 73.0  | 14.9 | 1.84 | compared | 3.9 times the least KL
50% Q3_K codes  | pruned | q3_k | 71.4  | 14.1 | 0.71 | compared | 14.1 tokens/s, below 15
Q4_0 codes      | dense  | q4_0 | 96.4  | 25.1 | 0.21 | compared | Q4_0 is as near
vocabulary 16k  | pruned | q4_0 | 78.3  | 28.8 | 0.52 | compared | 2.1 times the least KL
"""
_SETTINGS: dict[str, dict[str, Any]] = {
    "50%": {"prune.sparsity": 0.5, "export.packing": "bitmask"},
    "60%": {"prune.sparsity": 0.6, "export.packing": "bitmask"},
    "70%": {"prune.sparsity": 0.7},
    "2:4": {"prune.pattern": "2:4", "export.packing": "bitmask"},
    "codes": {"export.rounding": "optimized"},
    "ffn": {"structure.keep": {"ffn": 0.75}, "recover.tokens": 400_000},
    "heads": {"structure.keep": {"heads": 0.75}},
    "vocabulary": {"structure.keep": {"vocabulary": 16384}},
    "mix": {"prune.sparsity": 0.5, "export.tensors": {r"attn_v\.weight$": "q5_0"}},
}
"""What a word in a name asks for."""
_VERIFIED = ("50% Q4_0 codes", "Q4_0")


def build_tuning() -> Tuning:
    """Return a search that a pruned model wins, with a dense model beside it."""
    candidates = [_answered(*row) for row in _split(_ANSWERED)]
    candidates += [_other(*row) for row in _split(_OTHERS)]
    return Tuning(
        racdeploy="0.1.0",
        created=datetime(2026, 11, 27, 12, 0, tzinfo=UTC),
        model="SmolLM2-135M-reasoner",
        target="raspberry-pi5",
        tasks=("column_sums", "gsm8k:test.jsonl"),
        recipe={
            "model": "SmolLM2-135M-reasoner",
            "target": "raspberry-pi-5",
            "tasks": ["column_sums", "gsm8k:test.jsonl"],
            "traces": {"max_new_tokens": 400},
            "prune": {"sparsity": 0.5},
            "export": {
                "quant": "q4_0",
                "packing": "bitmask",
                "rounding": "optimized",
                "tensors": {r"attn_v\.weight$": "q5_0"},
            },
        },
        constraints=Constraints(
            objective="seconds-per-correct-answer",
            max_bytes=100_000_000,
            max_memory_bytes=400_000_000,
            min_tokens_per_s=15.0,
            min_accuracy_ratio=0.95,
            budget_s=5400.0,
        ),
        device=DeviceRow(
            name="Raspberry Pi 5, 8 GB",
            measured=False,
            source="11.4 GB/s by published figures",
            cores=4,
        ),
        candidates=tuple(candidates),
        winner="50% Q4_0 codes",
        rival="Q4_0",
        reference="Q8_0",
        verdict="50% Q4_0 codes wins: 5.31 seconds for each right answer on Raspberry Pi 5, 8 GB, "
        "13 % fewer than Q4_0, the best dense model, with 14 % fewer bytes and 2.2 points more "
        "right answers (90 % interval −0.4 to 4.7).",
        gain=Estimate(value=0.022, lower=-0.004, upper=0.047),
        notes=("2 candidates were not tried, for want of time: raise --budget",),
        seconds={
            "traces": 412.0,
            "measure": 38.0,
            "compare": 610.0,
            "race": 1490.0,
            "verify": 1104.0,
        },
        bundle="SmolLM2-135M-reasoner-raspberry-pi5",
    )


def _split(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def _answered(
    name: str,
    kind: str,
    quant: str,
    megabytes: str,
    tokens_per_s: str,
    right: str,
    thinking: str,
    prompts: str,
    why: str,
) -> Candidate:
    share, count, tokens = float(right), int(prompts), float(thinking)
    half = 1.96 * (share * (1 - share) / count) ** 0.5
    seconds = (tokens + 12) / float(tokens_per_s) / share
    measured = 6.1 * float(tokens_per_s) if name in _VERIFIED else None

    return _counted(name, kind, quant, megabytes, tokens_per_s).model_copy(
        update={
            "reached": "verified" if name in _VERIFIED else "raced",
            "reason": why,
            "size_measured": True,
            "measured_tokens_per_s": measured,
            "kl_nats": 0.2,
            "prompts": count,
            "correct": round(share * count),
            "accuracy": ShareEstimate(
                value=share, lower=share - half, upper=min(1.0, share + half)
            ),
            "thinking_tokens_mean": tokens,
            "seconds_per_correct": CostEstimate(
                value=seconds,
                lower=seconds * (1 - half / share),
                upper=seconds * (1 + half / share),
            ),
        }
    )


def _other(
    name: str,
    kind: str,
    quant: str,
    megabytes: str,
    tokens_per_s: str,
    kl_nats: str,
    reached: str,
    why: str,
) -> Candidate:
    return _counted(name, kind, quant, megabytes, tokens_per_s).model_copy(
        update={
            "reached": reached,
            "reason": why,
            "kl_nats": float(kl_nats) if kl_nats else None,
        }
    )


def _counted(name: str, kind: str, quant: str, megabytes: str, tokens_per_s: str) -> Candidate:
    """Return a candidate as the first stage leaves it."""
    settings: dict[str, Any] = {"export.quant": quant}
    for word in name.split():
        settings |= _SETTINGS.get(word, {})

    size_bytes = round(float(megabytes) * 1e6)
    speed = float(tokens_per_s)
    return Candidate(
        name=name,
        dense=kind == "dense",
        settings=settings,
        reached="counted",
        size_bytes=size_bytes,
        memory_bytes=round(1.1 * size_bytes) + 60_000_000,
        tokens_per_s=speed,
        meets_limits=size_bytes <= 100_000_000 and speed >= 15,
    )
