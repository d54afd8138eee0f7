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
from racdeploy.models import further, fused, settings, text_part, widths, wrong_input
from racdeploy.models.computed import SETTINGS
from racdeploy.models.families import Family, InputGroups, name_experts
from racdeploy.models.family_lookup import find_family
from racdeploy.models.foreign_code import name_code
from racdeploy.models.model_card import read_license
from racdeploy.models.tokenizer_files import TOKENIZER_FILES, TokenizerFiles, token_ids, token_text
from racdeploy.models.weights import read_entries
from racdeploy.tensors.mxfp4 import PackedEntry
from racdeploy.tensors.safetensors import (
    DTYPES,
    PACKED,
    TensorEntry,
    widen,
)

_ATTENDING = ("full_attention", "sliding_attention")
_RECURRENT = ("linear_attention", "conv")


class Checkpoint:
    """A model folder, opened and checked but not loaded; ModelError if damaged or unsupported."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ModelError(
                f"{folder} is not a folder", remedy="give a local model folder or a Hub id"
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
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the model by its state_dict name; checked against the file sizes.

        What the file has of all experts in one tensor is here expert by expert.
        """
        entries = fused.take_apart(self._own, self.family.blocks, self.family.fused, self.experts)
        for name, entry in entries.items():
            if entry.dtype == PACKED:
                raise ModelError(
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
        block = max((block for block, attends in enumerate(self.attends) if attends), default=-1)
        if not (head and self.family.further) or block < 0:
            return {}

        blocks = further.count_blocks([*head])
        sizes = self.sizes(block)
        shapes = further.expected_shapes(self.family, self.kinds(block), sizes, blocks)
        if further.fits(head, shapes):
            return head
        return {}

    @cached_property
    def whole(self) -> Mapping[str, TensorEntry]:
        """Every tensor that a folder made of this one has."""
        return {**self.entries, **self.further}

    @property
    def is_packed(self) -> bool:
        """Whether some of its weights are stored in fewer bits than they are read with."""
        return any(isinstance(entry, PackedEntry) for entry in self.entries.values())

    def _uses(self, name: str) -> bool:
        """Return whether a tensor is of no other head, and makes no keys that nobody takes."""
        if name.startswith(further.BEGINNINGS):
            return False

        block, inside = self.family.split_block(name)
        is_sharing = block is not None and self.key_sources[block : block + 1] not in ((), (block,))
        return not is_sharing or self.family.has(self.kinds(block or 0), inside)

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

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return self.integer("num_hidden_layers")

    @property
    def head_size(self) -> int:
        """Width of one attention head; ``head_dim`` where the config has it."""
        if explicit := self.config.get("head_dim"):
            return int(explicit)
        return self.integer("hidden_size") // self.integer("num_attention_heads")

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.integer("num_attention_heads"))

    @cached_property
    def _block_widths(self) -> Mapping[str, tuple[int, ...]]:
        return widths.read(self.config, self.block_count, f"{self.folder}/config.json")

    def per_block(self, setting: str) -> tuple[int, ...]:
        """Return a setting of :data:`widths.SETTINGS` for each block."""
        for widths_of_blocks in (self._block_widths, self._own_widths):
            if setting in widths_of_blocks:
                return widths_of_blocks[setting]

        same = self.key_value_heads if setting == "num_key_value_heads" else self.integer(setting)
        return (same,) * self.block_count

    @cached_property
    def _own_widths(self) -> Mapping[str, tuple[int, ...]]:
        widths_of_blocks = self.family.find_widths(self.config)
        return {setting: tuple(values) for setting, values in widths_of_blocks.items()}

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks are of the widths that the family gives them."""
        return not self._block_widths

    @cached_property
    def head_sizes(self) -> tuple[int, ...]:
        """Width of one attention head in each block."""
        return self._own_widths.get("head_dim", (self.head_size,) * self.block_count)

    @cached_property
    def linear_weights(self) -> list[str]:
        """Names of the weights of linears that can be pruned, in forward order."""
        blocks = self.family.blocks
        return [
            f"{blocks}.{block}.{linear}.weight"
            for block in range(self.block_count)
            for linear in self.linears(block)
        ]

    def input_groups(self, block: int) -> InputGroups:
        """Return the prunable linears of a block by the input they share, in forward order.

        Those of experts are there once, with ``*`` for a number.
        """
        return self.family.groups_of(self.kinds(block))

    def linears(self, block: int) -> tuple[str, ...]:
        """Return the prunable linears of a block, without ``.weight``, in forward order."""
        names: list[str] = []
        for group in self.input_groups(block):
            names += name_experts(group, self.experts)
        return tuple(names)

    @property
    def experts(self) -> int:
        """Number of experts of a block that has some; 0 where the family knows none."""
        setting = self.family.sizes.get("E")
        return self.integer(setting) if setting else 0

    def unit(self, letter: str, block: int) -> int:
        """Return what one of a setting of :data:`widths.SETTINGS` adds to the size of a letter."""
        return 1 if letter == "F" else self.head_sizes[block]

    def sizes(self, block: int) -> Mapping[str, int]:
        """Return what the letters of a family's shapes stand for in a block."""
        sizes = {
            "D": self.integer("hidden_size"),
            "V": self.integer("vocab_size"),
            "K": self.head_sizes[block],
            "1": 1,
            "H": self.per_block("num_attention_heads")[block],
        }

        for letter, setting in widths.SETTINGS.items():
            sizes[letter] = self.per_block(setting)[block] * self.unit(letter, block)

        for letter, setting in self.family.sizes.items():
            sizes[letter] = self.integer(setting)

        return sizes

    def setting(self, name: str) -> Any:
        """Return a key of ``config.json``, or None, or one of :data:`SETTINGS`."""
        compute = SETTINGS.get(name)
        return compute(self) if compute else self.config.get(name)

    def integer(self, key: str) -> int:
        """Return a setting that is a whole number; a ModelError says that it is none."""
        value = self.setting(key)
        if type(value) is not int:
            raise ModelError(f"{self.folder}/config.json: {key} is {value!r}, not a whole number")
        return value

    @property
    def streams(self) -> int:
        """How many hidden states a token has between blocks."""
        return self.integer(self.family.streams) if self.family.streams else 1

    @property
    def state_width(self) -> int:
        """Values of a token that pass from block to block."""
        return self.streams * self.integer("hidden_size")

    @property
    def positions(self) -> int:
        """Longest sequence that the model is made for, in tokens."""
        listed = self.integer("max_position_embeddings")
        original = self.config.get("original_max_position_embeddings")
        original = self.rope.get("original_max_position_embeddings", original)
        factor = self.rope.get("factor")

        # Some configs leave the number as it was before the rope was stretched.
        if isinstance(original, int) and isinstance(factor, int | float):
            return max(listed, round(original * factor))
        return listed

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """Kind of each block: ``full_attention``, ``sliding_attention``, or what a family has."""
        listed = self.config.get("layer_types")
        if isinstance(listed, list):
            if len(listed) != self.block_count:
                raise ModelError(
                    f"{self.folder}/config.json: layer_types lists {len(listed)} blocks of"
                    f" {self.block_count}",
                    remedy="compare the file with the one that the model's authors publish",
                )
            return tuple(map(str, listed))

        period = self.config.get("sliding_window_pattern") or self.family.window_period
        is_sliding = [period and block % period for block in range(1, self.block_count + 1)]
        return tuple("sliding_attention" if each else "full_attention" for each in is_sliding)

    def kinds(self, block: int) -> tuple[str, ...]:
        """Return what a block is: its kind as listed, and whether it makes keys of its own."""
        makes_keys = self.key_sources[block] == block
        return (self.layer_types[block], *(["own_keys"] if makes_keys else []))

    @cached_property
    def key_sources(self) -> tuple[int, ...]:
        """Of each block, the number of that whose keys and values it takes: its own, or earlier."""
        kinds = self.layer_types
        first = self.block_count - int(self.config.get("num_kv_shared_layers") or 0)

        sources = list(range(self.block_count))
        for block in sources[first:]:
            alike = [earlier for earlier in range(first) if kinds[earlier] == kinds[block]]
            if not alike:
                raise ModelError(
                    f"{self.folder}/config.json: no block before the {self.block_count - first}"
                    f" that share keys and values makes any for {kinds[block]}"
                )
            sources[block] = alike[-1]

        return tuple(sources)

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each block has attention, and so keys and values that an engine keeps."""
        return tuple(kind in _ATTENDING for kind in self.layer_types)

    @property
    def recurs(self) -> tuple[bool, ...]:
        """Whether each block carries a state from token to token; some do neither."""
        return tuple(kind in _RECURRENT for kind in self.layer_types)

    @property
    def has_state(self) -> bool:
        """Whether blocks of the family may carry a state from token to token, in place of keys."""
        return bool(self.family.unattended)

    @property
    def is_rotary(self) -> bool:
        """Whether any block has a rotary embedding."""
        switch = self.family.rope_switch
        return not switch or self.config.get(switch) == "rope"

    @property
    def says_theta(self) -> bool:
        """Whether the config has a base of rotary frequencies, used or not."""
        places = (self.config, self.config.get("rope_parameters") or {})
        return any(place.get("rope_theta") is not None for place in places)

    @property
    def rotary_blocks(self) -> tuple[bool, ...]:
        """Whether each block has a rotary embedding."""
        listed = self.config.get("no_rope_layers")  # 1 where it has one, for all its name
        if listed:
            return tuple(map(bool, listed))

        period = self.config.get("no_rope_layer_interval")
        blocks = range(1, self.block_count + 1)
        return tuple(not period or block % period != 0 for block in blocks)

    @property
    def block_kinds(self) -> dict[str, list[Any]]:
        """What a config may say by counting blocks, as a list that other blocks can be left out of.

        Empty for families whose blocks are all of one kind.
        """
        kinds: dict[str, list[Any]] = {}
        if self.family.window_period or self.family.only:
            kinds["layer_types"] = list(self.layer_types)
        if self.family.no_rope_period:
            kinds["no_rope_layers"] = list(map(int, self.rotary_blocks))
        return kinds

    @cached_property
    def rope(self) -> dict[str, Any]:
        """Rope settings in one form: ``rope_theta``, ``rope_type`` and the factors of scaling."""
        # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.
        parameters = dict(self.config.get("rope_parameters") or {})
        scaling = parameters or dict(self.config.get("rope_scaling") or {})
        theta = parameters.get("rope_theta", self.config.get("rope_theta")) or 10_000.0
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        kind = "longrope" if kind == "su" else kind
        return scaling | {"rope_theta": float(theta), "rope_type": kind}

    @property
    def rounds_ramp(self) -> bool:
        """Whether llama.cpp rounds where YaRN's ramp begins and ends, and the model does not."""
        is_exact = self.rope["rope_type"] == "yarn" and self.rope.get("truncate") is False
        return self.family.rounds_ramp and is_exact

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rope settings as transformers 5 has them: by kind of block, where these differ."""
        if not self.family.window_period or self.family.one_rope:
            return self.rope

        local = self.config.get("rope_local_base_freq") or self.rope["rope_theta"]
        sliding = {"rope_type": "default", "rope_theta": local}
        return {"full_attention": {**self.rope}, "sliding_attention": sliding}

    @cached_property
    def tied(self) -> bool:
        """Whether the output projection is the embedding, by what the file holds."""
        declared = bool(self.config.get("tie_word_embeddings", False))
        if "lm_head.weight" not in self.entries:
            if not declared:
                raise ModelError(
                    f"{self.folder} has no lm_head.weight and its config does not tie the"
                    " embeddings",
                    remedy="set tie_word_embeddings in config.json, or add the missing tensor",
                )

            return True

        if declared:
            head = self.read_raw("lm_head.weight")
            if not np.array_equal(head, self.read_raw(self.family.embedding)):
                raise ModelError(
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
