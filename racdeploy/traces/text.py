"""A user's own text in the form of traces: what a model shall not forget while it recovers."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.errors import UsageError
from racdeploy.files.texts import read_texts
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace

TASK = "text"
CHUNK_TOKENS = 512
_HELD_OUT = 8  # one chunk in so many
_LEAST = 2  # chunks: one to learn, one to measure on


def text_traces(file: str, encoder: PromptEncoder) -> tuple[list[Trace], list[Trace]]:
    """Return chunks of a text that teach, and those that are held out.

    Raises:
        UsageError: the file cannot be read, or is too short to learn from and to measure on.
    """
    ids: list[int] = []
    for piece in read_texts([file], "recover.mix"):
        ids += encoder.encode_text(piece)

    chunks: list[Trace] = []
    for start in range(0, len(ids), CHUNK_TOKENS):
        own = ids[start : start + CHUNK_TOKENS]
        if len(own) > 1:
            chunks.append(_as_trace(len(chunks), own))

    if len(chunks) < _LEAST:
        raise UsageError(
            "text-too-short",
            f"{file} has {len(ids)} tokens; to learn from it and to measure on it, "
            f"more than {CHUNK_TOKENS} are needed",
            remedy="give a longer text in recover.mix, or leave it out",
        )

    held_out = chunks[_LEAST - 1 :: _HELD_OUT]
    kept = {trace.index for trace in held_out}
    return [trace for trace in chunks if trace.index not in kept], held_out


def choose_text(text: Sequence[Trace], trace_tokens: int, share: float) -> list[Trace]:
    """Return chunks, spread over the text, that are about a share of all that is learned."""
    wanted = trace_tokens * share / (1 - share)
    count = min(len(text), max(1, round(wanted / CHUNK_TOKENS)))

    chosen = []
    for part in range(count):
        chosen.append(text[part * len(text) // count])
    return chosen


def _as_trace(index: int, ids: Sequence[int]) -> Trace:
    """Return a chunk as thinking after a prompt of one token: nothing says the first one."""
    return Trace(
        index,
        TASK,
        question="",
        gold="",
        prompt_ids=tuple(ids[:1]),
        completion_ids=tuple(ids[1:]),
        thinking_tokens=len(ids) - 1,
    )
