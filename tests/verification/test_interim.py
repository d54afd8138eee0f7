"""Questions until the verdict is clear: good and broken models end early, doubtful ones at the end,
and a run that was killed between two analyses ends as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from racdeploy.engines.engine import Completion, EngineSettings, OnTokens, Sampling
from racdeploy.models.family_lookup import find_family
from racdeploy.recipe import Verification
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem
from racdeploy.verification.answer_cache import AnswerCache
from racdeploy.verification.evidence import Evidence, Findings
from racdeploy.verification.examiner import Examiner
from racdeploy.verification.gate import read_gate
from racdeploy.verification.report_builder import build_report
from racdeploy.verification.shipped_model import ShippedArtifact, ShippedModel
from racdeploy.verification.stats import group_sequential
from racdeploy.verification.subject import Subject
from tests.support.tiny_models import SPECIAL_TOKENS, write_tokenizer

EOS = SPECIAL_TOKENS["<|im_end|>"]
FAMILY = find_family({"model_type": "qwen3"})
CLOSE = SPECIAL_TOKENS["</think>"]
PROMPTS = 64
CLEAR_AFTER = 32
"""Prompts after which equal models pass these limits."""
CONFIDENCE = 0.6
LIMITS = {
    "confidence": CONFIDENCE,
    "accuracy": {"margin": 0.2},
    "thinking": dict.fromkeys(("unclosed", "loops", "forced", "truncated"), 0.2),
}
PROBLEMS = [Problem(f"{i} + 1?", str(i + 1), task="sums") for i in range(PROMPTS)]
ALL = frozenset(range(PROMPTS))
DOUBTFUL = frozenset(range(0, PROMPTS, 5))
"""Prompts that a model at the limit of 20 points loses."""


class KilledError(BaseException):
    """What a kill looks like from inside."""


@dataclass
class KnowingEngine:
    """Thinks for ten tokens and answers right, but for some prompts; may die after some answers."""

    encoder: PromptEncoder
    lost: Collection[int]
    asked: list[int]
    dies_after: int = 10**9
    stats: dict[str, float] = field(default_factory=dict)
    info: dict[str, object] = field(default_factory=dict)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        assert on_tokens
        completions = []
        for position in range(len(prompts)):
            if len(self.asked) == self.dies_after:
                raise KilledError
            index = sampling.rng_index(position)
            self.asked.append(index)
            answer = "0" if index in self.lost else PROBLEMS[index].gold
            ids = (*[7] * 10, CLOSE, *self.encoder.encode_text(answer), EOS)
            completions.append(Completion(ids, "stop"))
            on_tokens(position, ids, completions[-1])

        self.stats = {
            "load_ms": 5.0,
            "decode_s": len(prompts) / 8,
            "generated_tokens": float(len(prompts)),
            "peak_rss_bytes": 1000.0 + len(prompts),
        }
        return completions


@dataclass
class Bench:
    """Two models and an examiner of both.

    Args:
        lost: prompts that the second model answers wrong.
        other_lost: those of the same model on another engine; None for one engine.
        asked: indices of the prompts in the order of asking, by model.
    """

    folder: Path
    encoder: PromptEncoder
    lost: Collection[int] = ()
    other_lost: Collection[int] | None = None
    settings: Verification = field(
        default_factory=lambda: Verification(count=PROMPTS, max_new_tokens=1024)
    )
    gate: dict[str, Any] = field(default_factory=dict)
    keeps: bool = False
    repeats: bool = False
    dies_after: int = 10**9
    asked: dict[str, list[int]] = field(default_factory=dict)

    def open(self, subject: Subject, _: EngineSettings) -> nullcontext[KnowingEngine]:
        """Open the engine of a model."""
        name = subject.quant
        asked = self.asked.setdefault(name, [])
        lost = {"pruned": self.lost, "other": self.other_lost or ()}.get(name, ())
        dies_after = self.dies_after if name == "pruned" else 10**9
        return nullcontext(KnowingEngine(self.encoder, lost, asked, dies_after))

    def make_subject(self, name: str) -> Subject:
        """Return a model of that name."""
        return Subject(
            backend="llamacpp",
            path=self.folder / f"{name}.gguf",
            files={f"{name}.gguf": name},
            encoder=self.encoder,
            tags=find_tags(self.encoder),
            stop_ids=(EOS,),
            quant=name,
        )

    def make_examiner(self) -> Examiner:
        """Return what asks all prompts."""
        return Examiner(
            PROBLEMS,
            self.settings,
            read_gate(None, LIMITS | self.gate),
            AnswerCache(self.folder / "work", repeats_finished=self.repeats, keeps=self.keeps),
            engine=EngineSettings(),
        )

    def judge(self) -> tuple[Report, Evidence, list[int]]:
        """Ask until it is clear; return report and evidence, and how many answers were reused."""
        examiner = self.make_examiner()
        dense = self.make_subject("dense")
        shipped = self.ship()
        pruned = shipped.main.subject

        def weigh(step: Examiner) -> Evidence:
            arm, _ = step.answer(dense, "dense")
            return shipped.weigh_interim(step, arm)

        with examiner.until_judged():
            stopped = examiner.stop_when_clear(weigh)
            first, answers = stopped.answer(dense, "dense")
            second, more_answers = stopped.answer(pruned, "pruned")
            others = [other for other, _ in shipped.answer_others(stopped)]
            skipped = dict.fromkeys(("integrity", "sparsity", "template", "tokens", "logits"), "")
            findings = Findings(skip_reasons=skipped, other_artifacts=tuple(others))
            evidence = stopped.weigh(pruned, first, second, findings)
            report, _ = build_report(evidence, [], model="m", target="t")
        return report, evidence, [answers.reused, more_answers.reused]

    def ship(self) -> ShippedModel:
        """Return the second model in its artifacts."""
        names = ["pruned"] if self.other_lost is None else ["pruned", "other"]
        artifacts = [
            ShippedArtifact(
                subject=self.make_subject(name), family=FAMILY, format="gguf", packing="plain"
            )
            for name in names
        ]
        return ShippedModel(
            artifacts=artifacts,
            prompt_ids={},
            eos_ids=(EOS,),
            requested_sparsity=0.5,
            linears=(),
            token_differences=0.0,
        )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Equal models, and analyses after 16, 32 and 64 prompts."""
    write_tokenizer(tmp_path)
    made = Bench(tmp_path, PromptEncoder.from_folder(tmp_path))
    monkeypatch.setattr(Subject, "open", lambda *given: made.open(*given))
    monkeypatch.setattr(ShippedArtifact, "measured", lambda artifact: artifact.subject)
    monkeypatch.setattr(group_sequential, "MIN_PROMPTS", PROMPTS)
    monkeypatch.setattr(group_sequential, "FIRST_ANALYSIS", 16)
    return made


@pytest.mark.parametrize(
    ("lost", "verdict", "prompts"),
    [((), "pass", CLEAR_AFTER), (ALL, "fail", 16), (DOUBTFUL, "inconclusive", PROMPTS)],
    ids=["good", "broken", "doubtful"],
)
def test_a_clear_verdict_ends_the_questions(
    bench: Bench, lost: Collection[int], verdict: str, prompts: int
) -> None:
    """Neither model is asked more, and none is asked twice."""
    bench.lost = lost
    report, evidence, reused = bench.judge()

    assert report.comparison
    assert report.comparison.n == prompts == evidence.prompt_count
    assert report.comparison.planned == PROMPTS
    assert report.verdict == verdict
    assert reused == [0, 0]
    assert bench.asked == {"dense": list(range(prompts)), "pruned": list(range(prompts))}


@pytest.mark.parametrize(
    ("other_lost", "verdict", "asked"),
    [((), "pass", CLEAR_AFTER), (DOUBTFUL, "inconclusive", PROMPTS), (ALL, "fail", CLEAR_AFTER)],
    ids=["good", "doubtful", "broken"],
)
def test_another_engine_is_asked_once_the_first_is_clear(
    bench: Bench, other_lost: Collection[int], verdict: str, asked: int
) -> None:
    """Not before; where the engines may differ, all are asked more."""
    bench.gate = {"backends": {"margin": 0.2}}
    bench.other_lost = other_lost
    report, _, _ = bench.judge()
    assert report.verdict == verdict
    assert {name: len(indices) for name, indices in bench.asked.items()} == {
        "dense": asked,
        "pruned": asked,
        "other": asked,
    }


def test_another_engine_is_not_asked_before(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one is not clear, its answers could not end anything."""
    bench.lost = DOUBTFUL
    bench.other_lost = DOUBTFUL
    steps = []
    answer_others = ShippedModel.answer_others

    def count(shipped: ShippedModel, examiner: Examiner) -> Any:
        steps.append(len(examiner.problems))
        return answer_others(shipped, examiner)

    monkeypatch.setattr(ShippedModel, "answer_others", count)
    bench.judge()
    assert steps == [PROMPTS]


def test_the_interval_is_that_of_the_last_analysis(bench: Bench) -> None:
    """Not that of the gate, which is narrower."""
    bench.lost = ALL
    report, evidence, _ = bench.judge()
    first, *_ = group_sequential.plan_analyses(PROMPTS, CONFIDENCE)

    assert report.comparison
    assert report.comparison.confidence == first.confidence == evidence.gate.confidence
    accuracy = report.find_check("accuracy")
    assert accuracy
    assert "99% interval" in accuracy.summary


def test_figures_of_all_steps_count_together(bench: Bench) -> None:
    """Tokens and seconds are added, the peak of memory is the highest, a file is loaded once."""
    _, evidence, _ = bench.judge()
    assert evidence.pruned.stats == {
        "load_ms": 5.0,
        "decode_s": 4.0,
        "generated_tokens": 32.0,
        "peak_rss_bytes": 1016.0,
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": Verification(count=PROMPTS, max_new_tokens=1024, sequential=False)},
        {"gate": {"checks": ["memory"]}},
    ],
    ids=["not sequential", "nothing judged"],
)
def test_all_prompts_are_asked_at_once(bench: Bench, changed: dict[str, Any]) -> None:
    """With the gate's own confidence, and no word of analyses in the report."""
    report, evidence, _ = replace(bench, **changed).judge()
    assert report.comparison
    assert (report.comparison.n, report.comparison.planned) == (PROMPTS, None)
    assert evidence.gate.confidence == CONFIDENCE


def test_figures_that_have_to_be_new_are_of_all_steps(bench: Bench) -> None:
    """A build that asks a finished one's prompts again keeps its own answers of every step."""
    bench.keeps = True
    bench.judge()

    bench.repeats = True
    _, evidence, reused = bench.judge()
    assert reused == [0, 0]
    assert evidence.pruned.stats["generated_tokens"] == CLEAR_AFTER

    bench.repeats = False
    assert bench.judge()[2] == [CLEAR_AFTER, CLEAR_AFTER]


def test_few_prompts_are_judged_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the smallest number for interim analyses, with the gate's own confidence."""
    monkeypatch.setattr(group_sequential, "MIN_PROMPTS", PROMPTS + 1)
    bench.lost = ALL
    report, evidence, _ = bench.judge()
    assert report.comparison
    assert (report.comparison.n, report.comparison.planned) == (PROMPTS, None)
    assert evidence.gate.confidence == CONFIDENCE


def test_a_model_that_was_asked_more_is_not_asked_again(bench: Bench) -> None:
    """As a reference that another candidate needed longer: with the figures of this run."""
    asked = []
    examiner = bench.make_examiner()
    for prompts in (32, 16):
        step = replace(examiner, problems=PROBLEMS[:prompts], is_interim=True)
        _, answers = step.answer(bench.make_subject("dense"), "dense")
        asked.append(answers)

    first, second = asked
    assert second.records == first.records[:16]
    assert (second.stats, second.reused) == (first.stats, 0)
    assert bench.asked["dense"] == list(range(32))


@pytest.mark.parametrize("keeps", [False, True], ids=["verification", "build"])
@pytest.mark.parametrize(("dies_after", "dense"), [(16, 32), (20, 32)], ids=["between", "within"])
def test_a_killed_run_ends_as_a_whole_one(
    bench: Bench, tmp_path: Path, keeps: bool, dies_after: int, dense: int
) -> None:
    """With the same records; what was asked before the kill is not asked again.

    Args:
        dense: answers of the first model until then.
    """
    bench.keeps = keeps
    _, whole, _ = bench.judge()

    bench.folder = tmp_path / "other"
    bench.asked.clear()
    bench.dies_after = dies_after
    with pytest.raises(KilledError):
        bench.judge()
    bench.dies_after = 10**9
    _, resumed, reused = bench.judge()

    assert resumed.dense.records == whole.dense.records
    assert resumed.pruned.records == whole.pruned.records
    assert reused == [dense, dies_after]
    assert sorted(bench.asked["pruned"]) == list(range(CLEAR_AFTER))
    assert resumed.pruned.stats == {}
