"""Text that a model writes without a prompt, from the beginning of a text, in the form of traces.

Calibrated on its answers alone, a model stays near to itself in those, and less so in other text.
What it writes freely is as varied as what it has learned, and needs nobody's data.
Source: Williams et al., "Self-calibration for Language Model Quantization and Pruning", arXiv
2410.17170; the whole distribution is sampled here, where they begin with a higher temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion, Ids, Sampling
from racdeploy.traces.collect import CompletionSource
from racdeploy.traces.text import TEXT_TASK
from racdeploy.traces.trace import Trace, TraceSet, count_tokens

TOKENS = 256
"""Maximum of a text: many short ones have more beginnings than a few long ones."""
_TEXTS_TOGETHER = 16
"""Texts of a shard at most."""
_SEED_STRIDE = 1_000_003  # above any number of shards
_MOST_SHARDS = 4
"""Times as many texts as would be enough if all were whole: some models end a text at once."""


def write_own_text(
    source: CompletionSource,
    out: TraceSet,
    first_ids: Ids,
    *,
    stop_ids: Ids,
    tokens: int,
    seed: int,
    completion_progress: CompletionProgress,
) -> list[Trace]:
    """Let a model write ``tokens`` tokens, up to the end of a text; finished shards are reused.

    Args:
        first_ids: what a text of the model begins with.
        stop_ids: ids that end a text.
    """
    together = count_texts_together(tokens)
    number = 0
    while number < _MOST_SHARDS * count_shards(tokens) and count_tokens(out.read()) < tokens:
        if not out.shard(number).is_file():
            sampling = Sampling(
                max_new_tokens=TOKENS,
                stop_ids=stop_ids,
                temperature=1.0,
                seed=seed * _SEED_STRIDE + number,
            )
            (completions,) = source.answer([([[*first_ids]] * together, sampling)])
            out.append(number, _make_traces(number * together, first_ids, completions))
        number += 1
        completion_progress.set_saved(out.count())
    return take_tokens(out.read(), tokens)


def take_tokens(texts: Sequence[Trace], tokens: int) -> list[Trace]:
    """Return the first texts that have so many tokens together, of which the last may have more."""
    taken = []
    left = tokens
    for text in texts:
        if left <= 0:
            break
        taken.append(text)
        left -= len(text.ids)
    return taken


def count_texts_together(tokens: int) -> int:
    """Return how many texts are written together: few where a few tokens are asked for."""
    return min(_TEXTS_TOGETHER, math.ceil(tokens / TOKENS))


def count_shards(tokens: int) -> int:
    """Return how many shards have that many tokens if no text ends early."""
    return math.ceil(tokens / (TOKENS * count_texts_together(tokens)))


def _make_traces(start: int, first_ids: Ids, completions: Sequence[Completion]) -> list[Trace]:
    traces = []
    for index, completion in enumerate(completions, start):
        trace = Trace(
            index,
            TEXT_TASK,
            question="",
            gold="",
            prompt_ids=first_ids,
            completion_ids=completion.ids,
            thinking_tokens=len(completion.ids),
            truncated=completion.finish_reason != "stop",
        )
        traces.append(trace)
    return traces
