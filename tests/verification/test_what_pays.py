"""The arms of the comparison at equal bytes are as large as they say, and have the right rival."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks._arms import NARROW, WIDE, Arm
from benchmarks.what_pays import find_rival, seconds_per_right
from racdeploy import quant as quants
from racdeploy.verification.answer_sampler import SampledAnswers

ATTENTION = 0.25  # of a block's weights, in both models


@pytest.mark.parametrize("arm", [*WIDE, *NARROW], ids=lambda arm: arm.name)
def test_the_layout_of_a_format_gives_the_size_of_an_arm(arm: Arm) -> None:
    """Within 6 %; those of mixes and of codes packed as words are measured."""
    bits = quants.load(arm.quant).bits
    if "tensors" in str(arm.settings):
        return
    if arm.kind == "cut":
        share = float(arm.name.partition("ffn=")[2].split()[0])
        bits *= ATTENTION + (1 - ATTENTION) * share
    if arm.kind == "zeros" and arm.quant not in ("q4_0", "q5_0"):  # these are packed as words
        share = float(arm.name.split()[1]) / 100
        codes = {"q8_0": 8, "q3_k": 3, "f16": 16}[arm.quant]
        bits += 1 - codes * share
    elif arm.kind == "zeros":
        return
    assert bits == pytest.approx(arm.size, rel=0.06)


def _done(name: str, size: float, kl: float) -> SimpleNamespace:
    return SimpleNamespace(arm=Arm(size, name, ""), row=SimpleNamespace(kl=kl))


def test_the_rival_is_the_nearest_dense_arm_of_the_size_or_the_next_that_has_one() -> None:
    """Larger ones do not count where there is one; smaller ones never do."""
    rounded, optimized = _done("dense a", 3.5, 0.2), _done("dense b", 3.5, 0.1)
    larger, small = _done("dense c", 4.5, 0.0), _done("zeros", 3.0, 0.0)
    found = [rounded, optimized, larger, small]

    assert find_rival(small, found) is optimized  # type: ignore[arg-type, list-item]
    assert find_rival(rounded, found) is optimized  # type: ignore[arg-type, list-item]
    assert find_rival(optimized, found) is None  # type: ignore[arg-type, list-item]
    assert find_rival(larger, found) is None  # type: ignore[arg-type, list-item]


def test_seconds_for_a_right_answer_count_those_of_wrong_ones() -> None:
    """Half of four are right; each reads a token at one a second and writes two at two."""
    lengths = {"prompt_ids": (1,), "thinking_tokens": 1, "answer_tokens": 1}
    records = [SimpleNamespace(correct=right, **lengths) for right in (True, False, True, False)]
    answers = SampledAnswers(tuple(records), ())  # type: ignore[arg-type]
    speed = {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 2.0}
    middle, lower, upper = seconds_per_right(answers, speed)
    assert middle == 4.0
    assert lower < middle < upper
