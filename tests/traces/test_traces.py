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
from racdeploy.traces.collect import CompletionSource, TraceCollection, make_prompt_traces
from racdeploy.traces.select import select_traces
from racdeploy.traces.text import split_text
from racdeploy.traces.trace import TraceSet, count_tokens
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

SETTINGS = Traces(count=7, batch_size=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


def _collect(folder: Path, out: Path, together: int = 1, enough: int = 8):
    out.mkdir(exist_ok=True)
    task = tasks.load("comparison")
    encoder = PromptEncoder.from_folder(folder)
    with open_engine("transformers", folder, EngineSettings(256, 3, 1)) as engine:
        collection = TraceCollection(
            encoder=encoder,
            tags=find_tags(encoder),
            stop_ids=Checkpoint(folder).eos_ids,
            problems=task.draw_problems("calibration", 0, 7),
            settings=SETTINGS,
            out=TraceSet(out),
            completion_progress=CompletionProgress(None, "traces", 7),
            is_enough=lambda traces: len(traces) >= enough,
        )
        return collection.collect(
            CompletionSource(lambda asked: [engine.generate(*each) for each in asked], together),
            SETTINGS.max_new_tokens,
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
    collection = TraceCollection(
        encoder=encoder,
        tags=tags,
        stop_ids=(end,),
        problems=problems,
        settings=SETTINGS,
        out=TraceSet(tmp_path),
        completion_progress=CompletionProgress(None, "traces", 2),
    )
    whole, cut = collection.collect(CompletionSource(lambda asked: [completions]), 12)
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


@pytest.mark.parametrize("together", [1, 2])
def test_no_more_are_asked_when_there_are_enough(
    folder: Path, tmp_path: Path, together: int
) -> None:
    """Whole shards, as many of them however many are answered together."""
    assert len(_collect(folder, tmp_path / "few", together, enough=2)) == 3
    assert len(_collect(folder, tmp_path / "more", together, enough=4)) == 6


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


def test_traces_that_repeat_themselves_are_left_out(folder: Path) -> None:
    """One that repeats itself teaches nothing new; leaving out all is an error."""
    cut = [dataclasses.replace(trace, truncated=True) for trace in _traces(folder)]
    with raises("no-calibration-traces", "16 truncated"):
        select_traces(cut, Calibration(keep_truncated=False))
    for kept in (None, True):
        assert len(select_traces(cut, Calibration(keep_truncated=kept)).calibration) == 14

    looping = [dataclasses.replace(trace, completion_ids=(5, 6) * 40) for trace in cut]
    with raises("no-calibration-traces", "16 repeating"):
        select_traces(looping, Calibration())
    assert len(select_traces(looping, Calibration(keep_truncated=True)).calibration) == 14
    ended = [dataclasses.replace(trace, truncated=False) for trace in looping]
    assert len(select_traces(ended, Calibration()).calibration) == 14


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
