"""Contract of inference engines: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from racdeploy.files.reading import Json

FinishReason = Literal["stop", "length", "cancelled"]
Ids = tuple[int, ...]
Logits = NDArray[np.float32]
BATCH_TOKENS = 512
"""Maximum tokens of a batch; longer prompts take several batches."""
BATCH_LOGITS_BYTES = 64 << 20
"""Maximum bytes of a batch's logits, where an engine computes those of every token."""
IsCancelled = Callable[[], bool]
"""Called while something runs; True ends it early."""


class Progress(Protocol):
    """Callback that gets a label, units done, units in all, and tokens since the work began.

    It is first called when a stage begins; units may be done by then.
    """

    def __call__(self, label: str, done: int, total: int, tokens: int = 0, /) -> None: ...


@dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine; part of the fingerprint of every result."""

    context_tokens: int = 4096  # longest prompt plus completion of one sequence
    parallel: int = 8  # sequences decoded together
    threads: int = 0  # 0 lets the engine use every core
    cache_dtype: Literal["f16", "f32", "q8_0"] = "f16"  # of the key-value cache
    flash_attention: bool = False  # always set: engines' defaults differ, and it changes traces
    # Rearrange weights for llama.cpp's fastest kernels (AMX, repacked rows).
    repack_weights: bool = True
    # Kernels of racdeploy.sparse_kernels: ``auto`` where measured faster, ``require`` or fail.
    accel: Literal["auto", "off", "require"] = "off"
    # Memory of an engine's process beyond the engine itself: 0 no limit, None by the model's size.
    memory_limit_bytes: int | None = None

    def result_settings(self) -> Json:
        """Return the settings on which results depend."""
        values = asdict(self)
        del values["memory_limit_bytes"]
        return values


@dataclass(frozen=True)
class ThinkingBudget:
    """Limit on the first thinking of a completion, and a penalty on tokens while it lasts.

    After ``max_tokens`` of thinking, a closing message and the close tag are forced, as if they
    had been generated; of a close tag that has begun, only the rest.
    """

    close_ids: Ids
    open_ids: Ids
    max_tokens: int | None  # None never forces the end
    starts_open: bool  # the rendered prompt already ends inside the thinking
    closing_message_ids: Ids = ()  # a last sentence, forced before the close tag
    hesitation_ids: Ids = ()
    hesitation_penalty: float = 0.0  # subtracted from the logits of those tokens


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a call."""

    max_new_tokens: int  # maximum of a completion, forced tokens included
    stop_ids: Ids  # the id that ends a completion is its last
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # smallest probability mass to sample from, in (0, 1]
    seed: int = 0  # each sequence has a generator of (seed, rng index), whatever the batching
    budget: ThinkingBudget | None = None
    rng_indices: tuple[int, ...] = ()  # of each sequence of a call; empty: its index
    # Ids that an earlier run has generated of each completion; the rest is what it would have been.
    resume_from: tuple[Ids, ...] = ()
    top_k: int = 0  # number of most likely tokens to sample from; 0 is all
    min_p: float = 0.0  # smallest probability to sample, as a share of the largest one
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each time it was generated
    presence_penalty: float = 0.0  # subtracted once
    schema: Json | None = None  # JSON schema of the answer, which follows the thinking

    def rng_index(self, index: int) -> int:
        """Return the index of a sequence's random generator."""
        return self.rng_indices[index] if self.rng_indices else index

    def resumed_ids(self, index: int) -> Ids:
        """Return the ids that an earlier run has generated of a sequence."""
        return tuple(self.resume_from[index]) if self.resume_from else ()


@dataclass(frozen=True)
class Completion:
    """Token ids generated after a prompt, end-of-sequence included."""

    ids: Ids
    finish_reason: FinishReason  # ``stop`` at an end-of-sequence id, ``length`` at a cap
    forced_at: int | None = None  # index in ``ids`` of a forced close tag or message


OnTokens = Callable[[int, Sequence[int], Completion | None], None]
"""Callback: index of a sequence, its new ids, and with the last ones its completion."""


class Engine(Protocol):
    """A loaded model; the end of a ``with`` block closes it."""

    stats: dict[str, float]  # times and memory; may be empty
    info: Json  # details, as the kernels in use; may be empty

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: IsCancelled | None = None,
    ) -> list[Completion]:
        """Generate a completion of every prompt, given as token ids."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """Return float32 logits_TV of a teacher-forced pass; a server raises UsageError."""

    def tokenize(self, text: str) -> list[int] | None:
        """Return the ids of a text, special tokens parsed, none added; None without a tokenizer."""
        return None

    def is_alive(self) -> bool:
        """Return whether it takes requests: its process has not died, and it is not closed."""
        return True

    def close(self) -> None:
        """Free the engine's memory and processes; may be called again."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
