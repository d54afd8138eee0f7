"""One report and its records, with hostile text in every place where text comes from outside.

``python -m tests.support.sample_report`` writes tests/report/golden/report.md again.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

from racdeploy.report import markdown
from racdeploy.results.answers import AnswerRecord, ArmSummary, Comparison, RivalRow, TaskRow
from racdeploy.results.checks import CheckResult
from racdeploy.results.pruning import BlockRow, LinearRow, RecoveryRow, TensorRow
from racdeploy.results.report import Report

GOLDEN = Path(__file__).parents[1] / "report" / "golden" / "report.md"
HOSTILE = (
    "<script>alert(1)</script> | `pipe` \x1b[31m\n@octocat #12 https://example.org/x \u202eevil"
)


def arm(name: str, correct: int, **values: object) -> ArmSummary:
    share = correct / 256
    return ArmSummary(
        name=name,
        prompts=256,
        correct=correct,
        accuracy=share,
        accuracy_lower=max(0.0, share - 0.025),
        accuracy_upper=min(1.0, share + 0.015),
        **values,
    )


def build_report() -> Report:
    """Return a passing report whose names, notes and reasons try to break every output."""
    kinds = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    linears = [
        LinearRow(
            name=f"model.layers.{block}.{kind}",
            requested_sparsity=0.5,
            actual_sparsity=0.4375 if (block, i) == (3, 6) else 0.5,
            held_out_error=0.01 + 0.002 * block + 0.004 * i,
            damping=0.01,
        )
        for block in range(12)
        for i, kind in enumerate(kinds)
    ]
    tensors = [
        TensorRow(
            name="token_embd.weight",
            requested_quant="Q8_0",
            actual_quant="Q8_0",
            zeros=0,
            size_bytes=900,
        ),
        *(
            TensorRow(
                name=f"blk.{i}.attn_norm.weight",
                requested_quant="Q8_0",
                actual_quant="F32",
                zeros=0,
                size_bytes=1024,
                reason="one-dimensional",
            )
            for i in range(12)
        ),
        TensorRow(
            name=HOSTILE,
            requested_quant="Q4_K",
            actual_quant="Q8_0",
            zeros=0.5,
            size_bytes=7,
            reason=HOSTILE,
        ),
    ]
    return Report(
        created=datetime(2026, 11, 24, 12, 30, tzinfo=UTC),
        model="tiny-reasoner",
        target="gguf",
        recipe={"prune": {"method": "sparsegpt", "sparsity": 0.5}},
        arms=(
            arm(
                "dense",
                252,
                thinking_tokens_mean=143.7,
                answer_tokens_mean=9,
                size_bytes=14_200_000,
                tokens_per_s=812.4,
                quant="F16",
                sparsity=0.0,
            ),
            arm(
                "pruned",
                250,
                thinking_tokens_mean=144.1,
                answer_tokens_mean=9,
                unclosed=1,
                forced=2,
                truncated=1,
                size_bytes=5_310_000,
                tokens_per_s=1204.6,
                quant="Q8_0",
                sparsity=0.5,
            ),
            arm(
                "dense q4_k",
                249,
                thinking_tokens_mean=150.2,
                size_bytes=5_300_000,
                tokens_per_s=1150.0,
                quant="Q4_K",
            ),
            arm(
                "dense q2_k",
                231,
                thinking_tokens_mean=158.9,
                size_bytes=3_900_000,
                tokens_per_s=1100.0,
                quant="Q2_K",
            ),
        ),
        tasks=(
            TaskRow(task="word_problem", prompts=156, dense_correct=154, pruned_correct=153),
            TaskRow(task="jsonl:" + HOSTILE, prompts=100, dense_correct=98, pruned_correct=97),
        ),
        comparison=Comparison(
            drop=0.0078,
            drop_lower=-0.0065,
            drop_upper=0.0262,
            verdict="pass",
            margin=0.05,
            n10=4,
            n01=2,
            n=256,
            length_ratio=1.003,
            length_lower=0.97,
            length_upper=1.04,
            length_limit=1.2,
            length_budget_tokens=512,
        ),
        rivals=(
            RivalRow(
                name="dense q4_k",
                gain=-0.0039,
                gain_lower=-0.02,
                gain_upper=0.012,
                length_ratio=1.042,
                length_lower=1.01,
                length_upper=1.08,
            ),
            RivalRow(
                name="dense q2_k",
                gain=-0.0742,
                gain_lower=-0.11,
                gain_upper=-0.04,
                length_ratio=1.103,
                length_lower=1.06,
                length_upper=1.15,
            ),
        ),
        checks=(
            CheckResult(
                name="accuracy",
                verdict="pass",
                summary="drop 0.8 points, at most 2.6 | margin 5.0",
                figures={"drop": 0.0078, "n": 256, "method": "tango"},
            ),
            CheckResult(
                name="thinking", verdict="pass", summary="ratio 1.00, at most 1.04; limit 1.20"
            ),
            CheckResult(
                name="speed",
                verdict="skipped",
                summary="no baseline artifact",
                remedy="give --baseline <folder>",
            ),
        ),
        linears=tuple(linears),
        blocks=tuple(
            BlockRow(
                block=block,
                drift=0.001 * block,
                drift_by_segment={"prompt": 0.001, "thinking": 0.002 * block},
                drift_by_task={"word_problem": 0.003, "jsonl:" + HOSTILE: 0.02},
            )
            for block in range(12)
        ),
        recovery=(
            RecoveryRow(phase="start", tokens=0, kl_nats=0.912, accuracy=0.5),
            RecoveryRow(phase="full", tokens=200_000, loss=0.4, kl_nats=0.21),
            RecoveryRow(phase="full", tokens=400_000, loss=0.2, kl_nats=0.03456, accuracy=0.9375),
            RecoveryRow(
                phase="own answers 1", tokens=450_000, loss=0.3, kl_nats=0.0512, kept=False
            ),
        ),
        tensors=tuple(tensors),
        notes=("Both arms ran greedily on 2 threads.", HOSTILE),
        fingerprint={"llama_cpp": "0.3.36", "flash_attention": False},
    )


def build_records() -> list[AnswerRecord]:
    """Return 256 prompts for both arms; six of them discordant, some with hostile text."""
    generator = random.Random(4)
    records = []
    for prompt in range(256):
        hostile = HOSTILE if prompt == 19 else ""
        length = round(min(512, generator.gammavariate(9, 16)))
        for name in ("dense", "pruned"):
            own = (
                length if name == "dense" else round(min(512, length * generator.gauss(1.0, 0.08)))
            )
            own = 512 if (name, prompt) == ("pruned", 7) else own
            wrong = prompt in ((11, 40) if name == "dense" else (7, 19, 63, 200))
            records.append(
                AnswerRecord(
                    prompt=prompt,
                    task="gcd" if prompt % 10 == 0 else "word_problem",
                    question=f"Ann has {prompt} apples & gives 3 away. {hostile}",
                    gold=str(prompt - 3),
                    arm=name,
                    thinking_tokens=own,
                    answer_tokens=0 if own == 512 else 9,
                    state="open" if own == 512 else "closed",
                    finish_reason="length" if own == 512 else "stop",
                    correct=not wrong,
                    extracted=None if own == 512 else str(prompt - 3 + wrong),
                    answer_text="" if own == 512 else f"The answer is {prompt - 3 + wrong}.",
                    thinking_text=f"Start with {prompt}.\n{prompt}-3: step by step.\n"
                    * (1 + own // 60)
                    + hostile,
                )
            )
    return records


if __name__ == "__main__":
    GOLDEN.write_text(markdown.render(build_report(), build_records()), encoding="utf-8")
