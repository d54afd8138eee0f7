"""Engine for ``/chat/completions``: the texts that users read, turned into tokens again.

The server renders its own template, so the question behind the prompt ids is sent. Texts are
tokenized here and thinking tags added: the ids may differ from the generated ones.
Source: the servers' documentation; llama_cpp/server/app.py of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from racdeploy.engines.backends.server.answers import CHECK_SERVER, find_usage, read_choice
from racdeploy.engines.backends.server.engine import (
    CompletionRequest,
    OnEnd,
    ServerEngine,
    max_answer_bytes,
)
from racdeploy.engines.engine import Completion, EngineSettings, Ids, IsCancelled
from racdeploy.errors import EngineError
from racdeploy.files.reading import Json


@dataclass(frozen=True)
class ChatTokenizer:
    """Converts rendered prompts into questions, and a server's texts into the model's tokens.

    Args:
        questions: the question behind the ids of each rendered prompt.
        encode: returns the ids of a text, special tokens parsed.
        open_ids, close_ids: thinking tags; empty for a model without thinking.
        starts_open: whether a prompt ends inside the thinking.
    """

    questions: Mapping[Ids, str]
    encode: Callable[[str], list[int]]
    open_ids: Ids = ()
    close_ids: Ids = ()
    starts_open: bool = False

    def encode_answer(self, answer: _Answer) -> list[int]:
        """Return the ids of an answer, without end-of-sequence."""
        if answer.thinking:
            return self._join(answer)

        ids = self.encode(answer.text)
        repeats_tag = self.starts_open and tuple(ids[: len(self.open_ids)]) == self.open_ids
        return ids[len(self.open_ids) :] if repeats_tag else ids

    def _join(self, answer: _Answer) -> list[int]:
        """Return the ids with the thinking tags, which the server has removed."""
        ids = [] if self.starts_open else list(self.open_ids)
        ids += self.encode(answer.thinking)
        if answer.text or answer.finish_reason == "stop":
            ids += self.close_ids
        return ids + self.encode(answer.text)


class ChatEngine(ServerEngine):
    """A model behind ``/chat/completions``; for all else see :class:`ServerEngine`."""

    def __init__(
        self, url: str, settings: EngineSettings, conversation: ChatTokenizer, **options: Any
    ) -> None:
        super().__init__(url, settings, **options)
        self._chat_tokenizer = conversation
        self._hides_thinking: list[bool] = []

    def complete(
        self,
        requests: Sequence[CompletionRequest],
        on_end: OnEnd,
        cancelled: IsCancelled | None = None,
    ) -> None:
        """Ask every question; raise EngineError where no answer shows its thinking."""
        self._hides_thinking = []
        super().complete(requests, on_end, cancelled)
        if self._hides_thinking and all(self._hides_thinking):
            raise EngineError(
                "thinking-hidden",
                f"none of {len(self._hides_thinking)} answers shows thinking, and the server "
                "counts more tokens than their texts have: it leaves out the thinking or "
                "its tags",
                remedy="start it so that it returns reasoning_content or shows special tokens, or "
                "use its completions: --server-api completions",
            )

    async def _complete(self, request: CompletionRequest) -> Completion:
        ids, sampling, _ = request
        question = self._chat_tokenizer.questions[tuple(ids)]
        body = self._write_request(request)
        body["messages"] = [{"role": "user", "content": question}]
        max_tokens = body["max_tokens"]

        max_bytes = max_answer_bytes(len(ids), max_tokens)
        path = "chat/completions"
        answer = _read(await self._client.request(path, body, max_bytes=max_bytes))

        # A server also ends with "length" where its context is full.
        is_full = answer.token_count is None or answer.token_count >= max_tokens
        if answer.finish_reason == "length" and not is_full:
            raise EngineError(
                "server-context-too-short",
                f"the server stopped after {answer.token_count} of {max_tokens} tokens: "
                "its context is too short",
                remedy="start it with a longer context",
            )

        answer_ids = self._chat_tokenizer.encode_answer(answer)
        if answer.finish_reason == "length":
            return Completion(tuple(answer_ids), "length")

        if self._chat_tokenizer.close_ids:
            self._hides_thinking.append(self._is_thinking_hidden(answer, answer_ids))
        return Completion((*answer_ids, *sampling.stop_ids[:1]), "stop")

    def _is_thinking_hidden(self, answer: _Answer, ids: Sequence[int]) -> bool:
        """Return whether an answer without a close tag has fewer tokens than the server counts."""
        close_ids = list(self._chat_tokenizer.close_ids)
        for start in range(len(ids) - len(close_ids) + 1):
            if list(ids[start : start + len(close_ids)]) == close_ids:
                return False

        end_count = 0 if self._sends_text else 1  # llama_cpp.server does not count that id
        return answer.token_count is None or answer.token_count > len(ids) + end_count


@dataclass(frozen=True)
class _Answer:
    """Answer text, the thinking that the server has split off, and the token count of both."""

    text: str
    thinking: str
    finish_reason: Literal["stop", "length"]
    token_count: int | None


def _read(body: Json) -> _Answer:
    choice = read_choice(body)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise EngineError(
            "no-server-message", "the server's answer holds no message", remedy=CHECK_SERVER
        )

    text = message.get("content") or ""
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(thinking, str):
        raise EngineError(
            "odd-server-answer",
            f"the server answers with {str(message)[:80]} instead of texts",
            remedy=CHECK_SERVER,
        )

    token_count = find_usage(body, "completion_tokens")
    return _Answer(text, thinking, choice["finish_reason"], token_count)
