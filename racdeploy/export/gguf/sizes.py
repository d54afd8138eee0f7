"""How many bytes a GGUF file will have, before any value of the model is read.

The plan and the places of tensors are those of the writer, and the header is written for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from racdeploy.export import Metadata
from racdeploy.export.gguf.body import end_places
from racdeploy.export.gguf.header import write_header
from racdeploy.export.gguf.parameters import check_parameters
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.export.gguf.vocabulary import Vocabulary, read_vocabulary
from racdeploy.export.gguf.writer import Plan, make_plan
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant.presets import Mix

_OUT = Path("model.gguf")  # how a file is called changes nothing in it


class FileSizes:
    """Sizes of the files that a checkpoint can become; its tokens are read and counted once.

    Args:
        pre_tokenizer: as :func:`racdeploy.export.gguf.export` has it.
        approximate: whether a pre-tokenizer that is only near will do.
    """

    def __init__(
        self, checkpoint: Checkpoint, pre_tokenizer: str | None = None, *, approximate: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self._pre_tokenizer, self._approximate = pre_tokenizer, approximate

    def plan(self, mix: Mix, metadata: Metadata | None = None, split_bytes: int = 0) -> Plan:
        """Return what the writer would write."""
        check_parameters(self.checkpoint.shape)
        known = None  # an importance changes codes, and no size
        return make_plan(
            self.checkpoint, _OUT, mix, known, self._vocabulary, metadata or {}, split_bytes
        )

    def size_bytes(self, plan: Plan) -> int:
        """Return the bytes of all files of a plan."""
        total = self._vocabulary_bytes
        for number, tensors in enumerate(plan.parts.values()):
            general = {} if number else plan.general
            split = (number, len(plan.parts), len(plan.tensors))
            header_bytes = self._write(tensors, None, general, split)

            # Only the first part has the tokens, and its header ends at a multiple of 32 with them.
            behind = 0 if number else self._vocabulary_bytes
            *_, end = end_places(behind + header_bytes, tensors)
            total += end - behind

        return total

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.checkpoint, self._pre_tokenizer, approximate=self._approximate)

    @cached_property
    def _vocabulary_bytes(self) -> int:
        """Bytes in the header of the tokens and of what goes with them."""
        return self._write([], self._vocabulary, {}) - self._write([], None, {})

    def _write(
        self,
        tensors: list[PlannedTensor],
        vocabulary: Vocabulary | None,
        general: Mapping[str, Any],
        split: tuple[int, int, int] = (0, 1, 0),
    ) -> int:
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / _OUT
            write_header(
                self.checkpoint, file, tensors, vocabulary=vocabulary, general=general, split=split
            )
            return file.stat().st_size
