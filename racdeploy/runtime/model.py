"""Model of a loaded bundle: render, generate, split, decode; without torch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict, Unpack

from racdeploy.engines import engine as decoding
from racdeploy.engines.sequence import check_length, measure_text
from racdeploy.errors import UsageError
from racdeploy.manifest import RunTimeSettings
from racdeploy.results.answers import ThinkingState
from racdeploy.runtime.control import make_budget
from racdeploy.runtime.streams import AsyncTextStream, DaemonThreadPool, TextStream
from racdeploy.runtime.template import Prompt, PromptEncoder, Tools, list_messages
from racdeploy.runtime.text import OnText, StreamDecoder
from racdeploy.runtime.thinking import (
    ThinkingTags,
    encode_tags,
    find_prompt_state,
    split_completion,
)

# Maximum threads of tasks and streams; calls beyond the engine's slots wait in the engine.
_THREADS = 256
_ADVISED = ("max_thinking_tokens", "max_new_tokens", "temperature", "top_p")
"""Options for which a bundle has values."""


class ContinuationOptions(TypedDict, total=False):
    """Options of :meth:`Model.continue_text`."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    seed: int


class GenerationOptions(ContinuationOptions, total=False):
    """Options of :meth:`Model.generate`."""

    max_thinking_tokens: int | None
    schema: dict[str, Any] | None
    tools: Tools


@dataclass(frozen=True)
class GenerationResult:
    """Result of a generation.

    Args:
        answer: text after the thinking, stripped; empty if the thinking did not end.
        thinking: text between the tags, stripped.
        state: end of the thinking, see :class:`racdeploy.runtime.thinking.SplitCompletion`.
        completion_tokens: all new tokens, with tags and end-of-sequence.
    """

    answer: str
    thinking: str
    thinking_tokens: int
    answer_tokens: int
    finish_reason: decoding.FinishReason
    state: ThinkingState
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Continuation:
    """Raw continuation of a prompt, with tags written out.

    Args:
        text: without the end-of-sequence token.
        ids: with the end-of-sequence token.
    """

    text: str
    ids: decoding.Ids
    prompt_ids: decoding.Ids
    finish_reason: decoding.FinishReason


class Model(AbstractContextManager["Model"]):
    """A loaded bundle; close it or use it in a ``with`` block, to close its engine.

    Threads and tasks may call it concurrently: up to ``parallel`` requests are decoded together,
    and each gets the same result as alone.
    """

    def __init__(
        self,
        settings: RunTimeSettings,
        encoder: PromptEncoder,
        engine: decoding.Engine,
        context_tokens: int,
    ) -> None:
        self._pool = DaemonThreadPool(_THREADS)
        self.settings = settings
        self.encoder = encoder
        self.engine = engine
        self.context_tokens = context_tokens
        tokenizer = settings.tokenizer
        self.tags = encode_tags(encoder, tokenizer.open_tag, tokenizer.close_tag)

    def __repr__(self) -> str:
        return f"<Model {self.settings.artifact.path}, {self.context_tokens} tokens>"

    def generate(
        self,
        prompt: Prompt,
        *,
        on_text: OnText | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Answer one prompt; options default to the bundle's settings.

        Args:
            prompt: a question, or messages with ``role`` and ``content``.
            on_text: called with each piece of text and its kind, ``thinking`` or ``answer``.
            cancel: event that stops the generation early, set from another thread.
            options: ``max_thinking_tokens``, after which the close tag is forced;
                ``max_new_tokens``, the limit of thinking and answer together; ``temperature``, 0
                for greedy; ``top_p``, the probability mass to sample from; ``top_k``, ``min_p`` and
                penalties, off by default, see :class:`~racdeploy.engines.engine.Sampling`; ``seed``
                of the sampling, with the same result whatever runs concurrently; ``schema``, the
                JSON schema of the answer, on llama.cpp; ``tools``, functions in OpenAI's form that
                the chat template describes to the model.

        Raises:
            ArtifactError: the chat template failed on this conversation.
            UsageError: a thinking budget for a model without thinking tags.
            ContextError: the prompt does not fit the context.
            EngineError: the engine failed, or was closed.
        """
        prompt_ids = self._encode(prompt, options.pop("tools", ()))
        sampling = self._sampling(prompt_ids, **options)
        completion = self._complete(prompt_ids, sampling, self.tags, on_text=on_text, cancel=cancel)
        return self._result(prompt_ids, completion)

    async def agenerate(
        self, prompt: Prompt, **options: Unpack[GenerationOptions]
    ) -> GenerationResult:
        """Answer one prompt without blocking the event loop; see :meth:`generate`.

        Cancelling the awaiting task stops the generation.
        """
        cancel = threading.Event()
        work = partial(self.generate, prompt, cancel=cancel, **options)

        try:
            return await asyncio.wrap_future(self._pool.submit(work))
        finally:
            cancel.set()

    def stream(
        self, prompt: Prompt, **options: Unpack[GenerationOptions]
    ) -> TextStream[GenerationResult]:
        """Return an iterator over the text as it is generated; see :meth:`generate`."""
        return TextStream(self._pool, partial(self.generate, prompt, **options))

    def astream(
        self, prompt: Prompt, **options: Unpack[GenerationOptions]
    ) -> AsyncTextStream[GenerationResult]:
        """Return an asynchronous iterator over the text; see :meth:`generate`."""
        return AsyncTextStream(self._pool, partial(self.generate, prompt, **options))

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        cancel: threading.Event | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[GenerationResult]:
        """Answer prompts, up to ``parallel`` of them together; see :meth:`generate`."""
        tools = options.pop("tools", ())
        encoded = [self._encode(prompt, tools) for prompt in prompts]
        if not encoded:
            return []
        self._check_length(max(map(len, encoded)))
        if self.tags and len({find_prompt_state(ids, self.tags) == "open" for ids in encoded}) > 1:
            raise UsageError(
                "mixed-thinking-states",
                "some of these prompts end inside a thought and some do not",
                remedy="split them into two calls of generate_many",
            )

        sampling = self._sampling(encoded[0], **options)
        cancelled = cancel.is_set if cancel else None
        completions = self.engine.generate(encoded, sampling, cancelled=cancelled)
        return [self._result(*pair) for pair in zip(encoded, completions, strict=True)]

    def continue_text(
        self,
        prompt: str | Sequence[int],
        *,
        on_text: OnText | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[ContinuationOptions],
    ) -> Continuation:
        """Continue a text or token ids without template, thinking budget or splitting.

        Raises:
            ContextError: the prompt does not fit the context.
            EngineError: the prompt is empty, or the engine failed or was closed.
        """
        ids = self.encode_text(prompt) if isinstance(prompt, str) else list(prompt)
        free = replace(self._sampling(ids, **options), budget=None)

        completion = self._complete(ids, free, None, on_text=on_text, cancel=cancel)
        text_ids = [token for token in completion.ids if token not in free.stop_ids]
        text = self.encoder.decode(text_ids)
        return Continuation(text, completion.ids, tuple(ids), completion.finish_reason)

    def acontinue_text(
        self, prompt: str | Sequence[int], **options: Unpack[ContinuationOptions]
    ) -> AsyncTextStream[Continuation]:
        """Return an asynchronous iterator over the continuation; see :meth:`continue_text`.

        All pieces have the kind ``answer``.
        """
        return AsyncTextStream(self._pool, partial(self.continue_text, prompt, **options))

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in it are parsed, none are added."""
        self._check_text(text)
        return self.encoder.encode_text(text)

    def _encode(self, prompt: Prompt, tools: Tools) -> list[int]:
        """Return the prompt ids; raise UsageError for what is no prompt."""
        if not prompt or not isinstance(prompt, str | Sequence):
            raise UsageError(
                "no-question",
                f"the prompt is {prompt!r}, neither a question nor messages",
                remedy='model.generate("What is 2 + 2?")',
            )
        contents = [str(message.get("content")) for message in list_messages(prompt)]
        self._check_text("".join(contents))
        return self.encoder.encode(prompt, tools)

    def _check_text(self, text: str) -> None:
        """Refuse a text that surely has too many tokens, before it costs time and memory."""
        if measure_text(text) >= self.context_tokens:  # a token has at least one byte
            tokens = self.encoder.tokenizer.count_at_least(text)
            self._check_length(tokens, "the text has at least")

    def _check_length(self, tokens: int, subject: str = "the prompt has") -> None:
        """Refuse more tokens than leave room; the engine knows no way out."""
        remedy = self.settings.generation.advise_context(tokens)
        check_length(tokens, subject, self.context_tokens - 1, remedy)

    def is_alive(self) -> bool:
        """Return whether prompts can be answered: neither engine nor tokenizer has ended."""
        return self.engine.is_alive() and self.encoder.tokenizer.is_alive()

    def close(self) -> None:
        """Unload the model; running generations fail with EngineError. May be called again."""
        self.engine.close()
        self.encoder.tokenizer.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(
        self,
        prompt_ids: Sequence[int],
        sampling: decoding.Sampling,
        tags: ThinkingTags | None,
        *,
        on_text: OnText | None,
        cancel: threading.Event | None,
    ) -> decoding.Completion:
        """Generate, and stream the text to ``on_text``, split by the tags."""
        self._check_length(len(prompt_ids))
        reader = None
        if on_text:
            reader = StreamDecoder(
                self.encoder,
                prompt_ids,
                tags=tags,
                eos_ids=self.settings.tokenizer.eos_ids,
                on_text=on_text,
                max_thinking_tokens=sampling.budget.max_tokens if sampling.budget else None,
            )

        (completion,) = self.engine.generate(
            [prompt_ids],
            sampling,
            on_tokens=reader.feed if reader else None,
            cancelled=cancel.is_set if cancel else None,
        )

        if reader:
            reader.finish()
        return completion

    def _sampling(
        self,
        prompt_ids: Sequence[int],
        **options: Any,
    ) -> decoding.Sampling:
        """Return the bundle's sampling, overridden by the options of a call."""
        if options.get("max_thinking_tokens") is not None and self.tags is None:
            raise UsageError(
                "no-thinking-tags",
                "this model has no thinking tags, so max_thinking_tokens cannot apply",
                remedy="use max_new_tokens",
            )

        given = {name: options.pop(name, None) for name in _ADVISED}
        overrides = {name: value for name, value in given.items() if value is not None}
        settings = self.settings.generation.model_copy(update=overrides)

        max_tokens = settings.max_thinking_tokens
        if max_tokens is None and options.get("schema") is not None:
            max_tokens = self.context_tokens  # no limit, but the engine looks for the tags
        budget = make_budget(
            self.encoder,
            self.tags,
            prompt_ids,
            max_tokens=max_tokens,
            control=settings.thinking,
        )

        return decoding.Sampling(
            settings.max_new_tokens,
            self.settings.tokenizer.eos_ids,
            settings.temperature,
            settings.top_p,
            budget=budget,
            **options,
        )

    def _result(
        self, prompt_ids: Sequence[int], completion: decoding.Completion
    ) -> GenerationResult:
        eos_ids = self.settings.tokenizer.eos_ids
        parts = split_completion(
            prompt_ids, completion.ids, self.tags, eos_ids=eos_ids, forced_at=completion.forced_at
        )
        texts = self.encoder.tokenizer.decode_batch([parts.answer_ids, parts.thinking_ids])
        return GenerationResult(
            answer=texts[0].strip(),
            thinking=texts[1].strip(),
            thinking_tokens=len(parts.thinking_ids),
            answer_tokens=len(parts.answer_ids),
            finish_reason=completion.finish_reason,
            state=parts.state,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(completion.ids),
        )
