"""Verify what a server really serves: its answers against the dense answers of a bundle.

The server stands in the place of the bundle's artifact. By default its users' endpoint is asked, ``/chat/completions``,
so its template and what it does with the thinking are part of what is verified; ``completions`` sends the prompts'
token ids instead. Nobody sees the weights behind an address: checks of files and logits are skipped.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

from racdeploy import __version__
from racdeploy.bundles.verify import Reverification
from racdeploy.decoding.completion_log import CompletionLog
from racdeploy.engines.openai import OpenAIEngine
from racdeploy.engines.openai.chat import ChatEngine, Conversation
from racdeploy.errors import UsageError
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.report.model import CheckResult, Record, Report
from racdeploy.runtime.thinking import prompt_state
from racdeploy.storage.stages import Stage
from racdeploy.verify.answers import identity
from racdeploy.verify.evidence import Arm, Evidence, TokenProbe, run_checks
from racdeploy.verify.gate import Gate
from racdeploy.verify.measure import probe_tokens
from racdeploy.verify.probe_strings import probe_strings
from racdeploy.verify.summary import summarize

ServerApi = Literal["chat", "completions"]

_SEEN = ("accuracy", "thinking", "tokens")


@dataclass(frozen=True)
class Server:
    """Whom to ask, and how.

    Args:
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        model: name that the server gives the model; empty takes the only one there is.
        key_env: environment variable that holds the key; empty sends none.
        api: ``chat`` asks questions as users do, ``completions`` sends token ids.
    """

    url: str
    model: str = ""
    key_env: str = ""
    api: ServerApi = "chat"


@dataclass(frozen=True)
class ServedVerification(Reverification):
    """A bundle whose model is served; see :class:`Reverification`.

    Args:
        server: takes the place of the bundle's artifacts.
    """

    server: Server = Server("")

    def run(self) -> tuple[Report, list[Record]]:
        """Ask, compare and decide.

        Raises:
            UsageError: the gate, the baseline or the server's address does not fit.
            ArtifactError: the bundle is damaged.
            EngineError: the server failed, or does not tell what is needed.
        """
        self.plan()
        dense, notes = self._dense()
        with self._engine() as engine:
            name = engine.model
            opener = functools.partial(contextlib.nullcontext, engine)
            answers = self._respondent.answer(opener, self.problems, "pruned", self._log)
            probes = self._probes(engine)
        entry = self.own.manifest.artifacts[0]
        evidence = Evidence(
            settings=self.settings,
            gate=self._seen_gate,
            dense=dense,
            pruned=Arm("pruned", answers.records, 0, "", 0.0),
            backend="openai",
            artifact=self.bundle / entry.path,
            artifact_files={},
            sparsity_asked=0.0,
            probes=probes,
        )
        report = summarize(
            evidence,
            [self._explained(check) for check in run_checks(evidence)],
            linears=self.own.report.linears,
            blocks=self.own.report.blocks,
            model=self.own.report.model,
            target=self.own.report.target,
            recipe=self.own.recipe.model_dump(mode="json"),
            notes=[
                f"the pruned arm is what {self.server.url} serves as {name!r}; which weights that are, nobody can see",
                *(
                    ["its thinking is counted in tokens of its texts"]
                    if self.server.api == "chat"
                    else []
                ),
                *notes,
                *(
                    [f"{answers.earlier} answers are of an earlier run that was interrupted"]
                    if answers.earlier
                    else []
                ),
            ],
            fingerprint=self._fingerprint,
            created=datetime.now(UTC),
        )
        shutil.rmtree(self._served_stage.folder)
        unseen = {"size_bytes": None, "quant": None, "sparsity": None}
        arms = [
            arm.model_copy(update=unseen) if arm.name == "pruned" else arm for arm in report.arms
        ]
        return report.model_copy(update={"arms": tuple(arms)}), [*dense.records, *answers.records]

    @cached_property
    def _seen_gate(self) -> Gate:
        """The gate, of what can be seen from outside.

        Raises:
            UsageError: it asks for nothing that can be.
        """
        checks = tuple(name for name in _SEEN if self.gate.runs(name))
        if not {"accuracy", "thinking"} <= {*checks}:
            raise UsageError(
                "the gate leaves out accuracy or thinking, which is what a server can be verified for",
                remedy="give a gate that runs both",
            )
        return self.gate.model_copy(update={"checks": checks})

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return super()._fingerprint | {"server": {"url": self.server.url, "api": self.server.api}}

    @cached_property
    def _served_stage(self) -> Stage:
        who = {"server": f"{self.server.url} {self.server.model} {self.server.api}"}
        inputs = identity(who, self.settings, self._engine_settings, self._fingerprint)
        return Stage.open(self.work, "verify-served", {"version": __version__, **inputs})

    @property
    def _log(self) -> CompletionLog:
        return CompletionLog(self._served_stage.folder / "completions.jsonl")

    def _engine(self) -> OpenAIEngine:
        """Reach the server."""
        server, respondent = self.server, self._respondent
        names: dict[str, Any] = {"model": server.model, "key_env": server.key_env}
        if server.api == "completions":
            tokenizer = TokenizerFiles(self.bundle).file
            return OpenAIEngine(server.url, self._engine_settings, tokenizer=tokenizer, **names)
        encoder, tags = respondent.encoder, respondent.tags
        questions = {
            tuple(encoder.encode(problem.question)): problem.question for problem in self.problems
        }
        starts_open = tags is not None and prompt_state(next(iter(questions)), tags) == "open"
        conversation = Conversation(questions, encoder.encode_text, starts_open=starts_open)
        if tags is not None:
            conversation = replace(conversation, open_ids=tags.open_ids, close_ids=tags.close_ids)
        return ChatEngine(server.url, self._engine_settings, conversation, **names)

    def _probes(self, engine: OpenAIEngine) -> tuple[TokenProbe, ...] | None:
        """Compare tokenizers, where the server has an endpoint for it; llama_cpp.server puts its first token before."""
        encoder = self._respondent.encoder
        lead = tuple(encoder.encode_text(encoder.bos_token))
        probes = probe_tokens(engine, encoder, probe_strings())
        if not probes or not lead or any(probe.actual[: len(lead)] != lead for probe in probes):
            return probes
        return tuple(replace(probe, actual=probe.actual[len(lead) :]) for probe in probes)

    @staticmethod
    def _explained(check: CheckResult) -> CheckResult:
        """Return a check with the reason why a server gives it nothing to look at."""
        if check.verdict != "skipped":
            return check
        why = (
            "the server has no endpoint that tokenizes"
            if check.name == "tokens"
            else "a server shows no files"
        )
        return check.model_copy(update={"summary": why})
