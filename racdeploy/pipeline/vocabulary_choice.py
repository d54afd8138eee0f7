"""Choice of the tokens that a pruned model keeps: those of traces, prompts and user texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from racdeploy.files.texts import read_texts
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import OldIds
from racdeploy.pruning.structures import vocabulary
from racdeploy.recipe import Structure
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tag_names
from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class VocabularyChoice:
    """The choice for a dense model; ``questions`` are those of calibration and evaluation."""

    dense: Checkpoint
    encoder: PromptEncoder
    questions: tuple[str, ...]
    settings: Structure

    @cached_property
    def required_texts(self) -> tuple[str, ...]:
        """The prompts, the thinking tags, and pieces of the user's texts."""
        prompts = map(self.encoder.render, self.questions)
        tags = find_tag_names(self.encoder) or ()
        texts = read_texts(self.settings.vocabulary_text, vocabulary.TEXTS_KEY)
        return (*prompts, *tags, *texts)

    def choose(self, traces: Sequence[Trace] = ()) -> OldIds:
        """Return the ids of the kept tokens, ascending.

        Without traces, only prompts and texts count: a check before the long stages.

        Raises:
            UsageError: more tokens are needed than the recipe keeps.
        """
        used = set()
        for text in (*self.required_texts, *self.decode(traces)):
            used.update(self.encoder.encode_text(text))

        # A model may write a text with other tokens than the tokenizer would.
        for trace in traces:
            used.update(trace.ids)

        source = "the prompts, texts and traces"
        if not traces:
            source = "the prompts and texts, before any traces,"

        keep = self.settings.kept_share("vocabulary")
        return vocabulary.choose(self.dense, keep, used, source)

    def decode(self, traces: Sequence[Trace]) -> list[str]:
        """Return the texts of traces."""
        return [self.encoder.decode(trace.ids) for trace in traces]
