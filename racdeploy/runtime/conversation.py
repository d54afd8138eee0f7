"""A conversation with a model: its turns are kept, and rendered by the model's own template.

Of earlier turns the model is shown the answers alone. Templates that cut past thoughts, as those of
Qwen3 and DeepSeek-R1, give the same prompt either way; for those that do not, as SmolLM3's, model
cards advise it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, Unpack

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from racdeploy.errors import ArtifactError
from racdeploy.files.reading import name_problem, read_json
from racdeploy.files.writing import write_atomic
from racdeploy.runtime.model import Model, Options, Result
from racdeploy.runtime.text import OnText


@dataclass(frozen=True)
class Turn:
    """A question and what the model said to it."""

    question: str
    result: Result


class _File(BaseModel):
    """What a saved conversation holds."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    system: str
    dropped: int = Field(ge=0)
    turns: list[Turn]


class Conversation:
    """Turns over a loaded model.

    Where question and history leave no room for an answer, the oldest turns are dropped: they stay
    in ``turns``, and the model is not shown them any more. ``dropped`` counts them. A turn without
    an answer, as one that was cancelled while the model thought, is not shown either.

    Args:
        model: stays the caller's, who closes it.
        system: message that every prompt begins with; empty for none.
    """

    def __init__(self, model: Model, system: str = "") -> None:
        self.model = model
        self.system = system
        self.turns: list[Turn] = []
        self.dropped = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the model will be shown before the next question."""
        return self._messages(self.dropped)

    def ask(
        self,
        text: str,
        *,
        on_text: OnText | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Ask the next question; arguments and errors are those of :meth:`Model.generate`."""
        dropped = self._count_dropped(text, options.get("max_new_tokens"))
        messages = [*self._messages(dropped), _say("user", text)]
        result = self.model.generate(messages, on_text=on_text, cancel=cancel, **options)

        self.dropped = dropped
        self.turns.append(Turn(text, result))
        return result

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []
        self.dropped = 0

    def save(self, path: str | Path) -> None:
        """Write the turns as JSON, thoughts included."""
        saved = _File(system=self.system, dropped=self.dropped, turns=self.turns)
        write_atomic(Path(path), saved.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, model: Model, path: str | Path) -> Self:
        """Return a saved conversation, to go on with over this model.

        Raises:
            ArtifactError: not a file that :meth:`save` wrote.
        """
        file = Path(path)
        try:
            saved = _File.model_validate(read_json(file))
        except ValidationError as error:
            raise ArtifactError(
                "not-a-conversation",
                f"{file} is not a saved conversation: {name_problem(error)}",
                remedy="give a file that Conversation.save or /save wrote",
            ) from error

        conversation = cls(model, saved.system)
        conversation.turns = saved.turns
        conversation.dropped = saved.dropped
        return conversation

    def _messages(self, first: int) -> list[dict[str, str]]:
        """Return the system message, and the turns from ``first`` on that have an answer."""
        messages = [_say("system", self.system)] if self.system else []

        for turn in self.turns[first:]:
            if turn.result.answer:
                messages.append(_say("user", turn.question))
                messages.append(_say("assistant", turn.result.answer))

        return messages

    def _count_dropped(self, text: str, max_new_tokens: int | None) -> int:
        """Return how many of the oldest turns have to go, so that thinking and answer have room.

        That room is what the model may generate, but no more than half of the context.
        """
        context_tokens = self.model.context_tokens
        most = max_new_tokens or self.model.manifest.generation.max_new_tokens
        room = min(most, context_tokens // 2)
        question = _say("user", text)

        dropped = self.dropped
        while dropped < len(self.turns):
            prompt: Sequence[int] = self.model.encoder.encode([*self._messages(dropped), question])
            if len(prompt) + room <= context_tokens:
                break
            dropped += 1

        return dropped


def _say(role: Literal["system", "user", "assistant"], content: str) -> dict[str, str]:
    return {"role": role, "content": content}
