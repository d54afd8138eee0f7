"""Ask a server, by default through ``/chat/completions``, in the place of a bundle's artifact.

Nobody sees the weights behind an address: checks of files and logits are skipped.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from racdeploy import __version__, plugins
from racdeploy.bundles.verify import ArtifactAnswerer, note_earlier
from racdeploy.engines.backends.openai import OpenAIEngine
from racdeploy.engines.backends.openai.chat import ChatEngine, Conversation
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.errors import UsageError
from racdeploy.files.addresses import release_of
from racdeploy.files.stages import Stage
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.runtime.thinking import prompt_state
from racdeploy.verify.answers import Respondent, identity
from racdeploy.verify.evidence import Arm, Evidence, TokenProbe
from racdeploy.verify.measure import probe_tokens
from racdeploy.verify.probe_strings import gate_strings

ServerApi = Literal["chat", "completions"]

_JUDGED = ("accuracy", "thinking")


@dataclass(frozen=True)
class ServerAnswerer:
    """A server in the place of a bundle's artifacts; ``local`` says how prompts are asked.

    Args:
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        model: name that the server gives the model; empty takes the only one there is.
        key_env: environment variable that holds the key; empty sends none.
        api: ``chat`` asks questions as users do, ``completions`` sends token ids.
        timeout_s: longest wait for one answer, from the first byte sent to the last one received.
    """

    local: ArtifactAnswerer
    url: str
    model: str = ""
    key_env: str = ""
    api: ServerApi = "chat"
    timeout_s: float = 1800.0

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return self.local.fingerprint | {"server": {"url": self.url, "api": self.api}}

    def gather(self, dense: Arm, notes: list[str]) -> tuple[Evidence, list[str]]:
        """Ask every prompt."""
        bundle = self.local.bundle
        respondent = self._respondent
        if not all(map(bundle.gate.runs, _JUDGED)):
            raise UsageError(
                "gate-lacks-checks",
                "the gate leaves out accuracy or thinking, which is what a server can be "
                "verified for",
                remedy="give a gate that runs both",
            )

        with self._reach() as engine:
            name = engine.model
            log = CompletionLog(self._stage.folder / "completions.jsonl")
            answers = respondent.answer(
                lambda: contextlib.nullcontext(engine), bundle.problems, "pruned", log
            )
            probes = self._probe_tokens(engine)

        hidden = set(plugins.names("checks")) - {*_JUDGED, "tokens"}
        unseen = dict.fromkeys(hidden, "a server shows no files")
        if probes is None:
            unseen["tokens"] = "the server has no endpoint that tokenizes"

        evidence = Evidence(
            settings=bundle.settings,
            gate=bundle.gate,
            dense=dense,
            pruned=Arm("pruned", answers.records),
            backend="openai",
            probes=probes,
            token_differences=self._accepted,
            unseen=unseen,
        )

        served = [
            f"the pruned arm is what {self.url} serves as {name!r}; "
            "which weights that are, nobody can see"
        ]
        if self.api == "chat":
            served.append("its thinking is counted in tokens of its texts")

        return evidence, [*served, *notes, *note_earlier(answers.earlier)]

    def forget(self) -> None:
        shutil.rmtree(self._stage.folder)

    @cached_property
    def _respondent(self) -> Respondent:
        """Who asks; what is done about the thinking is the server's to do."""
        return self.local.bundle.free_respondent(self.local.progress)

    @property
    def _accepted(self) -> float:
        """Share of the strings that the bundle's recipe lets differ."""
        return self.local.bundle.own.recipe.export.accept_token_differences

    @cached_property
    def _stage(self) -> Stage:
        local = self.local
        who = {"server": f"{self.url} {self.model} {self.api}"}
        inputs = identity(who, self._respondent, local.engine_settings, self.fingerprint)
        version = release_of(__version__)
        return Stage.open(local.work, "verify-served", {"version": version, **inputs})

    def _reach(self) -> OpenAIEngine:
        bundle = self.local.bundle
        settings = self.local.engine_settings
        names: dict[str, Any] = {
            "model": self.model,
            "key_env": self.key_env,
            "timeout_s": self.timeout_s,
        }
        if self.api == "completions":
            tokenizer = TokenizerFiles(bundle.folder).file
            return OpenAIEngine(self.url, settings, tokenizer=tokenizer, **names)

        encoder = self.local.respondent.encoder
        asked = [problem.question for problem in bundle.problems]
        questions = {tuple(encoder.encode(question)): question for question in asked}
        conversation = Conversation(questions, encoder.encode_text)
        tags = self.local.respondent.tags
        if tags is not None:
            first = next(iter(questions))
            conversation = replace(
                conversation,
                open_ids=tags.open_ids,
                close_ids=tags.close_ids,
                starts_open=prompt_state(first, tags) == "open",
            )

        return ChatEngine(self.url, settings, conversation, **names)

    def _probe_tokens(self, engine: OpenAIEngine) -> tuple[TokenProbe, ...] | None:
        """Compare tokenizers if there is an endpoint; llama_cpp.server puts a BOS before a text."""
        encoder = self.local.respondent.encoder
        lead = tuple(encoder.encode_text(encoder.bos_token))
        probes = probe_tokens(engine, encoder, gate_strings(self._accepted))
        if not probes or not lead:
            return probes

        if any(probe.actual[: len(lead)] != lead for probe in probes):
            return probes

        return tuple(replace(probe, actual=probe.actual[len(lead) :]) for probe in probes)
