"""Questions to a deployed model: its answers, and all else that the checks need.

Answers are kept in the work folder until all are judged, so that an interrupted run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from racdeploy import __version__, plugins
from racdeploy.engines import open_engine
from racdeploy.engines.backends.server import ServerEngine
from racdeploy.engines.backends.server.chat import ChatEngine, ChatTokenizer
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import Engine, EngineSettings, Progress
from racdeploy.errors import UsageError
from racdeploy.files.code_hashes import base_version
from racdeploy.files.reading import Json
from racdeploy.files.stages import Stage
from racdeploy.recipe import Verification
from racdeploy.runtime.deployed import DeployedModel
from racdeploy.runtime.thinking import find_prompt_state
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import AnswerSampler, SampledAnswers, identify_answers
from racdeploy.verification.evidence import ArmResult, Evidence, LogitComparison, TokenProbe
from racdeploy.verification.gate import Gate
from racdeploy.verification.measurements import encode_probes, fingerprint, probe_tokens
from racdeploy.verification.plan import Expectation, plan
from racdeploy.verification.reference import Reference
from racdeploy.verification.top_logits import average, compare_top_logits, record_top_logits

ServerApi = Literal["chat", "completions"]
_MAX_LOGIT_TOKENS = 256  # of an answer, whose logits are compared
_JUDGED_BY_SERVER = ("accuracy", "thinking")


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
    """Asks models the same problems, each on its engine or server."""

    problems: Sequence[Problem]
    settings: Verification
    gate: Gate
    work: Path
    engine: EngineSettings
    progress: Progress | None = None
    server: ServerOptions = field(default_factory=ServerOptions)
    _used: set[Path] = field(default_factory=set, init=False, compare=False)

    def plan(self, models: Sequence[DeployedModel], expected: Expectation) -> Json:
        """Return costs and power; raise UsageError for what would fail after the first answers."""
        for model in models:
            self.check_lengths(model)
            if model.url and not all(map(self.gate.is_enabled, _JUDGED_BY_SERVER)):
                raise UsageError(
                    "gate-lacks-checks",
                    "the gate omits accuracy or thinking, the checks that a server can be verified "
                    "by",
                    remedy="use a gate that runs both",
                )

        settings, prompts = self.settings, len(self.problems)
        answers = prompts * settings.samples * len(models)
        power = plan(settings, self.gate, expected, prompts)
        return {"tokens_at_most": answers * settings.max_new_tokens, **power}

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

    def fingerprint(self, model: DeployedModel) -> Json:
        """Return the machine, engine settings and server that answers depend on."""
        served = {"server": {"url": model.url, "api": self.server.api}} if model.url else {}
        return fingerprint(self.engine) | served

    def make_sampler(self, model: DeployedModel) -> AnswerSampler:
        """Return the sampler of a model's answers, with its own thinking control and budget."""
        known, generation = model.manifest.tokenizer, model.manifest.generation
        budget = generation.max_thinking_tokens or self.settings.max_thinking_tokens
        settings = self.settings.model_copy(update={"max_thinking_tokens": budget})
        asked = (model.encoder, model.tags, known.eos_ids, settings)
        label = f"ask {model.url or model.entry.path}"
        return AnswerSampler(*asked, self.progress, generation.thinking, label)

    def answer(self, model: DeployedModel, arm: str) -> tuple[ArmResult, SampledAnswers]:
        """Answer all problems; resumed where files and settings are the same."""
        files = model.hash_files()
        stage = Stage.open(self.work, "verify", self.identify(model, files))
        self._used.add(stage.folder)

        log = CompletionLog(stage.folder / "completions.jsonl")
        sampler, opener = self.make_sampler(model), partial(self.open, model)
        answers = sampler.answer(opener, self.problems, arm, log)
        size_bytes = model.entry.size_bytes or None
        known = (size_bytes, model.entry.quant, None, answers.stats, files, answers.kernels)
        return ArmResult(arm, answers.records, *known), answers

    def identify(self, model: DeployedModel, files: Mapping[str, str]) -> Json:
        """Return everything that answers of a model with these file hashes depend on."""
        machine = self.fingerprint(model)
        inputs = identify_answers(files, self.make_sampler(model), self.engine, machine)
        return {"version": base_version(__version__), "backend": model.entry.backend, **inputs}

    def open(self, model: DeployedModel) -> Engine:
        """Load a model, or connect to its server."""
        if not model.url:
            return open_engine(model.entry.backend, model.path, self.engine)

        url, _, name = model.url.partition("#")
        options: Json = {
            "model": name,
            "key_env": self.server.key_env,
            "timeout_s": self.server.timeout_s,
        }
        if self.server.api == "completions":
            return ServerEngine(url, self.engine, tokenizer=self.server.tokenizer, **options)
        return ChatEngine(url, self.engine, self._make_chat_tokenizer(model), **options)

    def record(self, model: DeployedModel, tasks: tuple[str, ...]) -> Reference:
        """Answer with the reference model, and return all that candidates are compared with."""
        arm, answers = self.answer(model, "dense")
        known = [] if model.url else answers.traces
        traces = [(prompt, ids[:_MAX_LOGIT_TOKENS]) for prompt, ids in known]
        logits = []
        if traces:
            with self.open(model) as engine:
                logits = record_top_logits(engine, traces, self.progress)

        encoder, tokenizer = model.encoder, model.manifest.tokenizer
        return Reference(
            name=model.name,
            tasks=tasks,
            settings=self.settings,
            stop_ids=tuple(sorted(tokenizer.eos_ids, key=answers.last_ids.count, reverse=True)),
            vocabulary=encoder.tokenizer.get_vocab_size(),
            open_tag=tokenizer.open_tag or "",
            probes=encode_probes(encoder),
            completions=tuple(completion for _, completion in traces),
            fingerprint=self.fingerprint(model),
            arm=arm,
            logits=tuple(logits),
        )

    def examine(self, model: DeployedModel, reference: Reference) -> tuple[Evidence, list[str]]:
        """Ask a candidate; return the evidence for the checks, and notes for the report."""
        arm, answers = self.answer(model, "pruned")
        with self.open(model) as engine:
            probes = probe_tokens(engine.tokenize, reference.probes)
            notes, skipped, logits = [], {}, None
            if isinstance(engine, ServerEngine):
                notes = self._describe_server(engine, model)
                # Checks without evidence are skipped, with the reason in the report.
                hidden = {*plugins.list_names("checks")} - {*_JUDGED_BY_SERVER, "tokens"}
                skipped = dict.fromkeys(hidden, "the files behind a server cannot be read")
                if probes is None:
                    skipped["tokens"] = "the server has no endpoint for tokenizing"
                else:
                    probes = _drop_lead(probes, model)
            elif reason := reference.refuse_logits(model.encoder):
                skipped["logits"] = reason
            else:
                logits = self._compare_logits(engine, reference)

        evidence = Evidence(
            settings=self.settings,
            gate=self.gate,
            dense=reference.arm,
            pruned=arm,
            backend=model.entry.backend,
            artifact=model.file,
            artifact_files=arm.files,
            probes=probes,
            logits=logits,
            skip_reasons=skipped,
        )
        return evidence, [*notes, *note_resumed_answers(answers.reused)]

    def forget(self) -> None:
        """Remove the stored answers, which a finished run no longer needs."""
        for folder in self._used:
            shutil.rmtree(folder)

    def _compare_logits(self, engine: Engine, reference: Reference) -> LogitComparison | None:
        """Run the reference's answers through a candidate; None if none were recorded."""
        traces = reference.traces
        if not traces:
            return None
        compared = compare_top_logits(engine, traces, reference.logits, self.progress)
        tokens = sum(len(each.kl_T) for each in compared)
        return LogitComparison(tokens, average(compared), traces=len(traces))

    def _make_chat_tokenizer(self, model: DeployedModel) -> ChatTokenizer:
        """Return what maps prompt ids to questions: the server renders its own template."""
        encoder, tags = model.encoder, model.tags
        by_ids = {tuple(encoder.encode(each.question)): each.question for each in self.problems}
        chat = ChatTokenizer(by_ids, encoder.encode_text)
        if tags is None:
            return chat
        is_open = find_prompt_state(next(iter(by_ids)), tags) == "open"
        return replace(chat, open_ids=tags.open_ids, close_ids=tags.close_ids, starts_open=is_open)

    def _describe_server(self, engine: ServerEngine, model: DeployedModel) -> list[str]:
        url = model.url.partition("#")[0]
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


def _drop_lead(probes: tuple[TokenProbe, ...], model: DeployedModel) -> tuple[TokenProbe, ...]:
    """Drop a BOS that starts every text, as llama_cpp.server adds it."""
    lead = tuple(model.encoder.encode_text(model.encoder.bos_token))
    if not all(probe.actual[: len(lead)] == lead for probe in probes):
        return probes
    return tuple(replace(probe, actual=probe.actual[len(lead) :]) for probe in probes)
