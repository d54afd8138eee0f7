"""Which tokens a pruned model keeps: what its traces, prompts and the user's texts need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from racdeploy.files.texts import read_texts
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.structures import vocabulary
from racdeploy.recipe import Structure
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tag_names
from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class VocabularyChoice:
    """The choice for a dense model; ``questions`` are asked when it is calibrated and verified."""

    dense: Checkpoint
    encoder: PromptEncoder
    questions: tuple[str, ...]
    settings: Structure

    @cached_property
    def given_texts(self) -> tuple[str, ...]:
        """The prompts, the thinking tags, and the user's texts in pieces."""
        prompts = map(self.encoder.render, self.questions)
        tags = find_tag_names(self.encoder) or ()
        texts = read_texts(self.settings.vocabulary_text, vocabulary.TEXTS)
        return (*prompts, *tags, *texts)

    @cached_property
    def _given_ids(self) -> frozenset[int]:
        return self._find_ids(self.given_texts)

    def choose(self, traces: Sequence[Trace] = ()) -> NDArray[np.int64]:
        """Return the ids that stay, rising; a UsageError says that they are more than asked for.

        Before there are traces, that is known of prompts and texts alone.
        """
        used = self._given_ids | self._find_ids(self.decode(traces))

        # A model may write a text in other tokens than the tokenizer.
        for trace in traces:
            used = used.union(trace.ids)

        users = "the prompts, texts and traces"
        if not traces:
            users = "the prompts and texts, before any traces,"

        keep = self.settings.share("vocabulary")
        return vocabulary.choose(self.dense, keep, used, users)

    def decode(self, traces: Sequence[Trace]) -> list[str]:
        """Return the texts of traces."""
        return [self.encoder.decode(trace.ids) for trace in traces]

    def _find_ids(self, texts: Iterable[str]) -> frozenset[int]:
        used: set[int] = set()
        for text in texts:
            used.update(self.encoder.encode_text(text))
        return frozenset(used)
