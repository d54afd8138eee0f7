"""The limit of an answer's tokens, found by the first answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy.stats import beta

from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion
from racdeploy.pipeline import trace_stage
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe, Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.tasks import Problem
from racdeploy.traces import answer_limit
from racdeploy.traces.answer_limit import check_ends, find_limit
from racdeploy.traces.collect import CompletionSource, ShardRequest, TraceCollection
from racdeploy.traces.trace import TraceSet
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

LIMIT, MOST = 1024, 8000
END = 1


def _ending(tokens: int) -> Completion:
    return Completion(tuple(range(tokens)), "stop")


CUT_OFF = Completion(tuple(range(LIMIT)), "length")
REPEATING = Completion(tuple(range(100)) + (7, 8, 9) * 308, "length")


@pytest.mark.parametrize("cut_off", [0, 1, 2, 3, 8])
def test_answers_go_on_while_too_many_are_cut_off(cut_off: int) -> None:
    """More than one in twenty, told with an error of one in twenty, as scipy finds it."""
    completions = [CUT_OFF] * cut_off + [_ending(200)] * (16 - cut_off)
    lowest = beta.ppf(0.05, cut_off, 17 - cut_off) if cut_off else 0.0
    assert (find_limit(completions, LIMIT, MOST) is None) == (lowest > 0.05) == (cut_off > 2)


def test_the_longest_answer_that_ended_has_room_to_spare() -> None:
    """Half of it; never less than at first, and never more than there is room for."""
    for longest, most, expected in [(900, MOST, 1408), (100, MOST, 1024), (900, 1200, 1200)]:
        limit = find_limit([_ending(50)] * 15 + [_ending(longest)], LIMIT, most)
        assert limit
        assert (limit.tokens, limit.longest) == (expected, longest)

    some_cut_off = find_limit([_ending(300)] * 15 + [CUT_OFF], 4096, MOST)
    assert some_cut_off
    assert some_cut_off.tokens == 4096


def test_answers_that_repeat_themselves_are_counted_apart() -> None:
    """They would never end, whatever the limit."""
    limit = find_limit([REPEATING] * 8 + [_ending(200)] * 8, LIMIT, MOST)
    assert limit
    assert (limit.tokens, limit.ended, limit.repeating, limit.cut_off) == (1024, 8, 8, 0)
    assert "8 repeat themselves" in limit.describe()


def test_at_the_most_that_there_is_room_for_answers_stay_cut_off() -> None:
    limit = find_limit([CUT_OFF] * 8 + [_ending(200)] * 8, MOST, MOST)
    assert limit
    assert (limit.tokens, limit.cut_off) == (MOST, 8)


def test_a_model_whose_answers_never_end_is_refused() -> None:
    limit = find_limit([REPEATING] * 10 + [CUT_OFF] * 6, MOST, MOST)
    assert limit
    with raises("answers-never-end", "none of the first 16", "8,000 tokens", "10 repeat"):
        check_ends(limit)


class _Thinker:
    """Source whose answers need some tokens each, and which notes what it was asked."""

    def __init__(self, needed: Sequence[int]) -> None:
        self.needed = needed
        self.asked: list[tuple[int, ...]] = []

    def answer(self, requests: Sequence[ShardRequest]) -> list[list[Completion]]:
        return [self._answer(*request) for request in requests]

    def _answer(self, prompts: Sequence[Sequence[int]], sampling) -> list[Completion]:
        indices = [sampling.rng_index(position) for position in range(len(prompts))]
        self.asked.append((sampling.max_new_tokens, *indices))
        completions = []
        for position, index in enumerate(indices):
            whole = self._write(self.needed[index])
            before = sampling.resumed_ids(position)
            assert whole[: len(before)] == before, "it goes on where it was"
            ids = whole[: sampling.max_new_tokens]
            completions.append(Completion(ids, "stop" if ids == whole else "length"))
        return completions

    @staticmethod
    def _write(tokens: int) -> tuple[int, ...]:
        return (*range(10, 9 + tokens), END)


def _make_collection(out: Path, encoder: PromptEncoder) -> TraceCollection:
    return TraceCollection(
        encoder=encoder,
        tags=None,
        stop_ids=(END,),
        problems=[Problem(f"{number}?", "1") for number in range(6)],
        settings=Traces(count=6, batch_size=4),
        out=TraceSet(out),
        completion_progress=CompletionProgress(None, "traces", 6),
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder.from_folder(make_checkpoint(tmp_path_factory.mktemp("m"), "qwen3"))


@pytest.mark.parametrize("resumes", [True, False])
def test_only_answers_that_were_cut_off_go_on(
    tmp_path: Path, encoder: PromptEncoder, resumes: bool
) -> None:
    """Also in a process that starts between two rounds; servers answer from the start again."""
    thinker = _Thinker([20, 90, 90, 200, 1, 1])
    source = CompletionSource(thinker.answer, resumes=resumes)
    for limit in (40, 80):
        assert _make_collection(tmp_path, encoder).probe(source, limit, MOST) is None
    found = _make_collection(tmp_path, encoder).probe(source, 160, MOST)

    everyone = (0, 1, 2, 3)
    again = (1, 2, 3) if resumes else everyone
    assert thinker.asked == [(40, *everyone), (80, *again), (160, *again)]
    assert found
    assert (found.ended, found.cut_off, found.longest) == (3, 1, 90)

    traces = TraceSet(tmp_path).read()
    assert [len(trace.completion_ids) for trace in traces] == [20, 90, 90, 160]
    assert [trace.truncated for trace in traces] == [False, False, False, True]
    assert len(_make_collection(tmp_path, encoder).collect(source, found.tokens)) == 6


def test_a_stage_finds_the_limit_and_answers_as_with_that_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traces are those of a recipe that sets the limit, and the verification follows."""
    for module in (trace_stage, answer_limit):
        monkeypatch.setattr(module, "FIRST_LIMIT", 16)

    def build(**traces: object) -> Build:
        settings = {
            "count": 6,
            "batch_size": 4,
            "engine": "transformers",
            "temperature": 0.0,
            **traces,
        }
        options = {"traces": settings, "verify": {"count": 2}, "tasks": ["gcd"]}
        return Build(Job(Recipe.combine(None, options)), tmp_path / "work", 1)

    folder, traces = build().traces()
    limit = json.loads((folder / "limit.json").read_text())
    assert limit["tokens"] > 16
    assert limit["ended"] == 4

    told, expected = build(max_new_tokens=limit["tokens"]).traces()
    assert told != folder
    assert traces == expected

    informed = build().with_answer_limit()
    assert informed.job.trace_limit == limit["tokens"]
    assert informed.with_answer_limit() is informed
    assert build(max_new_tokens=99).with_answer_limit().job.trace_limit == 99
