"""Read token ids from answers of ``/completions``; ids that are not exact are an error.

Where the server returns no ids, the text is tokenized again. The ids are accepted if they decode to
the same text and are as many as the server generated.
Source: vLLM 0.10.2 and SGLang 0.5.9 ``return_token_ids``; llama.cpp tools/server server-task.cpp
and llama_cpp/llama.py of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.engines.engine import Completion
from racdeploy.errors import EngineError
from racdeploy.files.reading import Json
from racdeploy.sandbox.tokenizer import Tokenizer

CHECK_SERVER = "check the server's log and version: its answer is not that of OpenAI's API"
_USE_EXACT_SERVER = (
    "use a server that returns token ids: vLLM 0.10.2 or newer, a recent SGLang, or llama-server"
)


class RefusedError(EngineError):
    """The server has no such endpoint, or refuses such a request."""


@dataclass(frozen=True)
class CompletionReader:
    """Reads completions from a server's answers.

    Args:
        tokenizer: the model's, or None: then the server must return ids.
        counts_end: whether the server counts the end-of-sequence id among the generated tokens.
            With None, unknown, texts are refused: a lost token would look like that id.
    """

    tokenizer: Tokenizer | None
    vocabulary: int
    counts_end: bool | None

    def read(
        self, answer: Json, prompt: Sequence[int], stop_ids: Sequence[int], cap: int
    ) -> Completion:
        """Return the completion in an answer; EngineError where its exact ids are unknown."""
        choice = read_choice(answer)

        # vLLM returns the ids that it read.
        count = read_usage(answer, "prompt_tokens")
        read_ids = choice.get("prompt_token_ids")
        if count != len(prompt) or (read_ids is not None and read_ids != list(prompt)):
            raise EngineError(
                "server-changes-prompt",
                f"the server read {count} prompt tokens where {len(prompt)} were sent",
                remedy="start it without options that change prompts, such as one that adds a "
                "beginning-of-sequence token",
            )

        ids = _returned_ids(answer, choice, self.vocabulary)
        if ids is None:
            ids = self._tokenize_text(answer, choice, stop_ids)

        # Some servers generate beyond the cap to complete a character.
        ended = choice["finish_reason"] == "stop" and len(ids) <= cap
        ids = ids[:cap]

        if ended and (not ids or ids[-1] not in stop_ids):
            raise EngineError(
                "end-ids-differ",
                f"the server ended a completion at token id {ids[-1] if ids else 'none'}; the "
                f"model's end-of-sequence ids are {', '.join(map(str, stop_ids)) or 'none'}",
                remedy="compare generation_config.json here with that of the served model",
            )

        if not ended and len(ids) < cap:
            raise EngineError(
                "server-context-too-short",
                f"the server stopped after {len(ids)} of {cap} tokens "
                f"({choice['finish_reason']!r}): its context does not hold {len(prompt) + cap} "
                "tokens",
                remedy="start it with a longer context, or lower traces.max_new_tokens",
            )

        return Completion(tuple(ids), "stop" if ended else "length")

    def _tokenize_text(self, answer: Json, choice: Json, stop_ids: Sequence[int]) -> list[int]:
        """Return the ids of a completion's text, checked by its decoding and the server's count."""
        text = choice.get("text")
        ended = choice["finish_reason"] == "stop"

        if self.tokenizer is None or self.counts_end is None or not isinstance(text, str):
            raise EngineError(
                "no-server-token-ids", "the server returns no token ids", remedy=_USE_EXACT_SERVER
            )

        ids = self.tokenizer.encode(text)
        generated = read_usage(answer, "completion_tokens")
        if ended and self.counts_end:
            generated -= 1  # the end-of-sequence has no text
        is_whole = "\ufffd" not in text  # it replaces bytes of an incomplete character
        gives_same_text = self.tokenizer.decode(ids) == text

        if len(ids) != generated or not is_whole or not gives_same_text:
            raise EngineError(
                "token-ids-unproven",
                f"the server returns no token ids, and its text gives {len(ids)} where it "
                f"generated {generated}: a special token or part of a character is missing in "
                f"{text[-40:]!r}, or was tokenized differently",
                remedy=_USE_EXACT_SERVER,
            )

        return [*ids, _end_id(choice, stop_ids)] if ended else ids


def _end_id(choice: Json, stop_ids: Sequence[int]) -> int:
    """Return the end-of-sequence id that the server names, or the only one."""
    named = choice.get("stop_reason", choice.get("matched_stop"))
    if type(named) is int and named in stop_ids:
        return named

    if len(stop_ids) != 1:
        ids = ", ".join(map(str, stop_ids))
        raise EngineError(
            "end-id-unknown",
            f"the server does not say which of the end-of-sequence ids {ids} it generated",
            remedy=_USE_EXACT_SERVER,
        )

    return stop_ids[0]


def find_usage(answer: Json, key: str) -> int | None:
    """Return a token count of the server, or None."""
    usage = answer.get("usage")
    count = usage.get(key) if isinstance(usage, dict) else None
    return count if type(count) is int else None


def read_usage(answer: Json, key: str) -> int:
    """Return a token count of the server; EngineError without one."""
    count = find_usage(answer, key)
    if count is None:
        raise EngineError(
            "odd-server-answer", f"the server's answer has no usage.{key}", remedy=CHECK_SERVER
        )
    return count


def read_choice(answer: Json) -> Json:
    """Return the only choice of an answer; EngineError for an unknown finish reason."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise EngineError(
            "no-server-choice",
            "the server's answer holds no choice, or more than one",
            remedy=CHECK_SERVER,
        )

    choice: Json = choices[0]
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise EngineError(
            "odd-server-answer",
            f"the server ended a completion with {str(reason)[:60]!r}",
            remedy=CHECK_SERVER,
        )

    return choice


def _returned_ids(answer: Json, choice: Json, vocabulary: int) -> list[int] | None:
    verbose = answer.get("__verbose")
    verbose_ids = verbose.get("tokens") if isinstance(verbose, dict) else None  # llama-server
    ids = choice.get("token_ids", verbose_ids)
    if ids is None:
        return None

    are_known = isinstance(ids, list) and all(
        type(token) is int and 0 <= token < vocabulary for token in ids
    )
    if not are_known:
        raise EngineError(
            "odd-server-answer",
            f"the server returns token ids that the model does not have: {str(ids)[:60]}",
            remedy=CHECK_SERVER,
        )

    count = read_usage(answer, "completion_tokens")
    if len(ids) != count:
        raise EngineError(
            "odd-server-answer",
            f"the server returns {len(ids)} token ids and counts {count}",
            remedy=CHECK_SERVER,
        )

    return list(ids)
