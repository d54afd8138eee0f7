"""Memory of collecting traces, and the number of sequences decoded together that fits it."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.errors import EnvironmentFailure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.processes.memory import free_bytes
from racdeploy.pruning.memory_estimate import estimate_file_tracing_bytes, estimate_tracing_bytes

MAX_FREE_SHARE = 0.6
"""Most of the memory that is free now: other programs may need more later."""
_BASE_BYTES = 3 << 30
_BYTES_PER_PARAMETER = 4
"""With the base: 5.2 GiB for 600M parameters, 8.6 GiB for 1.5B. More sequences hardly pay: from 16
on, arithmetic bounds the speed of a processor."""


@dataclass(frozen=True)
class TraceMemory:
    """Memory of the answers of a model.

    Args:
        prompt_tokens: of the longest prompt.
        context_tokens: of the longest prompt and its completion.
        from_file: True under llama.cpp, False under transformers.
    """

    checkpoint: Checkpoint
    prompt_tokens: int
    context_tokens: int
    from_file: bool

    def estimate_bytes(self, sequences: int) -> int:
        """Return the peak memory of decoding so many sequences together."""
        if self.from_file:
            return estimate_file_tracing_bytes(self.checkpoint, sequences, self.context_tokens)
        return estimate_tracing_bytes(
            self.checkpoint, sequences, self.prompt_tokens, self.context_tokens
        )

    def fit_sequences(self, most: int) -> int:
        """Return the largest number of sequences that fits, at least 1 and at most ``most``."""
        free = free_bytes()
        if free is None:
            return self.fit_usual_sequences(most)
        return self._fit(most, min(self._usual_bytes, round(MAX_FREE_SHARE * free)))

    def fit_usual_sequences(self, most: int) -> int:
        """Return how many sequences fit whatever is free now: the same number in every run."""
        return self._fit(most, self._usual_bytes)

    @property
    def _usual_bytes(self) -> int:
        return _BASE_BYTES + _BYTES_PER_PARAMETER * self.checkpoint.parameters

    def _fit(self, most: int, limit: int) -> int:
        fitting = 1
        while fitting < most and self.estimate_bytes(fitting + 1) <= limit:
            fitting += 1
        return fitting

    def check(self) -> None:
        """Refuse traces for which even one sequence at a time takes more memory than is free."""
        free, least = free_bytes(), self.estimate_bytes(1)
        if free is None or least <= free:
            return

        raise EnvironmentFailure(
            "too-little-memory",
            f"traces take at least {least / 2**30:.1f} GiB of memory, one sequence of "
            f"{self.context_tokens:,} tokens at a time, and {free / 2**30:.1f} GiB are free",
            remedy="close other programs, lower traces.max_new_tokens, choose a smaller model, or "
            "let another machine answer: --traces-from http://HOST:PORT/v1",
        )
