"""Answers that an earlier build left: taken again with what was counted then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from racdeploy.engines.engine import Completion, EngineSettings, OnTokens, Sampling
from racdeploy.recipe import Verification
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem
from racdeploy.verification.answer_cache import AnswerCache
from racdeploy.verification.answer_sampler import SampledAnswers
from racdeploy.verification.examiner import Examiner
from racdeploy.verification.gate import read_gate
from racdeploy.verification.subject import Subject
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
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A model whose engine counts."""
    monkeypatch.setattr(Subject, "open", lambda *_: nullcontext(CountingEngine()))
    write_tokenizer(tmp_path)
    encoder = PromptEncoder.from_folder(tmp_path)
    return Subject(
        backend="llamacpp",
        path=tmp_path / "model.gguf",
        files={"model.gguf": "0", "model.imatrix.gguf": "1"},
        encoder=encoder,
        tags=find_tags(encoder),
        stop_ids=(EOS,),
    )


@pytest.fixture
def answer(tmp_path: Path, subject: Subject) -> Callable[..., SampledAnswers]:
    """Answer the problems as a build does, in one work folder."""

    def run(repeats: bool = False, model: str = "0", matrix: str = "1") -> SampledAnswers:
        files = {"model.gguf": model, "model.imatrix.gguf": matrix}
        cache = AnswerCache(tmp_path / "work", repeats_finished=repeats)
        _, answers = _examine(cache).answer(replace(subject, files=files), "dense")
        return answers

    return run


def _examine(cache: AnswerCache) -> Examiner:
    return Examiner(PROBLEMS, Verification(), read_gate(), cache, EngineSettings())


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
    repeated = answer(repeats=True)
    assert (repeated.reused, repeated.stats, repeated.reused_stats) == (0, COUNTED, {})


def test_answers_stay_when_only_the_importance_matrix_is_another(
    answer: Callable[..., SampledAnswers],
) -> None:
    """Another calibration writes another one beside the dense model's file; no engine reads it."""
    answer()
    assert answer(matrix="2").reused == 3
    assert answer(model="2").reused == 0


def test_a_verification_asks_again_and_leaves_what_a_build_had_finished(
    answer: Callable[..., SampledAnswers], subject: Subject, tmp_path: Path
) -> None:
    """Its figures are of its own run. What it made for itself is removed in the end."""
    answer()
    examiner = _examine(AnswerCache(tmp_path / "work", repeats_finished=True, keeps=False))
    for model in ("0", "2"):
        asked = replace(subject, files={"model.gguf": model})
        _, answers = examiner.answer(asked, "pruned")
        assert (answers.reused, answers.stats) == (0, COUNTED)
    examiner.cache.forget()

    later = answer()
    assert (later.reused, later.reused_stats) == (3, COUNTED)
    assert answer(model="2").reused == 0


def test_another_process_need_not_wait_for_the_end_of_a_program_that_has_built(
    answer: Callable[..., SampledAnswers], subject: Subject, tmp_path: Path
) -> None:
    """Nor for one that took the build's answers, or verified: no folder is left locked."""
    work = tmp_path / "work"
    for _ in range(2):
        answer()
        (folder,) = work.glob("answers-*")
        with FileLock(folder / ".lock", timeout=0):
            pass

    examiner = _examine(AnswerCache(work, repeats_finished=True, keeps=False))
    for model in ("0", "2"):
        examiner.answer(replace(subject, files={"model.gguf": model}), "pruned")
    examiner.cache.forget()
    with FileLock(folder / ".lock", timeout=0):
        pass
    answer(model="2")  # in the folder that the verification has removed


@pytest.mark.parametrize("keeps", [True, False], ids=["build", "verification"])
def test_another_process_need_not_wait_where_a_program_was_interrupted(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """As in a notebook, which lives on: neither by the answers under way nor by those before."""
    work = tmp_path / "work"
    examiner = _examine(AnswerCache(work, keeps=keeps))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def judge() -> None:
        with examiner.until_judged():
            examiner.answer(subject, "dense")
            monkeypatch.setattr(CountingEngine, "generate", interrupt)
            examiner.answer(replace(subject, files={"model.gguf": "2"}), "pruned")

    with pytest.raises(KeyboardInterrupt):
        judge()

    folders = list(work.glob("answers-*"))
    assert len(folders) == 2
    for folder in folders:
        with FileLock(folder / ".lock", timeout=0):
            pass


def test_an_interrupted_verification_resumes_its_own_answers(
    answer: Callable[..., SampledAnswers], subject: Subject, tmp_path: Path
) -> None:
    """Not those of the build, though it had finished."""
    answer()
    reused = []
    for _ in range(2):
        examiner = _examine(AnswerCache(tmp_path / "work", repeats_finished=True, keeps=False))
        reused.append(examiner.answer(subject, "pruned")[1].reused)
    assert reused == [0, 3]
