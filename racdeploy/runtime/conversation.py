"""Conversation with a model: turns are kept and rendered by the model's chat template.

Prompts contain the answers of earlier turns without their thoughts. Templates that remove past
thoughts, as those of Qwen3 and DeepSeek-R1, give the same prompt either way; for templates that
keep them, as SmolLM3's, the model cards advise removing them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, Unpack

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from racdeploy.errors import ArtifactError
from racdeploy.files.reading import check_version, describe_validation_error, read_json
from racdeploy.files.writing import write_atomic
from racdeploy.runtime.model import GenerationOptions, GenerationResult, Model
from racdeploy.runtime.text import OnText


@dataclass(frozen=True)
class Turn:
    """A question and the model's result."""

    question: str
    result: GenerationResult


class _File(BaseModel):
    """File format of a saved conversation."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    system: str
    dropped: int = Field(ge=0)
    turns: list[Turn]


class Conversation:
    """Conversation with a loaded model.

    If question and history leave no room for an answer, the oldest turns are dropped from prompts;
    ``dropped`` counts them, and they stay in ``turns``. Turns without an answer, such as those
    cancelled during the thinking, are not part of prompts either.

    Args:
        model: a loaded model; the caller closes it.
        system: system message of every prompt; empty for none.
    """

    def __init__(self, model: Model, system: str = "") -> None:
        self.model = model
        self.system = system
        self.turns: list[Turn] = []
        self.dropped = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """Messages of the next prompt, before its question."""
        return self._messages(self.dropped)

    def ask(
        self,
        text: str,
        *,
        on_text: OnText | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Ask the next question; arguments and errors as in :meth:`Model.generate`."""
        # Drop the oldest turns until thinking and answer have room: the number of new tokens, but
        # at most half of the context, or a large limit would drop the whole history.
        context_tokens = self.model.context_tokens
        new_tokens = options.get("max_new_tokens") or self.model.settings.generation.max_new_tokens
        room = min(new_tokens, context_tokens // 2)
        question = {"role": "user", "content": text}

        dropped = self.dropped
        while dropped < len(self.turns):
            prompt: Sequence[int] = self.model.encoder.encode([*self._messages(dropped), question])
            if len(prompt) + room <= context_tokens:
                break
            dropped += 1

        messages = [*self._messages(dropped), question]
        result = self.model.generate(messages, on_text=on_text, cancel=cancel, **options)

        self.dropped = dropped
        self.turns.append(Turn(text, result))
        return result

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []
        self.dropped = 0

    def save(self, path: str | Path) -> None:
        """Write the turns as JSON, including thoughts."""
        saved = _File(system=self.system, dropped=self.dropped, turns=self.turns)
        write_atomic(Path(path), saved.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, model: Model, path: str | Path) -> Self:
        """Load a saved conversation, to continue it with this model.

        Raises:
            ArtifactError: the file was not written by :meth:`save`.
        """
        file = Path(path)
        try:
            values = read_json(file)
            check_version(_File, values, file)
            saved = _File.model_validate(values)
        except ValidationError as error:
            raise ArtifactError(
                "not-a-conversation",
                f"{file} is not a saved conversation: {describe_validation_error(error)}",
                remedy="give a file that Conversation.save or /save wrote",
            ) from error

        conversation = cls(model, saved.system)
        conversation.turns = saved.turns
        conversation.dropped = saved.dropped
        return conversation

    def _messages(self, first: int) -> list[dict[str, str]]:
        """Return the system message and the turns from ``first`` on that have an answer."""
        messages = [{"role": "system", "content": self.system}] if self.system else []

        for turn in self.turns[first:]:
            if turn.result.answer:
                messages += [
                    {"role": "user", "content": turn.question},
                    {"role": "assistant", "content": turn.result.answer},
                ]

        return messages
