"""Which tokens a pruned model keeps: what its traces, prompts and the user's texts need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.structures import vocabulary
from racdeploy.recipe import Structure
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class VocabularyChoice:
    """The choice for a dense model; ``questions`` are asked when it is calibrated and verified."""

    dense: Checkpoint
    encoder: PromptEncoder
    questions: tuple[str, ...]
    settings: Structure

    @property
    def keep(self) -> float:
        """A share of the tokens up to 1, or a count."""
        return self.settings.keep["vocabulary"]

    def choose(self, traces: Sequence[Trace] = ()) -> NDArray[np.int64]:
        """Return the ids that stay, rising; a UsageError says that they are more than asked for.

        Before there are traces, that is known of prompts and texts alone.
        """
        used: set[int] = set()
        for text in self.texts(traces):
            used.update(self.encoder.encode_text(text))

        # A model may write a text in other tokens than the tokenizer.
        for trace in traces:
            used.update(trace.ids)

        return vocabulary.choose(self.dense, self.keep, used)

    def texts(self, traces: Sequence[Trace]) -> Iterator[str]:
        """Yield all texts that are to be cut into tokens as before."""
        yield from map(self.encoder.render, self.questions)
        yield from vocabulary.read_texts(self.settings.vocabulary_text)
        for trace in traces:
            yield self.encoder.decode(trace.ids)
