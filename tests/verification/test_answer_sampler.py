"""Answering prompts: completions are kept as they end, whatever the kill, and nothing is answered
twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import Completion, OnTokens, Sampling
from racdeploy.recipe import Verification
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import AnswerSampler
from tests.support.errors import raises
from tests.support.tiny_models import SPECIAL_TOKENS, write_tokenizer

EOS = SPECIAL_TOKENS["<|im_end|>"]
PROBLEMS = [Problem(f"{i} + 1?", str(i + 1), task="sums") for i in range(7)]


class Killed(BaseException):
    """What a kill looks like from inside."""


class ScriptedEngine:
    """Streams a completion that depends on the prompt and its random stream; dies after some
    tokens.
    """

    def __init__(self, dies_after: int = 10**9) -> None:
        self.asked: list[int] = []
        self.stats = {"generated_tokens": 1.0}
        self.info: dict[str, object] = {}
        self._left = dies_after

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        assert on_tokens
        self.asked += [sampling.rng_index(index) for index in range(len(prompts))]
        scripts = [
            [*(sum(ids) + sampling.rng_index(i) + k for k in range(3 + i)), EOS]
            for i, ids in enumerate(prompts)
        ]
        scripts = [
            [token % 200 if token != EOS else token for token in script] for script in scripts
        ]
        completions = [Completion(tuple(script), "stop") for script in scripts]
        for step in range(max(map(len, scripts))):
            for index, script in enumerate(scripts):
                if step < len(script):
                    if not self._left:
                        raise Killed
                    self._left -= 1
                    ended = step == len(script) - 1
                    on_tokens(index, [script[step]], completions[index] if ended else None)
        return completions


@pytest.fixture
def sampler(tmp_path: Path) -> AnswerSampler:
    write_tokenizer(tmp_path)
    encoder = PromptEncoder.from_folder(tmp_path)
    verification = Verification(max_new_tokens=50, samples=2, temperature=0.6)
    return AnswerSampler(encoder, find_tags(encoder), (EOS,), verification)


@pytest.mark.parametrize("dies_after", [0, 5, 60, 61, 95])
def test_a_killed_run_asks_only_what_is_left(
    sampler: AnswerSampler, tmp_path: Path, dies_after: int
) -> None:
    """Streams stay with their prompts and samples, so the answers are those of a run that was
    never killed.
    """
    unbroken = CompletionLog(tmp_path / "unbroken.jsonl")
    whole = sampler.answer(lambda: nullcontext(ScriptedEngine()), PROBLEMS, "dense", unbroken)
    file = tmp_path / "log.jsonl"
    with pytest.raises(Killed):
        sampler.answer(
            lambda: nullcontext(ScriptedEngine(dies_after)), PROBLEMS, "dense", CompletionLog(file)
        )
    kept = len(file.read_bytes().splitlines()) if file.exists() else 0
    engine = ScriptedEngine()
    again = sampler.answer(lambda: nullcontext(engine), PROBLEMS, "dense", CompletionLog(file))
    assert len(engine.asked) == 14 - kept == 14 - again.reused
    assert [stream for stream in engine.asked if stream < 14] == sorted(engine.asked)
    assert [record.prompt for record in again.records] == [i for i in range(7) for _ in range(2)]
    assert len(again.records) == len(whole.records)
    assert bool(again.stats) == (kept == 0)


def test_an_engine_that_draws_by_stream_answers_alike_after_a_kill(
    sampler: AnswerSampler, tmp_path: Path
) -> None:
    """The same completions, whether a run was broken off or not."""

    class Steady(ScriptedEngine):
        def generate(self, prompts, sampling, on_tokens=None, cancelled=None):  # type: ignore[no-untyped-def]
            found = []
            for index in range(len(prompts)):
                script = (sampling.rng_index(index), sampling.rng_index(index) + 1, EOS)
                if not self._left:
                    raise Killed
                self._left -= 1
                found.append(Completion(script, "stop"))
                on_tokens(index, script, found[-1])
            return found

    unbroken = CompletionLog(tmp_path / "unbroken.jsonl")
    whole = sampler.answer(lambda: nullcontext(Steady()), PROBLEMS, "dense", unbroken)
    file = tmp_path / "log.jsonl"
    with pytest.raises(Killed):
        sampler.answer(lambda: nullcontext(Steady(5)), PROBLEMS, "dense", CompletionLog(file))
    again = sampler.answer(lambda: nullcontext(Steady()), PROBLEMS, "dense", CompletionLog(file))
    assert (again.records, again.traces, again.reused) == (whole.records, whole.traces, 5)


def test_nothing_is_opened_where_nothing_is_left(sampler: AnswerSampler, tmp_path: Path) -> None:
    """Also where fewer prompts are asked than an earlier run answered."""
    log = CompletionLog(tmp_path / "log.jsonl")
    whole = sampler.answer(lambda: nullcontext(ScriptedEngine()), PROBLEMS, "dense", log)

    def refuse() -> nullcontext[ScriptedEngine]:
        raise AssertionError("there was nothing to answer")

    again = sampler.answer(refuse, PROBLEMS[:3], "dense", CompletionLog(log.file))
    assert again.records == whole.records[:6]


def test_a_torn_line_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    """A kill tears the last line; anything else is damage."""
    file = tmp_path / "log.jsonl"
    CompletionLog(file).append([1, 2], 0, Completion((3, 4), "stop", 1))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    log = CompletionLog(file)
    assert log.get([1, 2], 0) == Completion((3, 4), "stop", 1)
    assert file.read_bytes() == whole
    file.write_bytes(b'["x", 0, {"ids": [1]}]\n' + whole)
    with raises("damaged-line", "log.jsonl:1"):
        CompletionLog(file)


def test_a_record_says_what_was_asked_and_what_was_found(
    sampler: AnswerSampler, tmp_path: Path
) -> None:
    """Prompt ids, samples, states and the extractor's words are in it."""
    log = CompletionLog(tmp_path / "log.jsonl")
    records = sampler.answer(lambda: nullcontext(ScriptedEngine()), PROBLEMS, "dense", log).records
    first = records[1]
    assert (first.prompt, first.sample, first.arm, first.task) == (0, 1, "dense", "sums")
    assert list(first.prompt_ids) == sampler.encoder.encode("0 + 1?")
    assert (first.state, first.opening, first.extracted) == ("open", "prefilled", None)
    assert first.extractor == "the thinking did not end"


def test_the_log_is_one_json_line_a_completion(tmp_path: Path) -> None:
    """Readable by anything."""
    file = tmp_path / "log.jsonl"
    CompletionLog(file).append([1, 2], 7, Completion((3, 4), "length"))
    (line,) = file.read_text().splitlines()
    assert json.loads(line)[1:] == [
        7,
        {"ids": [3, 4], "finish_reason": "length", "forced_at": None},
    ]
