"""The vocabulary stage: tokens that are not needed leave the pruned model, after all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy.files.writing import canonical_hash, file_sha256
from racdeploy.models.bpe import BYTES, BytePairs
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.segmentation import compare_segmentation
from racdeploy.pipeline.vocabulary_choice import VocabularyChoice
from racdeploy.pipeline.workplace import Workplace, address
from racdeploy.prune import PrunedModel
from racdeploy.prune.structures import vocabulary
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace
from racdeploy.verify.probe_strings import probe_strings


def cut_vocabulary(
    place: Workplace, choice: VocabularyChoice, model: PrunedModel, traces: Sequence[Trace]
) -> PrunedModel:
    """Cut the vocabulary of a pruned model, or find it cut; ``traces`` are the dense model's.

    Raises:
        UsageError: more tokens must stay than were asked for.
        GateError: the new tokenizer does not give a text back as the old one does.
    """
    old_ids = choice.choose(traces)
    texts = [*choice.given_texts, *choice.decode(traces)]

    checkpoint = Checkpoint(model.folder)
    files = filter(Path.is_file, sorted(model.folder.iterdir()))

    inputs = address(__name__) | {
        "files": {file.name: file_sha256(file) for file in files},
        "old_ids": canonical_hash(old_ids.tolist()),
        "texts": canonical_hash(texts),
    }

    stage = place.open("vocabulary", inputs)
    folder = stage.folder / model.folder.name

    if not stage.finished:
        vocabulary.rewrite(checkpoint, old_ids, folder)
        note = _prove(choice, folder, old_ids, texts)
        stage.finish({"note": note})

    notes = (*model.notes, stage.summary["note"])
    return replace(model, folder=folder, notes=notes)


def _prove(
    choice: VocabularyChoice, folder: Path, old_ids: NDArray[np.int64], texts: Sequence[str]
) -> str:
    """Compare both tokenizers; return a sentence for the report."""
    dense = choice.encoder
    cut = PromptEncoder.from_folder(folder)
    kept = compare_segmentation(dense, cut, old_ids, texts)
    compare_segmentation(dense, cut, old_ids, probe_strings())

    tokens = dense.tokenizer.get_vocab_size()
    rows = choice.dense.shape.vocab_size
    padding = ""
    if rows > tokens:
        padding = f", {rows - tokens:,} rows of padding gone"

    lacking = BYTES - len(BytePairs.read(choice.dense.tokenizer).byte_ids)
    lost = ""
    if lacking:
        lost = f"; {lacking} bytes are in no token, before and after: text loses them"

    share = f"{kept.same / max(1, kept.before):.2%} of {kept.before:,} tokens"
    return (
        f"vocabulary: {tokens:,} → {len(old_ids):,} tokens{padding}; "
        f"traces, prompts and texts are cut as before at {share}{lost}"
    )
