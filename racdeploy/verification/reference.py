"""A reference model's answers, and everything that a candidate is compared with, as data.

A folder that :meth:`Reference.write` made replaces the model and its task's files: a repository
keeps it, and compares each file it ships with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field

from racdeploy.engines.engine import Ids
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.reading import Json
from racdeploy.files.writing import disk_errors, write_atomic
from racdeploy.recipe import Verification
from racdeploy.report.files import read_as, read_records
from racdeploy.results.schema import FrozenModel
from racdeploy.runtime.template import PromptEncoder
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import TraceIds, list_problems
from racdeploy.verification.evidence import ArmResult
from racdeploy.verification.top_logits import TopLogits, read_top_logits, write_top_logits

REFERENCE_NAME = "reference.json"
_FIXED_OPTIONS = (
    "prompts", "samples", "temperature", "max_new_tokens", "max_thinking_tokens", "context_tokens",
    "parallel", "seed",
)  # fmt: skip
"""Options of ``compare`` that a reference was recorded with."""


class Reference(FrozenModel):
    """Answers of a model as it was deployed.

    Args:
        tasks: specifications, as on the command line; their questions are in the records.
        settings: decoding settings, which a candidate answers with, too.
        stop_ids: end-of-sequence ids, that of most answers first.
        vocabulary: number of tokens.
        open_tag: tag before its thoughts; empty without one.
        probes: hard strings and their ids.
        completions: ids of the first answers, whose logits are compared.
        fingerprint: machine and engine.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)  # arrays of numpy

    schema_version: Literal[1] = 1
    name: str
    tasks: tuple[str, ...]
    settings: Verification
    stop_ids: Ids
    vocabulary: int
    open_tag: str = ""
    probes: dict[str, Ids]
    completions: tuple[Ids, ...] = ()
    fingerprint: Json = Field(default_factory=dict)
    arm: ArmResult
    logits: tuple[TopLogits, ...] = Field(default=(), exclude=True)

    @property
    def problems(self) -> list[Problem]:
        """The questions that it was asked, in order."""
        return list_problems(self.arm.records)

    @property
    def traces(self) -> list[TraceIds]:
        """Prompt and completion ids whose logits are recorded."""
        return [
            (record.prompt_ids, ids)
            for record, ids in zip(self.arm.records, self.completions, strict=False)
        ]

    def refuse_logits(self, encoder: PromptEncoder) -> str:
        """Return the reason why a candidate's logits cannot be compared; empty if they can."""
        if self.logits and encoder.tokenizer.get_vocab_size() != self.vocabulary:
            return "the vocabularies have different sizes"
        if self.settings.logit_traces and not self.logits:
            return "the reference has no recorded logits"
        return ""

    def write(self, folder: Path) -> None:
        """Write the reference; ``reference.json`` comes last, as the sign that all is there."""
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_top_logits(folder / "logits.npz", self.logits)
        lines = "".join(record.model_dump_json() + "\n" for record in self.arm.records)
        write_atomic(folder / "records.jsonl", lines)
        text = self.model_dump_json(exclude={"arm": {"records"}})
        write_atomic(folder / REFERENCE_NAME, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what :meth:`write` wrote; no path out of it is opened.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        found, records = read_as(cls, folder / REFERENCE_NAME), tuple(read_records(folder))
        if not records or len(found.completions) > len(records):
            raise ArtifactError(
                "reference-damaged", f"{folder} has too few records", remedy="record it again"
            )
        # Its speed and memory were those of another run, perhaps of another machine.
        arm = replace(found.arm, records=records, stats={})
        known = found.model_copy(update={"arm": arm})
        logits = read_top_logits(folder / "logits.npz", known.traces)
        return known.model_copy(update={"logits": tuple(logits)})


def check_same_questions(reference: Reference, tasks: Sequence[str]) -> None:
    """Refuse other tasks than those that were recorded."""
    if tasks and tuple(tasks) != reference.tasks:
        raise ArtifactError(
            "reference-of-other-task",
            f"the reference has answers to {', '.join(reference.tasks) or 'the procedural tasks'}",
            remedy="leave out --tasks: the questions are in the reference; or record it again",
        )


def check_same_settings(reference: Reference, options: Mapping[str, Any], folder: Path) -> None:
    """Refuse options that ask for other answers than those that were recorded.

    Args:
        options: by their names in Python; None stands for "not given".
        folder: of the reference.
    """
    recorded = reference.settings.model_dump() | {"prompts": reference.settings.count}
    changed = {}
    for name in _FIXED_OPTIONS:
        value = options.get(name)
        if value is not None and value != recorded[name]:
            changed[name] = value
    if not changed:
        return

    defaults = Verification().with_limits().model_dump() | {"prompts": None}
    command = ["racdeploy", "record", reference.name]
    for task in reference.tasks:
        command += ["--tasks", task]
    for name in _FIXED_OPTIONS:
        value = changed.get(name, recorded[name])
        if value != defaults[name]:
            command += [_name_option(name), str(value)]

    shown = ", ".join(f"{_name_option(name)} {value}" for name, value in changed.items())
    known = ", ".join(f"{_name_option(name)} {recorded[name]}" for name in changed)
    raise UsageError(
        "reference-fixes-options",
        f"{shown} would give other answers than the reference has, which was recorded with {known}",
        remedy=f"leave it out; or record again: {shlex.join([*command, '--out', str(folder)])}",
    )


def _name_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
