"""The vocabulary: tokens that the user's texts do not need, with their rows and merges.

Rows of the embedding and of the output are copied as they are, so what is left computes the same
logits. Byte-level BPE alone; what a token needs to be found is in :mod:`racdeploy.models.bpe`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import UsageError
from racdeploy.files.texts import read_texts
from racdeploy.files.writing import atomic_folder
from racdeploy.models import fused
from racdeploy.models.bpe import BytePairs
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import STALE, named_ids, renumber
from racdeploy.models.shape import ModelShape
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.prune.structure.layout import Layout, refuse_uncut
from racdeploy.recipe import Structure
from racdeploy.tensors.safetensors import write_entries

STEP, SIZE, COUNTED = "folder", "V", "tokens"
# Kernels of ggml for interleaved rows take multiples of 8, those for AMX of 32.
ROWS = 32
TEXTS = "structure.vocabulary_text"
_MOST_ADDED = 0.01  # of the tokens that were asked for, to reach a multiple


def layout(shape: ModelShape, block: int, structure: Structure) -> Layout:
    """Return the rows of the embedding."""
    return Layout(SIZE, shape.vocab_size, {SIZE: 1})


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse a tokenizer that cannot be cut, a text that cannot be read, and too few tokens."""
    refuse_uncut("vocabulary", checkpoint.family)
    tokenizer = read_tokenizer(checkpoint.tokenizer.file)
    used: set[int] = set()
    for text in read_texts(structure.vocabulary_text, TEXTS):
        used.update(tokenizer.encode(text))

    choose(checkpoint, structure.share("vocabulary"), used)


def choose(
    checkpoint: Checkpoint, keep: float, used: Iterable[int], users: str = "the texts"
) -> NDArray[np.int64]:
    """Return the ids that stay, rising.

    Args:
        keep: a share of the tokens up to 1, or a count above it.
        used: ids that have to stay.
        users: what uses them, for the message that too few were asked for.

    Raises:
        UsageError: the tokenizer is no byte-level BPE, there are fewer tokens than asked for, or
            more are needed.
    """
    pairs = BytePairs.read(checkpoint.tokenizer)
    tokens = len(pairs.texts)
    if keep <= 1:
        asked = round(keep * tokens)
    else:
        asked = int(keep)

    if asked > tokens:
        raise UsageError(
            "vocabulary-too-large",
            f"structure.keep has vocabulary = {asked}, the tokenizer of {checkpoint.folder} has "
            f"{tokens} tokens",
            remedy="ask for fewer, or leave vocabulary out of structure.keep",
        )

    # A config may name a row of padding, which is no token.
    named = named_ids(checkpoint.tokenizer) & pairs.texts.keys()
    if unknown := checkpoint.tokenizer.parsed["model"].get("unk_token"):
        named.add(pairs.ids[unknown])

    needed = pairs.close(named.union(used))
    if len(needed) > asked:
        raise UsageError(
            "vocabulary-too-small",
            f"structure.keep has vocabulary = {asked} tokens, {len(needed)} must stay: special "
            f"and added ones, single bytes, and what {users} use",
            remedy=f"--keep vocabulary={len(needed)} is the least; fewer texts need less",
        )

    return pairs.fill(needed, min(round_up(asked), tokens))


def round_up(asked: int) -> int:
    """Return a number of rows that engines like, where that costs little; else the asked one."""
    rounded = -(-asked // ROWS) * ROWS
    return rounded if rounded - asked <= _MOST_ADDED * asked else asked


def rewrite(
    checkpoint: Checkpoint, old_ids: NDArray[np.int64], out: Path, *, hollow: bool = False
) -> Path:
    """Write the model of a folder with some of its tokens, as another folder.

    ``old_ids``, rising, have the new id as their place. Rows that are no token, which pad an
    embedding, go. Files that hold neither weights nor ids are copied. A ``hollow`` folder has the
    shapes of the weights and not their values.
    """
    rows = checkpoint.shape.vocab_size
    cut = {}
    family = checkpoint.family
    for name in family.model_tensors:
        entry = checkpoint.entries.get(name)
        if entry and entry.shape[0] == rows and len(entry.shape) > 1:
            cut[name] = old_ids

    texts = renumber(checkpoint.tokenizer, old_ids)
    if checkpoint.is_packed:  # what is written is not
        config = json.loads(texts["config.json"])
        config.pop("quantization_config", None)
        texts["config.json"] = json.dumps(config, indent=2) + "\n"

    replaced = {entry.file.name for entry in checkpoint.entries.values()} | texts.keys() | STALE
    replaced.add("model.safetensors.index.json")

    with atomic_folder(out) as scratch:
        stored = fused.join(checkpoint.whole, family.blocks, family.fused)
        write_entries(stored, scratch / "model.safetensors", cut, hollow=hollow)
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        for file in sorted(checkpoint.folder.iterdir()):
            if file.is_file() and file.name not in replaced:
                shutil.copyfile(file, scratch / file.name)

    return out
