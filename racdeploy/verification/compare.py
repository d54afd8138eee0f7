"""Comparison of any models with a reference, each as it is deployed: no build and no bundle.

Reference and candidates answer the same questions, each on its engine with its own template,
tokenizer and end-of-sequence. The checks are those of a bundle; where template, tokens or
end-of-sequence differ from the reference's, that is a finding of its own check.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from racdeploy import __version__, plugins
from racdeploy.engines import open_engine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import Engine, EngineSettings, Progress
from racdeploy.errors import UsageError
from racdeploy.files.code_hashes import base_version
from racdeploy.files.reading import Json
from racdeploy.files.stages import Stage
from racdeploy.files.writing import file_sha256
from racdeploy.recipe import Recipe, Verification
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report
from racdeploy.runtime.deployed import DeployedModel
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import AnswerSampler, SampledAnswers, identify_answers
from racdeploy.verification.evidence import ArmResult, Evidence, PromptProbe, StopIds, TokenProbe
from racdeploy.verification.gate import Gate
from racdeploy.verification.measurements import fingerprint
from racdeploy.verification.plan import Expectation, plan
from racdeploy.verification.probe_strings import choose_probe_strings
from racdeploy.verification.reference import Reference
from racdeploy.verification.report_builder import build_report
from racdeploy.verification.served import open_chat
from racdeploy.verification.top_logits import compare_top_logits, record_top_logits

_PROMPTS = 64  # whose rendering is compared
_NOT_PRUNED = {
    "sparsity": "no zeros were asked for",
    "backends": "each candidate is compared by itself",
}
_SERVER_S = 1800.0  # for one answer
_JUDGED_SERVER = ("accuracy", "thinking")


@dataclass(frozen=True)
class Examiner:
    """Asks models questions, and keeps the answers in ``work`` until all are judged."""

    problems: Sequence[Problem]
    settings: Verification
    work: Path
    engine: EngineSettings
    progress: Progress | None = None
    server_key_env: str = ""
    _used: set[Path] = field(default_factory=set, init=False, compare=False)

    def answer(self, model: DeployedModel, arm: str) -> tuple[ArmResult, SampledAnswers]:
        """Answer all problems; resumed where files and settings are the same."""
        known, control = model.manifest.tokenizer, model.manifest.generation.thinking
        sampler = AnswerSampler(
            model.encoder, model.tags, known.eos_ids, self.settings, self.progress, control
        )

        local = [] if model.url else model.list_files()
        files = {file.name: file_sha256(file) for file in local}
        inputs = identify_answers(files, sampler, self.engine, fingerprint(self.engine))
        source = {
            "version": base_version(__version__),
            "backend": f"{model.entry.backend} {model.url}",
            "template": known.template_sha256,
        }
        stage = Stage.open(self.work, "compare", source | inputs)
        self._used.add(stage.folder)
        log = CompletionLog(stage.folder / "completions.jsonl")
        answers = sampler.answer(partial(self.open, model), self.problems, arm, log)

        size_bytes = sum(file.stat().st_size for file in local) or None
        figures = (size_bytes, model.entry.quant, None, answers.stats, files)
        return ArmResult(arm, answers.records, *figures), answers

    def open(self, model: DeployedModel) -> Engine:
        if model.url:
            url, _, name = model.url.partition("#")
            questions = [problem.question for problem in self.problems]
            known = {"model": name, "key_env": self.server_key_env, "timeout_s": _SERVER_S}
            return open_chat(url, model.encoder, model.tags, questions, self.engine, **known)
        return open_engine(model.entry.backend, model.path, self.engine)

    def record(self, model: DeployedModel, tasks: tuple[str, ...]) -> Reference:
        """Answer with the reference model, and return all that candidates are compared with."""
        arm, answers = self.answer(model, "dense")
        traces = [] if model.url else list(answers.traces[: self.settings.logit_traces])
        logits = []
        if traces:
            with self.open(model) as engine:
                logits = record_top_logits(engine, traces, self.progress)

        encoder = model.encoder
        texts = choose_probe_strings(0.0)
        return Reference(
            name=model.name,
            tasks=tasks,
            settings=self.settings,
            stop_ids=model.manifest.tokenizer.eos_ids,
            vocabulary=encoder.tokenizer.get_vocab_size(),
            open_tag=model.manifest.tokenizer.open_tag or "",
            probes={text: tuple(encoder.encode_text(text)) for text in texts},
            bos_ids=tuple(encoder.encode_text(encoder.bos_token)),
            completions=tuple(completion for _, completion in traces),
            size_bytes=arm.size_bytes,
            quant=arm.quant,
            stats=dict(arm.stats),
            files=dict(arm.files),
            fingerprint=fingerprint(self.engine),
            records=arm.records,
            logits=tuple(logits),
        )

    def forget(self) -> None:
        """Remove the stored answers, which a finished comparison no longer needs."""
        for folder in self._used:
            shutil.rmtree(folder)

    def check_lengths(self, model: DeployedModel) -> None:
        """Raise UsageError for a context beyond the model's, or questions beyond the context."""
        room = self.settings.context_tokens
        longest = max(len(model.encoder.encode(problem.question)) for problem in self.problems)
        if room > model.context_limit or longest >= room:
            raise UsageError(
                "comparison-beyond-context",
                f"{model.name} is made for {model.context_limit:,} tokens, the longest question "
                f"has {longest:,}, and the context is {room:,}",
                remedy=f"--context-tokens {min(room, model.context_limit)}, or shorter questions",
            )


@dataclass(frozen=True)
class ModelComparison:
    """Candidates against a reference, a model or its recorded answers, on the same problems.

    Args:
        gate: limits, corrected for the number of candidates.
    """

    reference: DeployedModel | Reference
    candidates: tuple[DeployedModel, ...]
    tasks: tuple[str, ...]
    examiner: Examiner
    gate: Gate

    def plan(self) -> Json:
        """Return costs and power; raise UsageError for prompts beyond a model's context."""
        models = list(self.candidates)
        if isinstance(self.reference, DeployedModel):
            models.append(self.reference)
        for model in models:
            self.examiner.check_lengths(model)

        settings, problems = self.examiner.settings, self.examiner.problems
        answers = len(problems) * settings.samples * len(models)
        return {
            "reference": self.reference.name,
            "candidates": [model.name for model in self.candidates],
            "tokens_at_most": answers * settings.max_new_tokens,
            **plan(settings, self.gate, Expectation(), len(problems)),
        }

    def run(self) -> list[tuple[Report, list[AnswerRecord]]]:
        """Answer with every model; return a report and the records of each candidate."""
        self.plan()
        reference = self.reference
        if isinstance(reference, DeployedModel):
            reference = self.examiner.record(reference, self.tasks)

        results = [self._compare(model, reference) for model in self.candidates]
        self.examiner.forget()
        return results

    def _compare(
        self, model: DeployedModel, reference: Reference
    ) -> tuple[Report, list[AnswerRecord]]:
        arm, answers = self.examiner.answer(model, "pruned")
        skipped = dict(_NOT_PRUNED)
        logits = None
        if model.url:
            reason = "the files behind a server cannot be read"
            skipped |= dict.fromkeys({*plugins.list_names("checks")} - {*_JUDGED_SERVER}, reason)
        elif model.encoder.tokenizer.get_vocab_size() != reference.vocabulary:
            skipped["logits"] = "the vocabularies have different sizes"
        elif not reference.logits:
            skipped["logits"] = "the reference has no recorded logits"
        else:
            with self.examiner.open(model) as engine:
                logits = compare_top_logits(
                    engine, reference.traces, reference.logits, self.examiner.progress
                )

        evidence = Evidence(
            settings=self.examiner.settings,
            gate=self.gate,
            dense=reference.arm,
            pruned=arm,
            backend=model.entry.backend,
            artifact=model.path if model.url else model.list_files()[0],
            artifact_files=arm.files,
            probes=_probe_tokens(model, reference),
            prompts=_probe_prompts(model, reference),
            stop_ids=StopIds(reference.stop_ids, model.eos_id),
            logits=logits,
            skip_reasons=skipped,
        )
        notes = []
        if (model.manifest.tokenizer.open_tag or "") != reference.open_tag:
            notes.append("the models write their thoughts after different tags")
        if answers.reused:
            notes.append(f"{answers.reused} answers are of an earlier run that was interrupted")
        return build_report(
            evidence,
            notes,
            recipe=Recipe.combine(
                None, {"tasks": reference.tasks, "verify": reference.settings.model_dump()}
            ),
            model=model.name,
            target=model.entry.backend,
            reference=reference.name,
            fingerprint=fingerprint(self.examiner.engine),
        )


def correct_confidence(gate: Gate, candidates: int) -> Gate:
    """Return the gate with Bonferroni's correction, before limits are widened for few prompts.

    A good file among many is then not failed, or a bad one passed, more often than alone.
    """
    return gate.model_copy(update={"confidence": 1 - (1 - gate.confidence) / candidates})


def _probe_tokens(model: DeployedModel, reference: Reference) -> tuple[TokenProbe, ...]:
    """Return hard strings with the ids of both models."""
    encode = model.encoder.encode_text
    return tuple(
        TokenProbe(text, ids, tuple(encode(text))) for text, ids in reference.probes.items()
    )


def _probe_prompts(model: DeployedModel, reference: Reference) -> tuple[PromptProbe, ...]:
    """Return questions as both templates render them."""
    recorded = {record.question: record.prompt_ids for record in reference.records}
    return tuple(
        PromptProbe(question, ids, tuple(model.encoder.encode(question)), None, reference.bos_ids)
        for question, ids in list(recorded.items())[:_PROMPTS]
    )
