"""What an inference engine is: token ids in, token ids out, the same contract for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled"]
Ids = tuple[int, ...]
Logits = NDArray[np.float32]
LAST_SHARE = 0.25
"""Of a thinking budget: where the bias on the close tag rises."""
BATCH_TOKENS = 512
"""Most tokens that are computed at once: prompts longer than that take several batches."""
BATCH_LOGITS_BYTES = 64 << 20
"""Most logits of a batch, where an engine gives those of every token: more make batches smaller."""
Cancel = Callable[[], bool]
"""Asked while something runs; True ends it early."""


class Progress(Protocol):
    """Gets a label, units done and in all, and where the work is tokens, how many since it began.

    It is called as soon as a stage begins, with what is done by then.
    """

    def __call__(self, label: str, done: int, total: int, tokens: int = 0, /) -> None: ...


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is loaded; part of the fingerprint of every result."""

    context_tokens: int = 4096  # longest prompt plus completion of one sequence
    parallel: int = 8  # sequences decoded together
    threads: int = 0  # 0 lets the engine use every core
    cache_dtype: Literal["f16", "f32"] = "f16"  # of the key-value cache
    flash_attention: bool = False  # always set: engines' defaults differ, and it changes traces
    # Weights rearranged as llama.cpp's fastest kernels want them (AMX, repacked rows).
    repack_weights: bool = True
    # Kernels of racdeploy.sparse_kernels: ``auto`` where proven faster, ``require`` or fail.
    accel: Literal["auto", "off", "require"] = "off"
    # Of an engine's process, beside the engine itself: 0 sets none, None one by the model's size.
    memory_limit_bytes: int | None = None

    def that_decide(self) -> dict[str, Any]:
        """Return what results depend on."""
        values = asdict(self)
        del values["memory_limit_bytes"]
        return values


@dataclass(frozen=True)
class ThinkingBudget:
    """What ends the first thought, and what is discouraged while it lasts.

    After ``max_tokens`` of thinking, ``closing_ids`` and the close tag are forced, as if they had
    been generated; of a close tag that has begun, only the rest.
    """

    close_ids: Ids
    open_ids: Ids
    max_tokens: int | None  # None never forces the end
    starts_open: bool  # the rendered prompt already ends inside the thinking
    closing_ids: Ids = ()  # a last sentence
    # Added to the logit of the close tag's first token at the end of the budget; rises from nothing
    # over its last quarter.
    close_bias: float = 0.0
    hesitation_ids: Ids = ()
    hesitation_penalty: float = 0.0  # subtracted from the logits of those tokens

    def bias_at(self, thought: int) -> float:
        """Return what is added to the logit of the close tag after so many thinking tokens."""
        if not self.close_bias or self.max_tokens is None:
            return 0.0
        rise = max(1.0, self.max_tokens * LAST_SHARE)
        return self.close_bias * max(0.0, 1.0 - (self.max_tokens - thought) / rise)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int  # cap on the completion, forced tokens included
    stop_ids: Ids  # the one that stops a completion is kept in it
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # smallest probability mass to sample from, in (0, 1]
    seed: int = 0  # each sequence has a generator of ``(seed, stream)``, whatever the batching
    budget: ThinkingBudget | None = None
    streams: tuple[int, ...] = ()  # of each sequence of a call; empty takes its index
    # What an earlier run had generated of each completion; the rest is as if it had gone on.
    begun: tuple[Ids, ...] = ()

    def stream(self, index: int) -> int:
        """Return the random stream of a sequence."""
        return self.streams[index] if self.streams else index

    def begun_by(self, index: int) -> Ids:
        """Return the ids that the completion of a sequence begins with."""
        return tuple(self.begun[index]) if self.begun else ()


@dataclass(frozen=True)
class Completion:
    """Token ids that followed a prompt, end-of-sequence included."""

    ids: Ids
    finish_reason: FinishReason  # ``stop`` at an end-of-sequence id, ``length`` at a cap
    forced_at: int | None = None  # in ``ids``: the first token of a forced close tag, or None


OnTokens = Callable[[int, Sequence[int], Completion | None], None]
"""Gets the index of a sequence and its new ids while it runs, its completion with the last ones."""


class Engine(Protocol):
    """A loaded model; the end of a ``with`` block closes it."""

    stats: dict[str, float]  # its time and memory; may be empty
    about: dict[str, Any]  # what it says of itself; may be empty

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_tokens: OnTokens | None = None,
        cancelled: Cancel | None = None,
    ) -> list[Completion]:
        """Continue every prompt, given by its token ids."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """Return float32 logits_TV of a teacher-forced pass; UsageError from a server."""

    def tokenize(self, text: str) -> list[int] | None:
        """Return the ids of a text, special tokens parsed, none added; None without a tokenizer."""
        return None

    def is_alive(self) -> bool:
        """Return whether it can be asked: its process has not died, and nobody has closed it."""
        return True

    def close(self) -> None:
        """Free what the engine holds; again is harmless."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
