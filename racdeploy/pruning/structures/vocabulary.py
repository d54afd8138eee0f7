"""Vocabulary: remove tokens that the user's texts do not need, with their rows and merges.

Rows of the embedding and of the output head are copied unchanged, so the kept tokens have the same
logits. Only BPE is supported; :mod:`racdeploy.models.bpe` finds the tokens that a kept one depends
on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from racdeploy.errors import UsageError
from racdeploy.files.texts import read_texts
from racdeploy.files.writing import atomic_folder
from racdeploy.models import fused_experts
from racdeploy.models.bpe import BytePairs
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import STALE_FILES, OldIds, find_config_ids, renumber_files
from racdeploy.models.shape import ModelShape
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.pruning.structure.layout import UnitLayout, check_cuttable
from racdeploy.quant.stored_codes import write_model
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER, COUNT_UNIT = "folder", "V", "tokens"
# ggml's kernels for interleaved rows need multiples of 8, those for AMX of 32.
ROW_MULTIPLE = 32
TEXTS_KEY = "structure.vocabulary_text"
_MAX_ADDED_SHARE = 0.01  # of the requested tokens, to reach a multiple


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the rows of the embedding."""
    return UnitLayout(SIZE_LETTER, shape.vocab_size, {SIZE_LETTER: 1})


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse a tokenizer that cannot be cut, an unreadable text, or too few tokens."""
    check_cuttable("vocabulary", checkpoint.family)
    tokenizer = read_tokenizer(checkpoint.tokenizer.file)
    used_ids = set()
    for text in read_texts(structure.vocabulary_text, TEXTS_KEY):
        used_ids.update(tokenizer.encode(text))

    choose(checkpoint, structure.kept_share("vocabulary"), used_ids)


def choose(
    checkpoint: Checkpoint, keep: float, needed_ids: Iterable[int], source: str = "the texts"
) -> OldIds:
    """Return the ids that stay, ascending.

    Args:
        keep: a share of the tokens up to 1, or a count above it.
        needed_ids: ids that must stay.
        source: source of ``needed_ids``, named in the message that too few tokens were requested.

    Raises:
        UsageError: the tokenizer is no BPE over bytes, there are fewer tokens than asked for, or
            more are needed.
    """
    pairs = BytePairs.read(checkpoint.tokenizer)
    tokens = len(pairs.texts)
    count = round(keep * tokens) if keep <= 1 else int(keep)
    if count > tokens:
        raise UsageError(
            "vocabulary-too-large",
            f"structure.keep has vocabulary = {count}, the tokenizer of {checkpoint.folder} has "
            f"{tokens} tokens",
            remedy="ask for fewer, or leave vocabulary out of structure.keep",
        )

    # A config may name a row of padding, which is no token.
    named = find_config_ids(checkpoint.tokenizer) & pairs.texts.keys()
    if unknown := checkpoint.tokenizer.tokenizer_json["model"].get("unk_token"):
        named.add(pairs.ids[unknown])

    needed = pairs.add_needed(named.union(needed_ids))
    if len(needed) > count:
        raise UsageError(
            "vocabulary-too-small",
            f"structure.keep has vocabulary = {count} tokens, {len(needed)} must stay: special "
            f"and added ones, single bytes, and what {source} use",
            remedy=f"--keep vocabulary={len(needed)} is the least; fewer texts need less",
        )

    return pairs.fill_by_rank(needed, min(round_up(count), tokens))


def round_up(count: int) -> int:
    """Round a number of rows up to a multiple that engines need, if that adds at most 1 %."""
    rounded = -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
    return rounded if rounded - count <= _MAX_ADDED_SHARE * count else count


def rewrite(
    checkpoint: Checkpoint, old_ids: OldIds, out: Path, *, zero_filled: bool = False
) -> Path:
    """Write a model with some of its tokens to another folder.

    Rows that only pad an embedding are removed. Files with neither weights nor ids are copied.

    Args:
        old_ids: ids that stay, ascending; the new id of each is its index.
        zero_filled: write the shapes of the weights without their values.
    """
    rows = checkpoint.shape.vocab_size
    cut = {}
    family = checkpoint.family
    for name in family.model_tensors:
        entry = checkpoint.entries.get(name)
        if entry and entry.shape[0] == rows and len(entry.shape) > 1:
            cut[name] = old_ids

    texts = renumber_files(checkpoint.tokenizer, old_ids)
    config = json.loads(texts["config.json"])
    if config.pop("quantization_config", None):  # the tensors are written unpacked
        texts["config.json"] = json.dumps(config, indent=2) + "\n"

    replaced = (
        {entry.file.name for entry in checkpoint.entries.values()} | texts.keys() | STALE_FILES
    )
    replaced.add("model.safetensors.index.json")

    with atomic_folder(out) as scratch:
        stored = fused_experts.fuse(checkpoint.all_entries, family.blocks, family.experts.fused)
        write_model(stored, scratch, cut, zero_filled=zero_filled)
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        for file in sorted(checkpoint.folder.iterdir()):
            if file.is_file() and file.name not in replaced:
                shutil.copyfile(file, scratch / file.name)

    return out
