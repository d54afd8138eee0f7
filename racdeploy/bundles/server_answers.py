"""Answers of a server in place of a bundle's artifact, by default from ``/chat/completions``.

The weights behind a URL cannot be inspected: checks of files and logits are skipped.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from racdeploy import __version__, plugins
from racdeploy.bundles.verify import LocalAnswerSource, note_resumed_answers
from racdeploy.engines.backends.server import ServerEngine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.errors import UsageError
from racdeploy.files.code_hashes import base_version
from racdeploy.files.stages import Stage
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.verification.answer_sampler import AnswerSampler, identify_answers
from racdeploy.verification.evidence import ArmResult, Evidence, TokenProbe
from racdeploy.verification.measurements import probe_tokens
from racdeploy.verification.probe_strings import choose_probe_strings
from racdeploy.verification.served import open_chat

ServerApi = Literal["chat", "completions"]

_JUDGED = ("accuracy", "thinking")


@dataclass(frozen=True)
class ServerAnswerSource:
    """A server that answers in place of a bundle's artifacts, with the settings of ``local``.

    Args:
        url: URL of the API, as ``http://127.0.0.1:8000/v1``.
        model: the server's name of the model; empty takes its only one.
        key_env: environment variable with the API key; empty sends none.
        api: ``chat`` sends questions as users do, ``completions`` sends token ids.
        timeout_s: maximum wait for one answer, from the first byte sent to the last received.
    """

    local: LocalAnswerSource
    url: str
    model: str
    key_env: str
    api: ServerApi
    timeout_s: float

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return self.local.fingerprint | {"server": {"url": self.url, "api": self.api}}

    def gather(self, dense: ArmResult, notes: list[str]) -> tuple[Evidence, list[str]]:
        """Ask all prompts; return the evidence for the checks, and notes for the report."""
        bundle = self.local.bundle
        sampler = self._answer_sampler
        if not all(map(bundle.gate.is_enabled, _JUDGED)):
            raise UsageError(
                "gate-lacks-checks",
                "the gate omits accuracy or thinking, the checks that a server can be verified by",
                remedy="use a gate that runs both",
            )

        with self._reach() as engine:
            name = engine.model
            log = CompletionLog(self._stage.folder / "completions.jsonl")
            answers = sampler.answer(lambda: nullcontext(engine), bundle.problems, "pruned", log)
            probes = self._probe_tokens(engine)

        # Checks without evidence are skipped, with the reason in the report.
        hidden = set(plugins.list_names("checks")) - {*_JUDGED, "tokens"}
        unseen = dict.fromkeys(hidden, "the files behind a server cannot be read")
        if probes is None:
            unseen["tokens"] = "the server has no endpoint for tokenizing"

        evidence = Evidence(
            settings=bundle.settings,
            gate=bundle.gate,
            dense=dense,
            pruned=ArmResult("pruned", answers.records),
            backend="server",
            probes=probes,
            token_differences=self._accepted,
            skip_reasons=unseen,
        )

        served = [
            f"the pruned arm is what {self.url} serves as {name!r}; its weights cannot be checked"
        ]
        if self.api == "chat":
            served.append("its thinking tokens are counted by tokenizing its texts")

        return evidence, [*served, *notes, *note_resumed_answers(answers.reused)]

    def forget(self) -> None:
        shutil.rmtree(self._stage.folder)

    @cached_property
    def _answer_sampler(self) -> AnswerSampler:
        """Answer sampler without thinking control, which is the server's task."""
        return self.local.bundle.make_uncontrolled_sampler(self.local.progress)

    @property
    def _accepted(self) -> float:
        """Share of strings that the bundle's recipe accepts as tokenized differently."""
        return self.local.bundle.contents.recipe.export.accept_token_differences

    @cached_property
    def _stage(self) -> Stage:
        local = self.local
        server = {"server": f"{self.url} {self.model} {self.api}"}
        inputs = identify_answers(
            server, self._answer_sampler, local.engine_settings, self.fingerprint
        )
        version = base_version(__version__)
        return Stage.open(local.work, "verify-served", {"version": version, **inputs})

    def _reach(self) -> ServerEngine:
        bundle = self.local.bundle
        settings = self.local.engine_settings
        names: dict[str, Any] = {
            "model": self.model,
            "key_env": self.key_env,
            "timeout_s": self.timeout_s,
        }
        if self.api == "completions":
            tokenizer = TokenizerFiles(bundle.folder).file
            return ServerEngine(self.url, settings, tokenizer=tokenizer, **names)

        sampler = self.local.answer_sampler
        texts = [problem.question for problem in bundle.problems]
        return open_chat(self.url, sampler.encoder, sampler.tags, texts, settings, **names)

    def _probe_tokens(self, engine: ServerEngine) -> tuple[TokenProbe, ...] | None:
        """Compare tokenizers; None if the server has no endpoint for it.

        A leading BOS is dropped where every text has one, as llama_cpp.server adds it.
        """
        encoder = self.local.answer_sampler.encoder
        lead = tuple(encoder.encode_text(encoder.bos_token))
        probes = probe_tokens(engine, encoder, choose_probe_strings(self._accepted))
        if not probes or not lead:
            return probes

        if any(probe.actual[: len(lead)] != lead for probe in probes):
            return probes

        return tuple(replace(probe, actual=probe.actual[len(lead) :]) for probe in probes)
