"""Predict the size of a GGUF file exactly, before any weight of the model is read.

Plan and offsets of the tensors are those of the writer; headers are written to measure them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from racdeploy.exporting import Metadata
from racdeploy.exporting.gguf.architecture import find_architecture
from racdeploy.exporting.gguf.header import write_header
from racdeploy.exporting.gguf.parameters import check_parameters
from racdeploy.exporting.gguf.tensor_writer import iter_end_offsets
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.exporting.gguf.tokenizer import read_vocabulary
from racdeploy.exporting.gguf.vocabulary import Vocabulary
from racdeploy.exporting.gguf.writer import GgufPlan, make_plan
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.quant.presets import QuantRules

_OUT = Path("model.gguf")  # the name of a file changes nothing in it


@dataclass
class FileSizes:
    """Sizes of the files that a checkpoint can be exported to; its tokens are read only once.

    Args:
        pre_tokenizer: as in :func:`racdeploy.exporting.gguf.export`.
        approximate: accept the nearest pre-tokenizer if llama.cpp has no equal one.
    """

    checkpoint: Checkpoint
    pre_tokenizer: str | None = None
    approximate: bool = False

    def plan(
        self, mix: QuantRules, metadata: Metadata | None = None, split_bytes: int = 0
    ) -> GgufPlan:
        """Return the plan of the writer."""
        check_parameters(self.checkpoint.shape)
        return make_plan(  # no importance: it changes codes, not sizes
            self.checkpoint,
            _OUT,
            mix,
            self._vocabulary,
            metadata=metadata or {},
            split_bytes=split_bytes,
        )

    def size_bytes(self, plan: GgufPlan) -> int:
        """Return the bytes of all files of a plan."""
        total = self._vocabulary_bytes
        for number, tensors in enumerate(plan.tensors_by_file.values()):
            general = {} if number else plan.general
            split = (number, len(plan.tensors_by_file), len(plan.tensors))
            header_bytes = self._measure_header(
                plan.family, tensors=tensors, general=general, split=split
            )

            # Only the first part has the tokens, and its header with them ends at a multiple of 32.
            token_bytes = 0 if number else self._vocabulary_bytes
            *_, end = iter_end_offsets(token_bytes + header_bytes, tensors)
            total += end - token_bytes

        return total

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.checkpoint, self.pre_tokenizer, approximate=self.approximate)

    @cached_property
    def _vocabulary_bytes(self) -> int:
        """Bytes in the header of the tokens and the other keys of the first part."""
        family = find_architecture(self.checkpoint).family
        with_tokens = self._measure_header(family, vocabulary=self._vocabulary)
        return with_tokens - self._measure_header(family)

    def _measure_header(
        self,
        family: Family,
        *,
        tensors: Sequence[GgufTensorPlan] = (),
        vocabulary: Vocabulary | None = None,
        general: Mapping[str, Any] | None = None,
        split: tuple[int, int, int] = (0, 1, 0),
    ) -> int:
        """Return the bytes of a header with such contents."""
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / _OUT
            write_header(
                self.checkpoint,
                family,
                file,
                tensors,
                vocabulary=vocabulary,
                general=general or {},
                split=split,
            )
            return file.stat().st_size
