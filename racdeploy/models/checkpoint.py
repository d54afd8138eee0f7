"""Read a Hugging Face model folder without torch: config, and tensors one at a time.

``config.json`` is read directly: transformers 4 and 5 each ignore the other's rope settings.
bfloat16, which numpy lacks, is widened to float32 when read.
Source: safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ModelError
from racdeploy.files.reading import read_json
from racdeploy.files.writing import file_sha256
from racdeploy.models import further, fused, settings, text_part, wrong_input
from racdeploy.models.families import Family
from racdeploy.models.family_lookup import find_family
from racdeploy.models.foreign_code import name_code
from racdeploy.models.model_card import read_license
from racdeploy.models.shape import ModelShape, find_shape
from racdeploy.models.tokenizer_files import TOKENIZER_FILES, TokenizerFiles, token_ids, token_text
from racdeploy.models.weights import read_entries
from racdeploy.tensors.mxfp4 import PackedEntry
from racdeploy.tensors.safetensors import (
    DTYPES,
    PACKED,
    TensorEntry,
    widen,
)


class Checkpoint:
    """A model folder, opened and checked but not loaded; ModelError if damaged or unsupported."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ModelError(
                "no-model-folder",
                f"{folder} is not a folder",
                remedy="give a local model folder or a Hub id",
            )

        if not (folder / "config.json").is_file():
            raise wrong_input.refuse(folder)

        self.folder = folder

        written = read_json(folder / "config.json")
        self.is_part = text_part.is_inside(written)
        if self.is_part:
            written = text_part.take_config(written)
        settings.check(written, f"{folder}/config.json")
        self.written: Mapping[str, Any] = written
        self.family: Family = find_family(written)
        self.config: dict[str, Any] = _complete(written, self.family)
        self.tokenizer = TokenizerFiles(folder)

    @cached_property
    def shape(self) -> ModelShape:
        """What ``config.json`` and the family alone say."""
        return find_shape(self.config, self.family, f"{self.folder}/config.json")

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the model by its state_dict name; checked against the file sizes.

        What the file has of all experts in one tensor is here expert by expert.
        """
        family = self.family
        experts = self.shape.num_experts
        entries = fused.take_apart(self._own, family.blocks, family.fused, experts)
        for name, entry in entries.items():
            if entry.dtype == PACKED:
                raise ModelError(
                    "unsupported-dtype",
                    f"{entry.file}: {name!r} holds packed numbers of a form that is not known",
                    remedy="start from the unquantized checkpoint",
                )
        return entries

    @cached_property
    def _own(self) -> Mapping[str, TensorEntry]:
        """Tensors of the folder that the model computes with, as they are stored."""
        usual = {self.family.rename(name): entry for name, entry in self._stored.items()}
        own = text_part.take_entries(usual) if self.is_part else usual
        return {name: entry for name, entry in own.items() if self._uses(name)}

    @cached_property
    def further(self) -> Mapping[str, TensorEntry]:
        """A head that predicts further tokens, where llama.cpp has it beside this model."""
        head = further.take(self._stored)
        return head if further.fits(self.shape, head) else {}

    @cached_property
    def whole(self) -> Mapping[str, TensorEntry]:
        """Every tensor that a folder made of this one has."""
        return {**self.entries, **self.further}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def is_packed(self) -> bool:
        """Whether some of its weights are stored in fewer bits than they are read with."""
        return any(isinstance(entry, PackedEntry) for entry in self.entries.values())

    def _uses(self, name: str) -> bool:
        """Return whether a tensor is of no other head, and makes no keys that nobody takes."""
        if name.startswith(further.BEGINNINGS):
            return False

        block, inside = self.family.split_block(name)
        if block is None or block >= self.shape.block_count:
            return True
        kinds = self.shape.kinds[block]
        return "own_keys" in kinds or self.family.has(kinds, inside)

    @cached_property
    def _stored(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the folder."""
        return read_entries(self.folder)

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor as float32, copied from the file."""
        return widen(self.read_raw(name))

    def read_rows(
        self, name: str, rows: NDArray[np.int64], columns: slice = slice(None)
    ) -> NDArray[np.float32]:
        """Return some rows of a tensor as float32; the others are never in memory."""
        entry = self.entries[name]
        assert type(entry) is TensorEntry, f"{name} is packed"
        assert not entry.strides, f"{name} does not lie in one piece"
        stored = np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.start, entry.shape)
        return widen(stored[rows, columns])

    def read_raw(self, name: str) -> NDArray[Any]:
        """Return one tensor as stored; bfloat16 comes as uint16 bit patterns."""
        entry = self.entries.get(name) or self.further[name]
        return entry.read()

    @cached_property
    def tied(self) -> bool:
        """Whether the output projection is the embedding, by what the file holds."""
        declared = bool(self.config.get("tie_word_embeddings", False))
        if "lm_head.weight" not in self.entries:
            if not declared:
                raise ModelError(
                    "no-lm-head",
                    f"{self.folder} has no lm_head.weight and its config does not tie the"
                    " embeddings",
                    remedy="set tie_word_embeddings in config.json, or add the missing tensor",
                )

            return True

        if declared:
            head = self.read_raw("lm_head.weight")
            if not np.array_equal(head, self.read_raw(self.family.embedding)):
                raise ModelError(
                    "tied-head-differs",
                    f"{self.folder}: config.json ties the embeddings but lm_head.weight differs",
                    remedy="set tie_word_embeddings to false in config.json if the head is meant to"
                    " differ",
                )

        return declared

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids that the configs and the tokenizer name, without repeats."""
        tokenizer = self.tokenizer
        ids = token_ids(tokenizer.generation, "eos") + token_ids(self.config, "eos")

        content = token_text(tokenizer.config.get("eos_token"))

        for entry in tokenizer.parsed.get("added_tokens") or []:
            if entry.get("content") == content:
                ids.append(entry["id"])

        found = tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))
        if not found:
            raise ModelError(
                "no-eos-token",
                f"{self.folder} names no end-of-sequence token",
                remedy="set eos_token_id in generation_config.json",
            )

        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the folder: code in it that is not run."""
        told = []
        if self.further:
            told.append(
                f"{len(self.further)} tensors of a head that predicts further tokens stay as they"
                " are, for llama.cpp to draft with; where blocks become narrower, they go"
            )
        if left_out := len(self._stored) - len(self._own) - len(self.further):
            told.append(
                f"{left_out} tensors are left out: the text model does not compute with what sees,"
                " hears, predicts further tokens, or makes keys that nobody takes"
            )
        if code := name_code(self.config):
            told.append(
                f"config.json names code of the model's own ({code}), which is not run: it is read "
                f"as transformers' {self.family.architecture}, and its author's may differ"
            )
        if code := name_code(self.tokenizer.config):
            told.append(
                f"tokenizer_config.json names code of the model's own ({code}), which is not run: "
                "tokenizer.json decides"
            )
        return tuple(told)

    @property
    def license(self) -> str:
        """The licence that the model card names, or an empty string."""
        return read_license(self.folder)

    def files(self) -> Iterator[Path]:
        """Yield the files that decide what the model does: config, weights, tokenizer, template."""
        yield self.folder / "config.json"
        parts = [getattr(entry, "parts", (entry,)) for entry in self.whole.values()]
        yield from sorted({part.file for each in parts for part in each})
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                yield self.folder / name

    @cached_property
    def sha256(self) -> str:
        """Hash over the names and contents of :meth:`files`."""
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
        return digest.hexdigest()


def _complete(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the config with transformers' defaults, and in transformers 4's form."""
    config = family.complete(config)
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:  # transformers 5, where there are two kinds of attention
        local = parameters.get("sliding_attention", {})
        parameters = parameters["full_attention"]
        config["rope_parameters"] = parameters
        config["rope_local_base_freq"] = local.get("rope_theta")

    moved = ("partial_rotary_factor", "original_max_position_embeddings")
    return config | {key: parameters[key] for key in moved if key in parameters}
