"""The vocabulary stage: removes unneeded tokens from the pruned model, as the last change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from racdeploy.files.writing import canonical_hash, file_sha256
from racdeploy.models.bpe import BYTE_COUNT, BytePairs
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import OldIds
from racdeploy.pipeline.tokenization import compare_tokenization
from racdeploy.pipeline.vocabulary_choice import VocabularyChoice
from racdeploy.pipeline.workspace import Workspace, identify_code
from racdeploy.pruning import PrunedModel
from racdeploy.pruning.structures import vocabulary
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace
from racdeploy.verification.probe_strings import read_probe_strings


def cut_vocabulary(
    workspace: Workspace, choice: VocabularyChoice, model: PrunedModel, traces: Sequence[Trace]
) -> PrunedModel:
    """Cut the vocabulary of a pruned model, or return it cut earlier.

    ``traces`` are the dense model's.

    Raises:
        UsageError: more tokens are needed than the recipe keeps.
        GateError: the new tokenizer restores another text than the old one.
    """
    old_ids = choice.choose(traces)
    texts = [*choice.required_texts, *choice.decode(traces)]

    checkpoint = Checkpoint(model.folder)
    files = filter(Path.is_file, sorted(model.folder.iterdir()))

    # All files of the folder are inputs, since the tokenizer and the configs are rewritten too.
    inputs = identify_code(__name__) | {
        "files": {file.name: file_sha256(file) for file in files},
        "old_ids": canonical_hash(old_ids.tolist()),
        "texts": canonical_hash(texts),
    }

    stage = workspace.open("vocabulary", inputs)
    folder = stage.folder / model.folder.name

    if not stage.is_finished:
        vocabulary.rewrite(checkpoint, old_ids, folder)
        note = _compare_tokenizers(choice, folder, old_ids, texts)
        stage.finish({"note": note})

    notes = (*model.notes, stage.summary["note"])
    return replace(model, folder=folder, notes=notes)


def _compare_tokenizers(
    choice: VocabularyChoice, folder: Path, old_ids: OldIds, texts: Sequence[str]
) -> str:
    """Compare both tokenizers; return a sentence for the report."""
    dense = choice.encoder
    cut = PromptEncoder.from_folder(folder)
    kept = compare_tokenization(dense, cut, old_ids, texts)
    compare_tokenization(dense, cut, old_ids, read_probe_strings())  # only the restored text counts

    tokens = dense.tokenizer.get_vocab_size()
    rows = choice.dense.shape.vocab_size
    padding = ""
    if rows > tokens:
        padding = f", {rows - tokens:,} rows of padding gone"

    lacking = BYTE_COUNT - len(BytePairs.read(choice.dense.tokenizer).byte_ids)
    lost = ""
    if lacking:
        lost = f"; {lacking} bytes are in no token, before and after, so text loses them"

    share = f"{kept.same / max(1, kept.before):.2%} of {kept.before:,} tokens"
    return (
        f"vocabulary: {tokens:,} → {len(old_ids):,} tokens{padding}; "
        f"traces, prompts and texts keep {share}{lost}"
    )
