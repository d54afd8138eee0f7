"""Answers that an earlier build left: taken again with what was counted then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from racdeploy.engines.engine import Completion, EngineSettings, OnTokens, Sampling
from racdeploy.pipeline import answer_stage
from racdeploy.pipeline.workspace import Workspace
from racdeploy.recipe import Verification
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import AnswerSampler, SampledAnswers
from tests.support.tiny_models import SPECIAL_TOKENS, write_tokenizer

EOS = SPECIAL_TOKENS["<|im_end|>"]
PROBLEMS = [Problem(f"{i} + 1?", str(i + 1), task="sums") for i in range(3)]
COUNTED = {"generated_tokens": 3.0, "decode_s": 0.5, "peak_rss_bytes": 7.0}


class CountingEngine:
    """Ends every completion at once, and has counted."""

    def __init__(self) -> None:
        self.stats = COUNTED
        self.info = {"kernels": "stock"}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        assert on_tokens
        completions = [Completion((EOS,), "stop") for _ in prompts]
        for index, ended in enumerate(completions):
            on_tokens(index, ended.ids, ended)
        return completions


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SampledAnswers]:
    """Answer the problems as a build does, in one work folder."""
    monkeypatch.setattr(answer_stage, "open_engine", lambda *_: nullcontext(CountingEngine()))
    write_tokenizer(tmp_path)
    encoder = PromptEncoder.from_folder(tmp_path)
    sampler = AnswerSampler(encoder, find_tags(encoder), (EOS,), Verification())

    def run(repeat_finished: bool = False, model: str = "0", matrix: str = "1") -> SampledAnswers:
        return answer_stage.answer_prompts(
            Workspace(tmp_path / "work"),
            sampler,
            PROBLEMS,
            "dense",
            tmp_path / "model.gguf",
            {"model.gguf": model, "model.imatrix.gguf": matrix},
            "llamacpp",
            EngineSettings(),
            {},
            repeat_finished,
        )

    return run


def test_a_second_build_finds_what_the_first_counted(answer: Callable[..., SampledAnswers]) -> None:
    """Speed, memory and kernels, apart from what a run counts itself; a third finds it, too."""
    first = answer()
    assert (first.reused, first.stats, first.reused_stats) == (0, COUNTED, {})

    for _ in range(2):
        later = answer()
        assert (later.reused, later.stats, later.reused_stats) == (3, {}, COUNTED)
        assert later.kernels == first.kernels == "stock"


def test_figures_that_have_to_be_new_are_measured_again(
    answer: Callable[..., SampledAnswers],
) -> None:
    """Where speed or memory have a limit, nothing stored counts."""
    answer()
    repeated = answer(repeat_finished=True)
    assert (repeated.reused, repeated.stats, repeated.reused_stats) == (0, COUNTED, {})


def test_answers_stay_when_only_the_importance_matrix_is_another(
    answer: Callable[..., SampledAnswers],
) -> None:
    """Another calibration writes another one beside the dense model's file; no engine reads it."""
    answer()
    assert answer(matrix="2").reused == 3
    assert answer(model="2").reused == 0
