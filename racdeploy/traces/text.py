"""A user's own text in the form of traces, so that a model does not forget it in recovery."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.engines.engine import Ids
from racdeploy.errors import UsageError
from racdeploy.files.texts import read_texts
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace

TEXT_TASK = "text"
CHUNK_TOKENS = 512
_HELD_OUT_PERIOD = 8  # one chunk in eight is held out
_MIN_CHUNKS = 2  # one to learn from, one to measure on


def read_text_traces(file: str, encoder: PromptEncoder) -> tuple[list[Trace], list[Trace]]:
    """Return the chunks of a text to learn from, and the held-out ones.

    Raises:
        UsageError: the file cannot be read, or is too short to learn from and to measure on.
    """
    ids = []
    for piece in read_texts([file], "recover.extra_text"):
        ids += encoder.encode_text(piece)

    pieces = split_text(ids, CHUNK_TOKENS, encoder.leading_ids)
    chunks = [_as_trace(index, *piece) for index, piece in enumerate(pieces)]
    if len(chunks) < _MIN_CHUNKS:
        raise UsageError(
            "text-too-short",
            f"{file} has {len(ids)} tokens; to learn from it and to measure on it, "
            f"more than {CHUNK_TOKENS} are needed",
            remedy="give a longer text in recover.extra_text, or leave it out",
        )

    held_out = chunks[_MIN_CHUNKS - 1 :: _HELD_OUT_PERIOD]
    indices = {trace.index for trace in held_out}
    return [trace for trace in chunks if trace.index not in indices], held_out


def split_text(
    ids: Sequence[int], length: int, leading_ids: Sequence[int]
) -> list[tuple[Ids, Ids]]:
    """Return chunks of a text as prompt and completion.

    Each begins as the model's texts begin: without that, a published model predicts it badly, and
    a comparison on it says little. Without leading ids the chunk's first token is the prompt.

    Args:
        length: of a chunk, in tokens of the text.
        leading_ids: ids that begin every text of the model.
    """
    chunks = []
    for start in range(0, len(ids), length):
        chunk = ids[start : start + length]
        whole = [*leading_ids, *chunk]
        if len(chunk) > 1:
            given = max(len(leading_ids), 1)
            chunks.append((tuple(whole[:given]), tuple(whole[given:])))
    return chunks


def choose_text_traces(text: Sequence[Trace], trace_tokens: int, share: float) -> list[Trace]:
    """Return chunks, spread over the text, for about a ``share`` of all tokens in training."""
    text_tokens = trace_tokens * share / (1 - share)
    count = min(len(text), max(1, round(text_tokens / CHUNK_TOKENS)))

    return [text[part * len(text) // count] for part in range(count)]


def _as_trace(index: int, prompt_ids: Ids, completion_ids: Ids) -> Trace:
    """Return a chunk as thinking after a prompt, which nothing predicts."""
    return Trace(
        index,
        TEXT_TASK,
        question="",
        gold="",
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        thinking_tokens=len(completion_ids),
    )
