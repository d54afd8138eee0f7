"""``/chat/completions`` as an engine: what users of a server read, turned back into tokens.

The server renders its own template, so what is asked is the question behind the prompt ids. Texts
are tokenized here, tags put back: the ids are not proven to be the ones that were generated.
Source: the servers' documentation; llama_cpp/server/app.py of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from racdeploy.engines.backends.openai.answers import find_usage, read_choice
from racdeploy.engines.backends.openai.engine import OnEnd, OpenAIEngine, Request, bound_answer
from racdeploy.engines.backends.openai.http import ODD
from racdeploy.engines.engine import Cancel, Completion, EngineSettings
from racdeploy.errors import EngineError
from racdeploy.files.reading import Json


@dataclass(frozen=True)
class Conversation:
    """How questions and texts relate to the model's tokens.

    Args:
        questions: the question behind the ids of each rendered prompt.
        encode: ids of a text, special tokens parsed.
        open_ids, close_ids: of the thinking tags; empty for a model that does not think.
        starts_open: whether a prompt ends inside the thinking.
    """

    questions: Mapping[tuple[int, ...], str]
    encode: Callable[[str], list[int]]
    open_ids: tuple[int, ...] = ()
    close_ids: tuple[int, ...] = ()
    starts_open: bool = False

    def ids(self, answer: _Answer) -> list[int]:
        """Return the ids of an answer, without end-of-sequence."""
        if answer.thinking:
            return self._join(answer)

        ids = self.encode(answer.text)
        repeats_tag = self.starts_open and tuple(ids[: len(self.open_ids)]) == self.open_ids
        return ids[len(self.open_ids) :] if repeats_tag else ids

    def _join(self, answer: _Answer) -> list[int]:
        """Put the tags back that the server took out with the thinking."""
        ids = [] if self.starts_open else list(self.open_ids)
        ids += self.encode(answer.thinking)
        if answer.text or answer.finish_reason == "stop":
            ids += self.close_ids
        return ids + self.encode(answer.text)


class ChatEngine(OpenAIEngine):
    """A model behind ``/chat/completions``; see :class:`OpenAIEngine` for what is not said here."""

    def __init__(
        self, url: str, settings: EngineSettings, conversation: Conversation, **options: Any
    ) -> None:
        super().__init__(url, settings, **options)
        self._conversation = conversation
        self._silent: list[bool] = []

    def complete(
        self, requests: Sequence[Request], on_end: OnEnd, cancelled: Cancel | None = None
    ) -> None:
        """Ask every question; refuse answers that all leave out their thinking."""
        self._silent = []
        super().complete(requests, on_end, cancelled)
        if self._silent and all(self._silent):
            raise EngineError(
                "thinking-hidden",
                f"none of {len(self._silent)} answers tells where its thinking ends, and the "
                "server counts more tokens than their texts hold: it leaves the thinking or its "
                "tags out",
                remedy="start it so that it returns reasoning_content or shows special tokens, or "
                "ask its completions: --server-api completions",
            )

    async def _complete(self, request: Request) -> Completion:
        ids, sampling, _ = request
        question = self._conversation.questions[tuple(ids)]
        body = self._write_request(request)
        body["messages"] = [{"role": "user", "content": question}]
        cap = body["max_tokens"]

        most_bytes = bound_answer(len(ids), cap)
        path = "chat/completions"
        answer = _read(await self._client.request(path, body, most_bytes=most_bytes))

        is_full = answer.counted is None or answer.counted >= cap
        if answer.finish_reason == "length" and not is_full:
            raise EngineError(
                "server-context-too-short",
                f"the server stopped after {answer.counted} of {cap} tokens: "
                "its context is too short",
                remedy="start it with a longer context",
            )

        found = self._conversation.ids(answer)
        if answer.finish_reason == "length":
            return Completion(tuple(found), "length")

        if self._conversation.close_ids:
            self._silent.append(self._hides_thinking(answer, found))
        return Completion((*found, *sampling.stop_ids[:1]), "stop")

    def _hides_thinking(self, answer: _Answer, ids: Sequence[int]) -> bool:
        """Return whether tokens are missing in an answer that shows no thinking."""
        close_ids = list(self._conversation.close_ids)
        for start in range(len(ids) - len(close_ids) + 1):
            if list(ids[start : start + len(close_ids)]) == close_ids:
                return False

        ends = 0 if self._takes_text else 1  # llama_cpp.server does not count end-of-sequence
        return answer.counted is None or answer.counted > len(ids) + ends


@dataclass(frozen=True)
class _Answer:
    """The text that a user sees, the thinking split off before, and the tokens counted for both."""

    text: str
    thinking: str
    finish_reason: Literal["stop", "length"]
    counted: int | None


def _read(body: Json) -> _Answer:
    choice = read_choice(body)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise EngineError("no-server-message", "the server's answer holds no message", remedy=ODD)

    text = message.get("content") or ""
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(thinking, str):
        raise EngineError(
            "odd-server-answer",
            f"the server answers with {str(message)[:80]} in place of texts",
            remedy=ODD,
        )

    counted = find_usage(body, "completion_tokens")
    return _Answer(text, thinking, choice["finish_reason"], counted)
