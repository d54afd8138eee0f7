"""What is learned: states of the dense model as transformers has them, weights that fall on the
right token, and steps that use every trace alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.walk.activations import Activations
from racdeploy.recovery.examples import Example
from racdeploy.recovery.training_batches import TrainingBatches, dense_states, limit_to_disk
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import make_trace

CPU = torch.device("cpu")
TRACES = [make_trace(i, 3 + i % 4, 8 + 5 * (i % 3), 4) for i in range(9)]


@pytest.mark.parametrize("family", ["qwen3", "granite", "gemma3_text"])
def test_states_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    """To float32 rounding of four blocks: each trace alone in transformers, all batched here."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", family, dtype="float32"))
    model = load_model(checkpoint)

    with dense_states(checkpoint, TRACES, tmp_path, "x", device=CPU) as states:
        for place, trace in enumerate(TRACES):
            ids_1T = torch.tensor([trace.ids])
            with torch.inference_mode():
                expected = model.model(input_ids=ids_1T).last_hidden_state[0]  # type: ignore[operator,union-attr]
            assert torch.allclose(states[place], expected, rtol=1e-4, atol=1e-5)

    assert not [*tmp_path.glob("*.bin")]


def make_batches(tmp_path: Path) -> TrainingBatches:
    """Return batches whose states count the tokens."""
    states = Activations([(len(trace.ids), 2) for trace in TRACES], tmp_path / "states.bin")
    for place, trace in enumerate(TRACES):
        states[place] = torch.arange(2.0 * len(trace.ids)).view(-1, 2)
    return TrainingBatches([Example((trace,)) for trace in TRACES], states)


def test_a_state_is_weighed_as_the_token_it_says(tmp_path: Path) -> None:
    """The last prompt token says the first of the thinking; the last token says nothing."""
    batches = make_batches(tmp_path)
    example = batches.batch([0, 1])

    for row, trace in enumerate(TRACES[:2]):
        prompt, thinking = len(trace.prompt_ids), trace.thinking_tokens
        expected = [0.0] * (prompt - 1) + [1.0] * (thinking + 4) + [0.0]
        assert example.weight_BT[row].tolist()[: len(trace.ids)] == expected
        assert not example.weight_BT[row, len(trace.ids) :].any()
        assert example.ids_BT[row].tolist()[: len(trace.ids)] == list(trace.ids)
        learned = slice(prompt - 1, len(trace.ids) - 1)
        assert torch.equal(example.dense_BTD[row, learned], batches.states[row][learned])
        assert (example.token_BT[row] == -1).all(), "the dense model's distribution is learned"

    assert example.tokens == len(TRACES[0].ids) + len(TRACES[1].ids)


def test_answers_of_a_pair_are_in_one_batch(tmp_path: Path) -> None:
    """A preferred and a rejected answer learn tokens; the dense model may see another prompt."""
    pair = Example((TRACES[0], TRACES[4]))
    brief = Example((TRACES[1],), teacher_prompt_ids=(1, 2, 3, 4, 5, 6, 7, 8, 9))
    seen = [*pair.teacher_traces, *brief.teacher_traces]
    states = Activations([(len(trace.ids), 2) for trace in seen], tmp_path / "states.bin")
    for place, trace in enumerate(seen):
        states[place] = torch.arange(2.0 * len(trace.ids)).view(-1, 2)

    batches = TrainingBatches([pair, brief], states)
    batch = batches.batch([0])
    for row, trace in enumerate(pair.traces):
        learned = slice(len(trace.prompt_ids) - 1, len(trace.ids) - 1)
        assert batch.token_BT[row, learned].tolist() == list(trace.completion_ids)
        assert batch.pair_BT[row, learned].tolist() == [row] * len(trace.completion_ids)
        assert (batch.pair_BT[row] >= 0).sum() == len(trace.completion_ids)

    batch, (trace,) = batches.batch([1]), brief.traces
    learned = slice(len(trace.prompt_ids) - 1, len(trace.ids) - 1)
    assert batch.ids_BT[0].tolist() == list(trace.ids)
    assert torch.equal(batch.dense_BTD[0, learned], states[2][8:-1])


def test_every_trace_comes_as_often_as_any_other(tmp_path: Path) -> None:
    """To one; steps have the tokens that were asked for, and so has the whole."""
    batches = make_batches(tmp_path)
    total = sum(len(trace.ids) for trace in TRACES)
    steps = batches.draw_steps(10 * total, batch_tokens=60, seed=0)

    counts = Counter(place for step in steps for batch in step for place in batch)
    assert set(counts.values()) == {10}

    longest = max(len(trace.ids) for trace in TRACES)
    for step in steps[:-1]:
        tokens = sum(len(TRACES[place].ids) for batch in step for place in batch)
        assert 60 <= tokens < 60 + max(60, longest)


def test_the_order_is_drawn_from_the_seed(tmp_path: Path) -> None:
    """The same one gives the same steps, another one others."""
    batches = make_batches(tmp_path)
    assert batches.draw_steps(500, 60, seed=1) == batches.draw_steps(500, 60, seed=1)
    assert batches.draw_steps(500, 60, seed=1) != batches.draw_steps(500, 60, seed=2)


def test_disk_has_a_bound() -> None:
    """Whole traces in order, as many as fit; a single one that does not is taken all the same."""
    size = 4 * 8 * len(TRACES[0].ids)
    same = [replace(TRACES[0], index=i) for i in range(5)]
    assert limit_to_disk(same, 8, 3 * size) == same[:3]
    assert limit_to_disk(same, 8, 1) == same[:1]
