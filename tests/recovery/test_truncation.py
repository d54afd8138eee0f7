"""Own answers are cut where they leave the dense model's path for good, and only there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recovery.divergence import LMHead
from racdeploy.recovery.on_policy import (
    MIN_LIKELY_SHARE,
    TOP_K,
    WINDOW_TOKENS,
    find_length,
    find_likely_tokens,
    truncate_answers,
)
from racdeploy.recovery.training_batches import dense_states
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import make_trace

CPU = torch.device("cpu")


def slow_end(on: list[bool]) -> int:
    """The last place where a stretch that ends there is good, by trying all."""
    stretch = min(WINDOW_TOKENS, len(on))
    for end in range(len(on), stretch - 1, -1):
        if on and sum(on[end - stretch : end]) >= MIN_LIKELY_SHARE * stretch:
            return end
    return 0


def test_what_strays_and_comes_back_is_whole() -> None:
    """Only the end decides."""
    assert find_length([True] * 40 + [False] * 60 + [True] * 40) == 140
    assert find_length([]) == 0
    assert find_length([True] * 5) == 5


def test_what_never_comes_back_ends_with_its_last_good_stretch() -> None:
    """A quarter of that stretch may be off the path already."""
    assert find_length([True] * 100 + [False] * 100) == 100 + WINDOW_TOKENS // 4
    assert find_length([False] * 100) == 0


def test_ends_are_those_of_a_slow_search() -> None:
    """On random answers of every length."""
    generator = torch.Generator().manual_seed(0)
    for length in range(120):
        for share in (0.3, 0.6, 0.75, 0.9):
            on = (torch.rand(length, generator=generator) < share).tolist()
            assert find_length(on) == slow_end(on), (length, share)


def test_tokens_are_ranked_as_the_dense_model_ranks_them(tmp_path: Path) -> None:
    """By the logits that transformers gives before each completion token."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", dtype="float32"))
    traces = [make_trace(i, 4, 20 + i, 3) for i in range(3)]
    head = LMHead.from_checkpoint(checkpoint, CPU)
    model = load_model(checkpoint)

    found: list[bool] = []
    expected: list[bool] = []

    with dense_states(checkpoint, traces, tmp_path, "own", device=CPU) as states:
        for place, trace in enumerate(traces):
            found += find_likely_tokens(head, states[place], trace)
            with torch.inference_mode():
                logits_TV = model(input_ids=torch.tensor([trace.ids])).logits[0]
            ranks = logits_TV.argsort(dim=1, descending=True).argsort(dim=1)
            begin = len(trace.prompt_ids)
            for offset, token in enumerate(trace.completion_ids):
                expected.append(bool(ranks[begin + offset - 1, token] < TOP_K))

    assert found == expected
    assert any(expected)
    assert not all(expected)


def test_a_cut_answer_has_no_end(tmp_path: Path) -> None:
    """Random text is on no model's path: nothing stays, and what is left is not right."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", dtype="float32"))
    trace = replace(make_trace(1, 4, 60, 3), correct=True)
    with dense_states(checkpoint, [trace], tmp_path, "own", device=CPU) as states:
        (cut,) = truncate_answers(LMHead.from_checkpoint(checkpoint, CPU), states, [trace])
    assert cut.completion_ids == ()
    assert cut.answer_from is None
    assert cut.truncated
    assert not cut.correct
