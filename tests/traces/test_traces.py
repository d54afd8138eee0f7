"""Collecting and selecting traces."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from racdeploy import tasks
from racdeploy.engines import open_engine
from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion, EngineSettings
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Calibration, Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem
from racdeploy.traces.collect import CompletionSource, collect_traces, make_prompt_traces
from racdeploy.traces.select import select_traces
from racdeploy.traces.text import split_text
from racdeploy.traces.trace import TraceSet, count_tokens
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

SETTINGS = Traces(count=7, batch_size=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


def _collect(folder: Path, out: Path, together: int = 1):
    out.mkdir(exist_ok=True)
    task = tasks.load("comparison")
    encoder = PromptEncoder.from_folder(folder)
    with open_engine("transformers", folder, EngineSettings(256, 3, 1)) as engine:
        return collect_traces(
            CompletionSource(lambda asked: [engine.generate(*each) for each in asked], together),
            encoder,
            find_tags(encoder),
            Checkpoint(folder).eos_ids,
            task.draw_problems("calibration", 0, 7),
            SETTINGS,
            TraceSet(out),
            CompletionProgress(None, "traces", 7),
        )


def test_traces_are_token_ids_with_their_streams(folder: Path, tmp_path: Path) -> None:
    """Prompt ids are the rendered template, every token has a stream, and the shards read back the
    same.
    """
    traces = _collect(folder, tmp_path / "traces")
    encoder = PromptEncoder.from_folder(folder)
    assert [list(t.prompt_ids) for t in traces] == [encoder.encode(t.question) for t in traces]
    assert all(len(t.segments()) == len(t.ids) for t in traces)
    assert traces == TraceSet(tmp_path / "traces").read()
    assert len(list((tmp_path / "traces").glob("shard-*.jsonl"))) == 3


def test_an_answer_that_ends_is_whole_and_one_at_the_limit_is_not(
    folder: Path, tmp_path: Path
) -> None:
    """The end-of-sequence belongs to the completion, and to no answer."""
    encoder = PromptEncoder.from_folder(folder)
    tags = find_tags(encoder)
    assert tags is not None
    end = Checkpoint(folder).eos_ids[0]
    answer_ids = encoder.encode_text("42")
    thought_ids = (*tags.open_ids, *encoder.encode_text("six by seven"), *tags.close_ids)
    completions = [
        Completion((*thought_ids, *answer_ids, end), "stop"),
        Completion((*thought_ids, *answer_ids), "length"),
    ]
    problems = [Problem("6 * 7?", "42"), Problem("7 * 6?", "42")]
    whole, cut = collect_traces(
        CompletionSource(lambda asked: [completions]),
        encoder,
        tags,
        (end,),
        problems,
        SETTINGS,
        TraceSet(tmp_path),
        CompletionProgress(None, "traces", 2),
    )
    assert (whole.truncated, cut.truncated) == (False, True)
    for trace in (whole, cut):
        start = trace.answer_from
        assert start == len(thought_ids)
        assert list(trace.completion_ids[start : start + len(answer_ids)]) == answer_ids


def test_an_interrupted_collection_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """A lost shard is collected again, byte for byte; the others are not touched."""
    _collect(folder, tmp_path / "traces")
    before = {f.name: f.read_bytes() for f in (tmp_path / "traces").iterdir()}
    (tmp_path / "traces/shard-00001.jsonl").unlink()
    _collect(folder, tmp_path / "traces")
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "traces").iterdir()}


def test_shards_that_are_answered_together_are_the_same(folder: Path, tmp_path: Path) -> None:
    """Two at a time of three, of which one is there already."""
    _collect(folder, tmp_path / "one")
    _collect(folder, tmp_path / "two", together=2)
    (tmp_path / "two/shard-00000.jsonl").unlink()
    traces = _collect(folder, tmp_path / "two", together=2)
    assert list(range(7)) == [trace.index for trace in traces]
    first, second = (
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert first == second


def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path) -> None:
    """Half a line is an error with the file and line, not a shorter trace set."""
    _collect(folder, tmp_path / "traces")
    shard = tmp_path / "traces/shard-00002.jsonl"
    shard.write_text(shard.read_text()[:-20])
    with raises("damaged-line", "shard-00002.jsonl:1"):
        TraceSet(tmp_path / "traces").read()


def _traces(folder: Path):
    encoder = PromptEncoder.from_folder(folder)
    return make_prompt_traces(encoder, tasks.load("gcd").draw_problems("calibration", 0, 16))


def test_selection_holds_out_of_every_task_and_keeps_whole_traces(folder: Path) -> None:
    """An eighth of each task is held out; a budget ends before the trace that would cross it."""
    traces = [dataclasses.replace(t, task="ab"[t.index % 2]) for t in _traces(folder)]
    selection = select_traces(traces, Calibration())
    assert sorted(t.task for t in selection.held_out) == ["a", "b"]
    assert not {t.index for t in selection.held_out} & {t.index for t in selection.calibration}
    budget = count_tokens(selection.calibration) - 1
    shorter = select_traces(traces, Calibration(max_tokens=budget))
    assert shorter.calibration == selection.calibration[:-1]
    assert shorter.excluded == {"over the token budget": 1}


def test_truncated_traces_are_left_out_unless_asked_for(folder: Path) -> None:
    """A cut chain of thought has no end to calibrate on; leaving out all is an error."""
    cut = [dataclasses.replace(trace, truncated=True) for trace in _traces(folder)]
    with raises("no-calibration-traces", "16 truncated"):
        select_traces(cut, Calibration())
    assert len(select_traces(cut, Calibration(keep_truncated=True)).calibration) == 14


def test_only_correct_leaves_out_the_rest(folder: Path) -> None:
    """Wrong traces can be left out, and are counted."""
    mixed = [dataclasses.replace(trace, correct=trace.index % 2 == 0) for trace in _traces(folder)]
    selection = select_traces(mixed, Calibration(only_correct=True, held_out_share=0))
    assert all(trace.correct for trace in selection.calibration)
    assert selection.excluded == {"wrong answer": 8}


def test_chunks_of_a_text_begin_as_the_models_texts_do() -> None:
    """Or with their own first token, which nothing predicts; none of the text is lost."""
    ids = list(range(10, 17))
    assert split_text(ids, 3, [1]) == [((1,), (10, 11, 12)), ((1,), (13, 14, 15))]
    assert split_text(ids, 4, []) == [((10,), (11, 12, 13)), ((14,), (15, 16))]
