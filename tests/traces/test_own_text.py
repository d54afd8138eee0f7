"""Text that a model writes without a prompt, to be calibrated on besides its traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion, Sampling
from racdeploy.pipeline import own_text_stage
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.prune_stage import PruneStage
from racdeploy.recipe import Recipe
from racdeploy.traces.collect import CompletionSource, ShardRequest
from racdeploy.traces.own_text import TOKENS, count_texts_together, write_own_text
from racdeploy.traces.trace import Trace, TraceSet, count_tokens
from tests.support.tiny_models import make_checkpoint

BEGIN, END = 5, 1
WANTED = 600


class _Writer:
    """Source whose texts all have some tokens, and which notes the sampling it was asked with."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.asked: list[Sampling] = []
        self.texts_together: set[int] = set()

    def answer(self, requests: Sequence[ShardRequest]) -> list[list[Completion]]:
        completions = []
        for prompts, sampling in requests:
            assert {*map(tuple, prompts)} == {(BEGIN,)}
            self.texts_together.add(len(prompts))
            self.asked.append(sampling)
            completions.append([Completion((7,) * self.tokens, "stop") for _ in prompts])
        return completions

    def write(self, folder: Path, tokens: int) -> list[Trace]:
        return write_own_text(
            CompletionSource(self.answer),
            TraceSet(folder),
            (BEGIN,),
            stop_ids=(END,),
            tokens=tokens,
            seed=3,
            completion_progress=CompletionProgress(None, "own text", 1),
        )


@pytest.mark.parametrize(
    ("written", "wanted", "shards", "enough"),
    [
        (TOKENS, 4096, 1, True),
        (TOKENS, 600, 1, True),
        (TOKENS, 1, 1, True),
        (99, 4096, 3, True),
        (1, 4096, 4, False),
        (1, 9000, 12, False),
    ],
)
def test_a_model_writes_until_it_is_enough(
    tmp_path: Path, written: int, wanted: int, shards: int, enough: bool
) -> None:
    """Each shard is sampled by a seed of its own; a model that ends at once is given up.

    No more texts are taken than are needed.
    """
    writer = _Writer(written)
    texts = writer.write(tmp_path, wanted)
    assert len(writer.asked) == shards
    assert writer.texts_together == {count_texts_together(wanted)}
    assert len({sampling.seed for sampling in writer.asked}) == shards
    assert {sampling.temperature for sampling in writer.asked} == {1.0}
    assert [text.index for text in texts] == [*range(len(texts))]
    assert count_tokens(texts[:-1]) < wanted
    assert (count_tokens(texts) >= wanted) is enough
    assert {text.prompt_ids for text in texts} == {(BEGIN,)}


def test_finished_texts_are_not_written_again(tmp_path: Path) -> None:
    first = _Writer(99).write(tmp_path, 4096)
    (tmp_path / "shard-00002.jsonl").unlink()
    again = _Writer(99)
    assert again.write(tmp_path, 4096) == first
    assert len(again.asked) == 1


def _open(model: Path, work: Path, tokens: int) -> Build:
    settings: dict[str, Any] = {
        "model": str(model),
        "traces": {"count": 4, "max_new_tokens": 8},
        "calibration": {"keep_truncated": True, "own_text_tokens": tokens},
        "prune": {"sparsity": 0.5},
    }
    return Build(Job(Recipe.combine(None, settings)), work)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m", "llama")


def test_a_model_is_pruned_on_its_traces_and_its_text(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out traces stay as they are; what was written is read the next time."""
    calibrated = []
    prune_blocks = PruneStage._prune_blocks

    def note(stage: PruneStage, folder: Path, request: Any, *rest: Any) -> Any:
        calibrated.append(request)
        return prune_blocks(stage, folder, request, *rest)

    monkeypatch.setattr(PruneStage, "_prune_blocks", note)
    plain = _open(model, tmp_path, 0).prune()
    build = _open(model, tmp_path, WANTED)
    pruned = build.prune()

    without, request = calibrated
    texts = request.calibration[len(without.calibration) :]
    assert request.held_out == without.held_out
    assert count_tokens(texts) >= WANTED
    assert pruned.folder != plain.folder
    assert plain.selection
    assert pruned.selection
    assert plain.selection.own_text_tokens == 0
    assert pruned.selection.own_text_tokens == count_tokens(texts)

    # Each text begins as the model's texts begin, and the texts differ.
    begin = tuple(build.job.encoder.leading_ids)
    assert {text.prompt_ids for text in texts} == {begin or build.own_text_stage.first_ids}
    assert len({text.completion_ids for text in texts}) == len(texts)

    monkeypatch.setattr(own_text_stage, "write_own_text", None)
    assert _open(model, tmp_path, WANTED).prune().folder == pruned.folder
    assert len(calibrated) == 2


def test_a_model_without_a_beginning_begins_after_a_text(tmp_path: Path) -> None:
    """Models as Qwen's put no token before a text; one stands between the texts they learned."""
    model = make_checkpoint(tmp_path / "m", "qwen3")
    build = _open(model, tmp_path / "work", WANTED)
    assert not build.job.encoder.leading_ids
    (first,) = build.own_text_stage.first_ids
    config = build.job.checkpoint.config
    assert first == (config.get("bos_token_id") or build.job.checkpoint.eos_ids[0])


def test_nothing_is_written_unless_asked(model: Path, tmp_path: Path) -> None:
    assert _open(model, tmp_path, 0).own_text_stage.run() == []
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("tokens", "together"), [(1, 1), (256, 1), (257, 2), (9000, 16)])
def test_no_more_texts_are_written_together_than_are_needed(tokens: int, together: int) -> None:
    assert count_texts_together(tokens) == together
