"""Traces: a prompt and the model's completion of it as token ids, in shards on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from racdeploy.engines.engine import Ids
from racdeploy.files.json_lines import parse_json_lines
from racdeploy.files.writing import canonical_hash, file_sha256, write_atomic
from racdeploy.runtime.loops import measure_loop

Segment = Literal["prompt", "thinking", "answer"]
SEGMENTS: tuple[Segment, ...] = ("prompt", "thinking", "answer")


@dataclass(frozen=True)
class Trace:
    """A prompt and the model's completion of it, as token ids."""

    index: int  # position in the trace set
    task: str  # specification of its task
    question: str
    gold: str
    prompt_ids: Ids
    completion_ids: Ids = ()  # sampled, end-of-sequence included
    answer_from: int | None = None  # first token of ``completion_ids`` after the close tag, if any
    thinking_tokens: int = 0  # strictly between the tags
    truncated: bool = False  # the completion hit a cap
    correct: bool = False

    def segments(self) -> list[int]:
        """Return, for every token, the index of its segment in ``SEGMENTS``."""
        completion = len(self.completion_ids)
        thinking = completion if self.answer_from is None else self.answer_from
        return [0] * len(self.prompt_ids) + [1] * thinking + [2] * (completion - thinking)

    @property
    def ids(self) -> Ids:
        return self.prompt_ids + self.completion_ids

    @property
    def repeats(self) -> bool:
        """Whether the completion was cut off while it repeats itself."""
        return self.truncated and measure_loop(self.completion_ids) > 0


def count_tokens(traces: Sequence[Trace]) -> int:
    """Return the number of tokens of prompts and completions together."""
    return sum(len(trace.ids) for trace in traces)


def hash_ids(traces: Sequence[Trace]) -> str:
    """Return the hash of all token ids."""
    return canonical_hash([trace.ids for trace in traces])


@dataclass(frozen=True)
class TraceSet:
    """A folder of append-only trace shards with a manifest."""

    folder: Path

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.jsonl"

    def append(self, number: int, traces: Sequence[Trace]) -> None:
        """Write one shard, whole or not at all."""
        lines = [json.dumps(asdict(trace), separators=(",", ":")) + "\n" for trace in traces]
        write_atomic(self.shard(number), "".join(lines))

    @property
    def sha256(self) -> str:
        """Hash over the contents of every shard, in order."""
        hashes = "".join(file_sha256(file) for file in self._shards())
        return hashlib.sha256(hashes.encode()).hexdigest()

    def read(self) -> list[Trace]:
        """Return every trace in order.

        Raises:
            ArtifactError: a shard is damaged.
        """
        return [trace for file in self._shards() for trace in self.read_shard(file)]

    def count(self) -> int:
        """Return the number of traces so far."""
        return sum(len(self.read_shard(file)) for file in self._shards())

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.jsonl"))

    @staticmethod
    def read_shard(file: Path) -> list[Trace]:
        """Return the traces of one shard; raises ArtifactError if it is damaged."""
        return parse_json_lines(file, file.read_bytes(), _as_trace)


def _as_trace(values: dict[str, Any]) -> Trace:
    values["prompt_ids"] = tuple(map(int, values["prompt_ids"]))
    values["completion_ids"] = tuple(map(int, values["completion_ids"]))
    return Trace(**values)
