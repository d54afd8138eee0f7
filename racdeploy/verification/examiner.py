"""Questions to a deployed model: its answers, and all else that the checks need.

Answers are kept in the work folder until all are judged, so that an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from racdeploy import plugins
from racdeploy.engines.backends.server import ServerEngine
from racdeploy.engines.backends.server.chat import ChatEngine, ChatTokenizer
from racdeploy.engines.engine import Engine, EngineSettings, Progress
from racdeploy.errors import UsageError
from racdeploy.files.reading import Json
from racdeploy.recipe import Verification
from racdeploy.results.plan import Plan
from racdeploy.runtime.deployed import DeployedModel
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_prompt_state
from racdeploy.sparse_kernels import STOCK, kernels_used
from racdeploy.tasks import Problem
from racdeploy.verification.answer_cache import AnswerCache
from racdeploy.verification.answer_sampler import AnswerSampler, SampledAnswers, identify_answers
from racdeploy.verification.evidence import (
    ArmResult,
    Evidence,
    Findings,
    LogitComparison,
    TokenProbe,
)
from racdeploy.verification.gate import Gate
from racdeploy.verification.interim import (
    JUDGED_BY_ANSWERS,
    ask_until_clear,
    fit_gate,
    list_analyses,
)
from racdeploy.verification.measurements import encode_probes, fingerprint, probe_tokens
from racdeploy.verification.plan import Expectation, plan_power
from racdeploy.verification.reference import Reference
from racdeploy.verification.stats.group_sequential import Analysis
from racdeploy.verification.subject import Subject
from racdeploy.verification.top_logits import average, compare_top_logits, record_top_logits

ServerApi = Literal["chat", "completions"]
_MAX_LOGIT_TOKENS = 256  # of an answer, whose logits are compared


@dataclass(frozen=True)
class ServerOptions:
    """How servers are asked.

    Args:
        key_env: environment variable with the API key; empty sends none.
        api: ``chat`` sends questions as users do, ``completions`` sends token ids.
        timeout_s: maximum wait for one answer, from the first byte sent to the last received.
        tokenizer: the model's ``tokenizer.json``, for ``completions`` of servers that return text.
    """

    key_env: str = ""
    api: ServerApi = "chat"
    timeout_s: float = 1800.0
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Examiner:
    """Asks models the same problems, each on its engine or server.

    Args:
        cache: of the answers.
        planned: number of all prompts, if these problems are the first of them that are asked until
            the verdict is clear; else 0.
        is_interim: whether more problems may be asked later, which begin with these.
    """

    problems: Sequence[Problem]
    settings: Verification
    gate: Gate
    cache: AnswerCache
    engine: EngineSettings
    progress: Progress | None = None
    server: ServerOptions = field(default_factory=ServerOptions)
    planned: int = 0
    is_interim: bool = False

    @property
    def analyses(self) -> tuple[Analysis, ...]:
        """Analyses of the answers, in order; the last one is of all problems that can be asked."""
        planned = self.planned or len(self.problems)
        prompts = len(self.problems)

        possible = []
        for analysis in list_analyses(self.settings, self.gate, planned):
            if analysis.prompts <= prompts:
                possible.append(analysis)
        if not possible:
            possible.append(Analysis(prompts, self.gate.confidence))
        return tuple(possible)

    def take(self, analysis: Analysis, *, is_interim: bool = False) -> Examiner:
        """Return the examiner that asks and judges up to an analysis."""
        planned = self.planned
        if len(self.analyses) > 1:
            planned = planned or len(self.problems)

        return replace(
            self,
            problems=self.problems[: analysis.prompts],
            gate=fit_gate(self.gate, analysis),
            planned=planned,
            is_interim=is_interim,
        )

    def begin(self) -> Examiner:
        """Return the examiner of the first analysis."""
        first, *later = self.analyses
        return self.take(first, is_interim=bool(later))

    def stop_when_clear(self, weigh: Callable[[Examiner], Evidence]) -> Examiner:
        """Ask until the verdict is clear; return the examiner of the prompts that were asked.

        Args:
            weigh: asks both models with the examiner of an interim analysis.
        """

        def weigh_at(analysis: Analysis) -> Evidence:
            return weigh(self.take(analysis, is_interim=True))

        return self.take(ask_until_clear(self.analyses, weigh_at))

    def plan(self, models: Sequence[DeployedModel], expected: Expectation) -> Plan:
        """Return costs and power; raise UsageError for what would fail after the first answers."""
        for model in models:
            self.check_lengths(model)
            if model.url and not all(map(self.gate.is_enabled, JUDGED_BY_ANSWERS)):
                raise UsageError(
                    "gate-lacks-checks",
                    "the gate omits accuracy or thinking, the checks that a server can be verified "
                    "by",
                    remedy="use a gate that runs both",
                )

        settings, prompts = self.settings, len(self.problems)
        answers = prompts * settings.samples * len(models)
        power = plan_power(settings, self.gate, expected, self.analyses)
        return Plan(tokens_at_most=answers * settings.max_new_tokens, power=power)

    def check_lengths(self, model: DeployedModel) -> None:
        """Raise UsageError for a context beyond the model's, or questions beyond the context."""
        room = self.settings.context_tokens
        longest = max(len(model.encoder.encode(problem.question)) for problem in self.problems)
        if room > model.context_limit or longest >= room:
            raise UsageError(
                "questions-beyond-context",
                f"{model.name} is made for {model.context_limit:,} tokens, the longest question "
                f"has {longest:,}, and the context is {room:,}",
                remedy=f"--context-tokens {min(room, model.context_limit)}, or shorter questions",
            )

    def fingerprint(self, url: str = "") -> Json:
        """Return the machine, engine settings and server that answers depend on.

        Args:
            url: of a server; empty for a file.
        """
        served = {"server": {"url": url, "api": self.server.api}} if url else {}
        return fingerprint(self.engine) | served

    def make_sampler(self, subject: Subject) -> AnswerSampler:
        """Return the sampler of a model's answers, with its own thinking control and budget."""
        budget = subject.max_thinking_tokens or self.settings.max_thinking_tokens
        return AnswerSampler(
            encoder=subject.encoder,
            tags=subject.tags,
            stop_ids=subject.stop_ids,
            settings=self.settings.model_copy(update={"max_thinking_tokens": budget}),
            progress=self.progress,
            control=subject.control,
            label=subject.label,
        )

    def answer(
        self, subject: Subject, arm: str, problems: Sequence[Problem] = ()
    ) -> tuple[ArmResult, SampledAnswers]:
        """Answer all problems, or those given; resumed where files and settings are the same."""
        answers = self.cache.answer(
            subject,
            self.make_sampler(subject),
            partial(self.open, subject),
            problems=problems or self.problems,
            arm=arm,
            inputs=self.identify(subject),
            is_interim=self.is_interim,
        )
        result = ArmResult(
            name=arm,
            records=answers.records,
            size_bytes=subject.size_bytes,
            quant=subject.quant,
            sparsity=subject.sparsity,
            stats=answers.stats,
            files=subject.files,
            kernels=answers.kernels,
        )
        return result, answers

    def identify(self, subject: Subject) -> Json:
        """Return everything that a model's answers depend on, without the code."""
        # Kernels that will not be used identify the answers like kernels that are off.
        engine = self.engine
        if engine.accel == "auto" and kernels_used("auto", engine.threads) == STOCK:
            engine = replace(engine, accel="off")
        machine = self.fingerprint(subject.url)
        inputs = identify_answers(subject.files, self.make_sampler(subject), engine, machine)
        return {"backend": subject.backend, **inputs}

    def open(self, subject: Subject) -> Engine:
        """Load a model, or connect to its server."""
        if not subject.url:
            return subject.open(self.engine)

        url, _, name = subject.url.partition("#")
        options: Json = {
            "model": name,
            "key_env": self.server.key_env,
            "timeout_s": self.server.timeout_s,
        }
        if self.server.api == "completions":
            return ServerEngine(url, self.engine, tokenizer=self.server.tokenizer, **options)
        return ChatEngine(url, self.engine, self._make_chat_tokenizer(subject), **options)

    def record(self, model: DeployedModel, tasks: tuple[str, ...]) -> Reference:
        """Answer with the reference model, and return all that candidates are compared with."""
        subject = Subject.from_deployed(model)
        arm, answers = self.answer(subject, "dense")
        known = [] if model.url else answers.traces
        traces = [(prompt, ids[:_MAX_LOGIT_TOKENS]) for prompt, ids in known]
        logits = []
        if traces:
            with self.open(subject) as engine:
                logits = record_top_logits(engine, traces, self.progress)

        encoder, tokenizer = model.encoder, model.settings.tokenizer
        return Reference(
            name=model.name,
            tasks=tasks,
            settings=self.settings,
            stop_ids=tuple(sorted(tokenizer.eos_ids, key=answers.last_ids.count, reverse=True)),
            vocabulary=encoder.tokenizer.get_vocab_size(),
            open_tag=tokenizer.open_tag or "",
            probes=encode_probes(encoder),
            completions=tuple(completion for _, completion in traces),
            fingerprint=self.fingerprint(model.url),
            arm=arm,
            logits=tuple(logits),
        )

    def examine(
        self, subject: Subject, reference: Reference, findings: Findings
    ) -> tuple[Evidence, list[str]]:
        """Ask a candidate, its engine's tokenizer, and its logits where the reference has some.

        Args:
            findings: what was found in its files. Token ids in them count where the engine has no
                tokenizer.

        Returns:
            The evidence for the checks, and notes for the report.
        """
        arm, answers = self.answer(subject, "pruned")
        notes = []
        with self.open(subject) as engine:
            probes = probe_tokens(engine.tokenize, reference.probes)
            if isinstance(engine, ServerEngine):
                notes = self._describe_server(engine, subject)
                findings = _limit_to_server(findings, subject, probes)
            else:
                if probes is not None:
                    findings = replace(findings, probes=probes)
                findings = self._add_logits(findings, engine, subject, reference)

        evidence = self.weigh(subject, reference.arm, arm, findings)
        return evidence, [*notes, *note_resumed_answers(answers.reused)]

    def weigh(
        self, subject: Subject, dense: ArmResult, pruned: ArmResult, findings: Findings
    ) -> Evidence:
        """Return the evidence for the checks.

        Args:
            dense: answers of the reference.
            pruned: answers of the subject.
            findings: all that was measured besides.
        """
        return Evidence(
            **vars(findings),
            settings=self.settings,
            gate=self.gate,
            dense=dense,
            pruned=pruned,
            backend=subject.backend,
            artifact=subject.file,
            artifact_files=subject.files,
            planned=self.planned,
        )

    @contextmanager
    def until_judged(self) -> Iterator[None]:
        """Keep the answers until the body has judged them, then remove them.

        Where the body fails they stay, for the next run of this process or of another.
        """
        try:
            yield
        except BaseException:
            self.cache.release()
            raise
        self.cache.forget()

    def _add_logits(
        self, findings: Findings, engine: Engine, subject: Subject, reference: Reference
    ) -> Findings:
        """Run the reference's answers through a candidate, unless there is a reason not to."""
        if reason := reference.refuse_logits(subject.encoder):
            return replace(findings, skip_reasons={**findings.skip_reasons, "logits": reason})

        traces = reference.traces
        if not traces:
            return findings
        compared = compare_top_logits(engine, traces, reference.logits, self.progress)
        tokens = sum(len(each.kl_T) for each in compared)
        logits = LogitComparison(tokens, average(compared), traces=len(traces))
        return replace(findings, logits=logits)

    def _make_chat_tokenizer(self, subject: Subject) -> ChatTokenizer:
        """Return what maps prompt ids to questions: the server renders its own template."""
        encoder, tags = subject.encoder, subject.tags
        by_ids = {tuple(encoder.encode(each.question)): each.question for each in self.problems}
        chat = ChatTokenizer(by_ids, encoder.encode_text)
        if tags is None:
            return chat
        is_open = find_prompt_state(next(iter(by_ids)), tags) == "open"
        return replace(chat, open_ids=tags.open_ids, close_ids=tags.close_ids, starts_open=is_open)

    def _describe_server(self, engine: ServerEngine, subject: Subject) -> list[str]:
        url = subject.url.partition("#")[0]
        notes = [
            f"the answers are of what {url} serves as {engine.model!r}; its weights cannot be "
            "checked"
        ]
        if self.server.api == "chat":
            notes.append("its thinking tokens are counted by tokenizing its texts")
        return notes


def note_resumed_answers(earlier: int, whose: str = "") -> list[str]:
    """Return a note on answers that were reused from an interrupted run; empty without any."""
    return [f"{earlier} answers{whose} are of an earlier run that was interrupted"] * (earlier > 0)


def _limit_to_server(
    findings: Findings, subject: Subject, probes: tuple[TokenProbe, ...] | None
) -> Findings:
    """Return the findings with a reason for every check that a server gives no evidence for."""
    hidden = {*plugins.list_names("checks")} - {*JUDGED_BY_ANSWERS, "tokens"}
    reasons = dict.fromkeys(hidden, "the files behind a server cannot be read")
    if probes is None:
        reasons["tokens"] = "the server has no endpoint for tokenizing"
    else:
        probes = _drop_lead(probes, subject.encoder)
    skipped = {**findings.skip_reasons, **reasons}
    return replace(findings, probes=probes, skip_reasons=skipped)


def _drop_lead(probes: tuple[TokenProbe, ...], encoder: PromptEncoder) -> tuple[TokenProbe, ...]:
    """Drop a BOS that starts every text, as llama_cpp.server adds it."""
    lead = tuple(encoder.encode_text(encoder.bos_token))
    if not all(probe.actual[: len(lead)] == lead for probe in probes):
        return probes
    return tuple(replace(probe, actual=probe.actual[len(lead) :]) for probe in probes)
