"""A Hugging Face model folder, read without torch: config, and tensors one at a time.

``config.json`` is read directly: transformers 4 and 5 each ignore the other's rope settings.
bfloat16, which numpy lacks, is widened to float32 when read. Tensors lie in one safetensors file or
in shards with an index; a pruned model may have codes in ``coded-model.safetensors`` instead.
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
from racdeploy.models import config_schema, fused_experts, mtp, multimodal, wrong_input
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_lookup import find_family, find_listed_keys
from racdeploy.models.model_card import read_license
from racdeploy.models.remote_code import list_remote_code, no_safetensors_error
from racdeploy.models.shape import ModelShape, read_shape
from racdeploy.models.tokenizer_files import (
    TOKENIZER_FILES,
    TokenizerFiles,
    find_token_ids,
    token_text,
)
from racdeploy.quant.stored_codes import CODED_FILE, UNCODED_FILE, CodedWeight, join_codes
from racdeploy.tensors.safetensors import (
    BYTE_DTYPE,
    TensorEntry,
    read_tensor_entries,
    to_float32,
)

IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""End of the names of buffers in old checkpoints that transformers computes itself."""


def read_entries(folder: Path) -> Mapping[str, TensorEntry]:
    """Return every tensor of a folder by name, without its values.

    Raises:
        ModelError: there is no safetensors file, or the index names missing files or tensors.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return read_tensor_entries(single)
        if (coded := folder / CODED_FILE).is_file():
            return join_codes(
                read_tensor_entries(coded) | read_tensor_entries(folder / UNCODED_FILE)
            )
        raise no_safetensors_error(folder)

    weight_map = read_json(index, strict=True).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ModelError(
            "damaged-index", f"{index} has no weight_map", remedy="copy or download it again"
        )

    # Names in the index come from a stranger: no path may lead out of the folder.
    entries = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise ModelError(
                "shard-outside-folder", f"{index} names a file outside the folder: {name!r}"
            )
        if not name.endswith(".safetensors"):
            raise ModelError(
                "damaged-index",
                f"{index} names {name!r}, and weights are read from safetensors only",
                remedy="copy or download the model again",
            )
        entries.update(read_tensor_entries(folder / name))

    if missing := sorted(set(weight_map) - set(entries)):
        raise ModelError(
            "missing-tensors", f"{index} names tensors that no shard holds: {missing[:3]}"
        )

    return entries


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
            raise wrong_input.wrong_folder_error(folder)

        self.folder = folder

        # A multimodal model is read as the text model in it: checks see only its text config.
        written = read_json(folder / "config.json")
        self.is_multimodal = multimodal.is_multimodal(written)
        if self.is_multimodal:
            written = multimodal.extract_text_config(written)
        where = f"{folder}/config.json"
        config_schema.check_config(written, where, find_listed_keys(written))
        self.raw_config: Config = written
        self.family: Family = find_family(written)
        config_schema.check_family_keys(written, self.family.defaults, where)
        self.config: Config = _complete(written, self.family)
        self.tokenizer = TokenizerFiles(folder)

    @property
    def transformers_config(self) -> Config:
        """Config with the keys that transformers reads where the family has others."""
        return {**self.config, **self.family.config_form.write(self.config)}

    @cached_property
    def shape(self) -> ModelShape:
        """Sizes and kinds of blocks, by ``config.json`` and the family alone."""
        return read_shape(self.config, self.family, f"{self.folder}/config.json")

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the model by its state_dict name; checked against the file sizes.

        Fused experts are listed expert by expert.
        """
        family = self.family
        entries = fused_experts.unfuse(
            self._text_entries, family.blocks, family.experts.fused, self.shape.num_experts
        )
        for name, entry in entries.items():
            if entry.dtype == BYTE_DTYPE:
                raise ModelError(
                    "unsupported-dtype",
                    f"{entry.file}: {name!r} holds packed numbers in an unknown format",
                    remedy="start from the unquantized checkpoint",
                )
        return entries

    @cached_property
    def _text_entries(self) -> Mapping[str, TensorEntry]:
        """Tensors of the folder that the text model computes with, as they are stored."""
        renamed = {
            self.family.rename_published(name): entry for name, entry in self._stored.items()
        }
        entries = multimodal.extract_text_entries(renamed) if self.is_multimodal else renamed
        return {name: entry for name, entry in entries.items() if self._uses(name)}

    @cached_property
    def mtp_entries(self) -> Mapping[str, TensorEntry]:
        """Tensors of the multi-token-prediction head; empty unless llama.cpp supports it here."""
        return mtp.select_tensors(self._stored, self.shape)

    @property
    def mtp_blocks(self) -> int:
        """Number of blocks of the multi-token-prediction head."""
        return mtp.count_blocks(self.mtp_entries)

    @cached_property
    def all_entries(self) -> Mapping[str, TensorEntry]:
        """The tensors of the model and of its multi-token-prediction head."""
        return {**self.entries, **self.mtp_entries}

    @cached_property
    def used_entries(self) -> Mapping[str, TensorEntry]:
        """Tensors that the model computes with: no old buffers, no copy of the embedding."""
        used = {}
        for name, entry in self.entries.items():
            is_copy = name == "lm_head.weight" and self.tied
            if not is_copy and not name.endswith(IGNORED_SUFFIX):
                used[name] = entry
        return used

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def coded(self) -> dict[str, CodedWeight]:
        """The weights that are stored as codes."""
        entries = self.all_entries.items()
        return {name: entry for name, entry in entries if isinstance(entry, CodedWeight)}

    def _uses(self, name: str) -> bool:
        """Return False for tensors of an MTP head, and for keys and values that no block uses."""
        if name.startswith(mtp.PREFIXES):
            return False

        block, inside = self.family.split_block(name)
        if block is None or block >= self.shape.block_count:
            return True
        kinds = self.shape.kinds[block]
        return "own_keys" in kinds or self.family.has_tensor(kinds, inside)

    @cached_property
    def _stored(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the folder."""
        return read_entries(self.folder)

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor as float32, copied from the file."""
        return to_float32(self.read_raw(name))

    def read_rows(
        self, name: str, rows: NDArray[np.int64], columns: slice = slice(None)
    ) -> NDArray[np.float32]:
        """Return some rows of a tensor as float32, without loading the others."""
        entry = self.entries[name]
        assert type(entry) is TensorEntry, f"{name} does not lie in one piece"
        return to_float32(entry.map()[rows, columns])

    def read_raw(self, name: str) -> NDArray[Any]:
        """Return one tensor as stored; bfloat16 comes as uint16 bit patterns."""
        entry = self.entries.get(name) or self.mtp_entries[name]
        return entry.read()

    @cached_property
    def tied(self) -> bool:
        """True if the output projection is the embedding, by the tensors of the file.

        Raises:
            ModelError: config and file contradict each other.
        """
        declared = bool(self.config.get("tie_word_embeddings"))
        if "lm_head.weight" not in self.entries:
            if not declared:
                raise ModelError(
                    "no-lm-head",
                    f"{self.folder} has no lm_head.weight and its config does not tie the"
                    " embeddings",
                    remedy="set tie_word_embeddings in config.json, or add the missing tensor",
                )

            return True

        # Loaders disagree where a tied config comes with another lm_head, so that is refused.
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
        """End-of-sequence ids of the configs and the tokenizer, without repeats."""
        tokenizer = self.tokenizer
        ids = find_token_ids(tokenizer.generation, "eos") + find_token_ids(self.config, "eos")

        content = token_text(tokenizer.config.get("eos_token"))
        added = tokenizer.tokenizer_json.get("added_tokens") or []
        ids += [entry["id"] for entry in added if entry.get("content") == content]

        eos_ids = tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))
        if not eos_ids:
            raise ModelError(
                "no-eos-token",
                f"{self.folder} names no end-of-sequence token",
                remedy="set eos_token_id in generation_config.json",
            )

        return eos_ids

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user on tensors that are left out, and on code that is not run."""
        notes = []
        if self.mtp_entries:
            notes.append(
                f"{len(self.mtp_entries)} tensors of a multi-token-prediction head stay as they"
                " are, for llama.cpp to draft with; they are removed if blocks become narrower"
            )
        if left_out := len(self._stored) - len(self._text_entries) - len(self.mtp_entries):
            notes.append(
                f"{left_out} tensors are left out, since the text model does not compute with them:"
                " vision, audio, multi-token prediction, or keys that no block uses"
            )
        if code := list_remote_code(self.config):
            notes.append(
                f"config.json names remote code ({code}), which is not run: the model is read as "
                f"transformers' {self.family.architecture}, and its author's code may differ"
            )
        if code := list_remote_code(self.tokenizer.config):
            notes.append(
                f"tokenizer_config.json names remote code ({code}), which is not run: "
                "tokenizer.json decides"
            )
        return tuple(notes)

    @property
    def license(self) -> str:
        """The licence that the model card names, or an empty string."""
        return read_license(self.folder)

    def files(self) -> Iterator[Path]:
        """Yield the files that decide what the model does: config, weights, tokenizer, template."""
        yield self.folder / "config.json"
        parts = [getattr(entry, "parts", (entry,)) for entry in self.all_entries.values()]
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


def _complete(written: Config, family: Family) -> Config:
    """Return the config with transformers' defaults, in the form of transformers 4."""
    config = family.complete_config(written)
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:  # transformers 5, where there are two kinds of attention
        local = parameters.get("sliding_attention", {})
        parameters = parameters["full_attention"]
        config["rope_parameters"] = parameters
        config["rope_local_base_freq"] = local.get("rope_theta")

    moved = ("partial_rotary_factor", "original_max_position_embeddings")
    return config | {key: parameters[key] for key in moved if key in parameters}
