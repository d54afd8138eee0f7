"""A bundle, ready to run: render, generate, split, decode. No torch behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from racdeploy import engines
from racdeploy.accel import Mode
from racdeploy.decoding import engine as decoding
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.packing import racgguf
from racdeploy.runtime.template import Message, PromptEncoder
from racdeploy.runtime.thinking import Scanner, State, ThinkingTags, prompt_state, split, tags_of

Prompt = str | Sequence[Message]
_CHOICES = ("max_thinking_tokens", "max_new_tokens", "temperature", "top_p")
OnText = Callable[[str, Literal["thinking", "answer"]], None]


@dataclass(frozen=True)
class Result:
    """What a model said.

    Args:
        answer: text after the thinking, stripped; empty where the thinking never ended.
        thinking: text between the tags, stripped.
        state: how the thinking ended, see :class:`racdeploy.runtime.thinking.Split`.
    """

    answer: str
    thinking: str
    thinking_tokens: int
    answer_tokens: int
    finish_reason: decoding.FinishReason
    state: State


class Model(AbstractContextManager["Model"]):
    """A loaded bundle. Use it in a ``with`` block, or close it, which closes its engine."""

    def __init__(self, manifest: Manifest, encoder: PromptEncoder, engine: decoding.Engine) -> None:
        self.manifest = manifest
        self.encoder = encoder
        self.engine = engine
        open_tag, close_tag = manifest.tokenizer.open_tag, manifest.tokenizer.close_tag
        self.tags = tags_of(encoder, open_tag, close_tag) if open_tag and close_tag else None

    def generate(
        self,
        prompt: Prompt,
        *,
        max_thinking_tokens: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_text: OnText | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Answer one prompt. What is not given is taken from the bundle.

        Args:
            prompt: a question, or messages with ``role`` and ``content``.
            max_thinking_tokens: the close tag is forced after so many thinking tokens.
            max_new_tokens: cap on thinking and answer together.
            temperature: 0 is greedy.
            top_p: probability mass to sample from.
            on_text: gets each piece of text as it comes, and whether it is thinking or answer.
            cancel: set it from another thread to stop early.

        Raises:
            ArtifactError: the template failed on this conversation.
            UsageError: a thinking budget for a model without thinking tags.
            EngineError: the prompt does not fit, or the engine failed.
        """
        prompt_ids = self.encoder.encode(prompt)
        sampling = self._sampling(
            prompt_ids, seed, max_thinking_tokens, max_new_tokens, temperature, top_p
        )
        stream = _TextStream(self, prompt_ids, on_text) if on_text else None

        (completion,) = self.engine.generate(
            [prompt_ids],
            sampling,
            on_tokens=stream.feed if stream else None,
            cancelled=cancel.is_set if cancel else None,
        )

        if stream:
            stream.finish()
        return self._result(prompt_ids, completion)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_thinking_tokens: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        cancel: threading.Event | None = None,
    ) -> list[Result]:
        """Answer prompts, as many at a time as the model was loaded for; see :meth:`generate`."""
        encoded = [self.encoder.encode(prompt) for prompt in prompts]
        if not encoded:
            return []
        if len({self._starts_open(ids) for ids in encoded}) > 1:
            raise UsageError(
                "some of these prompts end inside the thinking and some do not",
                remedy="give them to generate_many in two calls",
            )

        sampling = self._sampling(
            encoded[0], seed, max_thinking_tokens, max_new_tokens, temperature, top_p
        )
        cancelled = cancel.is_set if cancel else None
        completions = self.engine.generate(encoded, sampling, cancelled=cancelled)
        return [self._result(*pair) for pair in zip(encoded, completions, strict=True)]

    def close(self) -> None:
        """Unload the model; again is harmless."""
        self.engine.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sampling(
        self, prompt_ids: Sequence[int], seed: int, *choices: float | None
    ) -> decoding.Sampling:
        """Return the bundle's sampling, with what a call gives of :data:`_CHOICES` in its place."""
        named = zip(_CHOICES, choices, strict=True)
        given = {name: value for name, value in named if value is not None}
        if "max_thinking_tokens" in given and self.tags is None:
            raise UsageError(
                "this model has no thinking tags, so max_thinking_tokens cannot apply",
                remedy="use max_new_tokens",
            )

        settings = self.manifest.generation.model_copy(update=given)

        budget = None
        if settings.max_thinking_tokens is not None and self.tags is not None:
            budget = decoding.ThinkingBudget(
                close_ids=self.tags.close_ids,
                open_ids=self.tags.open_ids,
                max_tokens=settings.max_thinking_tokens,
                starts_open=self._starts_open(prompt_ids),
            )

        return decoding.Sampling(
            settings.max_new_tokens,
            self.manifest.tokenizer.eos_ids,
            settings.temperature,
            settings.top_p,
            seed,
            budget,
        )

    def _starts_open(self, prompt_ids: Sequence[int]) -> bool:
        return self.tags is not None and prompt_state(prompt_ids, self.tags) == "open"

    def _result(self, prompt_ids: Sequence[int], completion: decoding.Completion) -> Result:
        eos_ids = self.manifest.tokenizer.eos_ids
        parts = split(
            prompt_ids, completion.ids, self.tags, eos_ids=eos_ids, forced_at=completion.forced_at
        )
        return Result(
            answer=self.encoder.decode(parts.answer_ids).strip(),
            thinking=self.encoder.decode(parts.thinking_ids).strip(),
            thinking_tokens=len(parts.thinking_ids),
            answer_tokens=len(parts.answer_ids),
            finish_reason=completion.finish_reason,
            state=parts.state,
        )


class _TextStream:
    """Turns new ids into text as they come: tags left out, characters whole."""

    def __init__(self, model: Model, prompt_ids: Sequence[int], on_text: OnText) -> None:
        # Ids that never come stand for the tags of a model without.
        self._tags = model.tags or ThinkingTags((-1,), (-1,))
        self._encoder = model.encoder
        self._eos_ids = model.manifest.tokenizer.eos_ids
        self._on_text = on_text
        self._scanner = Scanner(prompt_ids, self._tags)

        # What is between them is shown already, and is the context that the next ids need.
        self._prefix = 0
        self._read = 0

    def feed(self, index: int, ids: Sequence[int]) -> None:
        scanner = self._scanner
        for token in ids:
            if token in self._eos_ids:
                continue
            inside = scanner.inside
            start = scanner.start
            scanner.feed(token)

            if scanner.start == start:
                self._show(len(scanner.ids) - scanner.count_held_back(), inside)
                continue

            # A tag ended here. Before a close tag alone, everything is shown already.
            if scanner.inside or inside:
                tag = self._tags.close_ids if inside else self._tags.open_ids
                self._show(len(scanner.ids) - len(tag), inside, whole=True)

            self._prefix = self._read = scanner.start

    def finish(self) -> None:
        """Show what was held back as the possible beginning of a tag or half a character."""
        self._show(len(self._scanner.ids), self._scanner.inside, whole=True)

    def _show(self, stop: int, inside: bool, whole: bool = False) -> None:
        ids = self._scanner.ids
        text = self._encoder.decode(ids[self._prefix : stop])
        shown = self._encoder.decode(ids[self._prefix : self._read])

        is_cut = text.endswith("\ufffd") and not whole  # in the middle of a character
        if stop <= self._read or is_cut:
            return

        self._prefix = self._read
        self._read = stop
        if new_text := text[len(shown) :]:
            self._on_text(new_text, "thinking" if inside else "answer")


def load(
    bundle: str | Path,
    *,
    backend: str | None = None,
    threads: int = 0,
    parallel: int = 1,
    context_tokens: int | None = None,
    accel: Mode = "auto",
) -> Model:
    """Load a bundle.

    Args:
        bundle: folder that ``racdeploy build`` wrote.
        backend: engine to use where the bundle has artifacts for several; None takes the first.
        threads: 0 uses every core.
        parallel: prompts that :meth:`Model.generate_many` decodes together; each takes memory for a
            context.
        context_tokens: longest prompt and completion together; None takes what the bundle was
            verified with. It takes memory, and the model is made for a limited number.
        accel: kernels for sparse weights; ``auto`` uses them where they are built and proven.

    Raises:
        ArtifactError: not a bundle, or its tokenizer or packed artifact differs from its manifest.
        UsageError: it has no artifact for that backend, or the model is made for less context.
        MissingExtraError: the engine is not installed.
        EngineError: the engine cannot load the artifact.
    """
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    artifact = _choose_artifact(manifest, folder, backend)
    manifest.check_tokenizer(folder)
    check_unpacked(folder, artifact)

    encoder = PromptEncoder.from_folder(folder)
    settings = decoding.EngineSettings(
        _choose_context(manifest, context_tokens), parallel=parallel, threads=threads, accel=accel
    )
    engine = engines.open_engine(artifact.backend, folder / artifact.path, settings)

    try:
        return Model(manifest, encoder, engine)
    except BaseException:
        engine.close()
        raise


def _choose_context(manifest: Manifest, asked: int | None) -> int:
    """Return the context to load a model with; one that it is not made for is refused."""
    generation = manifest.generation
    if asked is None:
        return generation.context_tokens

    most = generation.model_context_tokens
    if most is not None and asked > most:
        raise UsageError(
            f"context_tokens is {asked}, and the model is made for {most}",
            remedy=f"racdeploy.load(…, context_tokens={most})",
        )
    return asked


def check_unpacked(folder: Path, artifact: ArtifactEntry) -> None:
    """Compare what a packed artifact holds with the manifest; a container says it of itself."""
    if artifact.packing == "plain":
        return
    if not artifact.path.endswith(racgguf.SUFFIX):
        artifact.check(folder)
        return

    found = racgguf.Container.open(folder / artifact.path).sha256
    if found != artifact.unpacked_sha256:
        raise ArtifactError(
            f"{folder / artifact.path} holds a file with SHA-256 {found[:16]}…, its manifest says "
            f"{artifact.unpacked_sha256[:16]}…",
            remedy="copy the bundle again, or build it again",
        )


def _choose_artifact(manifest: Manifest, folder: Path, backend: str | None) -> ArtifactEntry:
    for entry in manifest.artifacts:
        if backend is None or entry.backend == backend:
            return entry

    offered = ", ".join(sorted({entry.backend for entry in manifest.artifacts}))
    raise UsageError(
        f"{folder} has no artifact for {backend!r}", remedy=f"it has one for: {offered}"
    )
