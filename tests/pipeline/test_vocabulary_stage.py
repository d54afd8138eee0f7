"""The stage that cuts the vocabulary: what it keeps, how it is named, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import read_old_ids
from racdeploy.pipeline.vocabulary_choice import VocabularyChoice
from racdeploy.pipeline.vocabulary_stage import cut_vocabulary
from racdeploy.pipeline.workspace import Workspace
from racdeploy.pruning import PrunedModel
from racdeploy.pruning.structures import vocabulary
from racdeploy.recipe import Structure
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

KEPT = 330
QUESTIONS = ("How many apples does she have?", "What is 12 times 30?")


@pytest.fixture
def model(tmp_path: Path) -> PrunedModel:
    folder = make_checkpoint(tmp_path / "pruned" / "tiny-rac-50", "qwen2")
    return PrunedModel(folder, 0.5, (), (), {}, ("pruned",))


def _choose(model: PrunedModel, keep: float = KEPT) -> VocabularyChoice:
    encoder = PromptEncoder.from_folder(model.folder)
    settings = Structure(keep={"vocabulary": keep})
    return VocabularyChoice(Checkpoint(model.folder), encoder, QUESTIONS, settings)


def _trace(choice: VocabularyChoice, ids: list[int]) -> Trace:
    prompt = choice.encoder.encode(QUESTIONS[0])
    return Trace(0, "gcd", QUESTIONS[0], "1", tuple(prompt), tuple(ids))


def test_tokens_of_a_trace_stay_however_they_were_written(
    model: PrunedModel, tmp_path: Path
) -> None:
    """Both the tokens that the model wrote and those the tokenizer makes of their text."""
    choice = _choose(model)
    letters = choice.encoder.tokenizer.encode("lazy dog")
    written = [i for text in "lazy dog" for i in choice.encoder.encode_text(text)]
    assert len(written) > len(letters)

    place = Workspace(tmp_path / "work")
    cut = cut_vocabulary(place, choice, model, [_trace(choice, written)])
    assert {*written, *letters} <= set(read_old_ids(cut.folder).tolist())
    assert not set(letters) <= set(choice.choose().tolist())

    assert cut.folder.name == "tiny-rac-50"
    assert cut.folder.parent.name.startswith("vocabulary-")
    assert cut.notes[0] == "pruned"
    assert f"485 → {KEPT} tokens, 27 rows of padding gone" in cut.notes[1]
    assert "keep 100.00% of" in cut.notes[1]


def test_a_killed_cut_leaves_the_same_bytes(
    model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it writes, the stage begins again and ends as one that was not."""
    choice = _choose(model)
    whole = cut_vocabulary(Workspace(tmp_path / "whole"), choice, model, [])

    def write_and_die(*arguments: object, **options: object) -> None:
        (Path(str(arguments[1])) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    place = Workspace(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "write_model", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            cut_vocabulary(place, choice, model, [])

    again = cut_vocabulary(place, choice, model, [])
    assert again.notes == whole.notes
    contents = [
        {file.name: file.read_bytes() for file in found.folder.iterdir()}
        for found in (whole, again)
    ]
    assert contents[0] == contents[1]

    monkeypatch.setattr(vocabulary, "rewrite", None)  # a finished stage is found again
    assert cut_vocabulary(place, choice, model, []) == again


def test_the_message_says_whether_traces_are_known(model: PrunedModel) -> None:
    """Before the traces the least may still grow; afterwards it is the least."""
    choice = _choose(model, 270)
    with raises("vocabulary-too-small") as before:
        choice.choose()

    trace = _trace(choice, choice.encoder.encode_text("The quick brown fox jumps"))
    with raises("vocabulary-too-small") as after:
        choice.choose([trace])
    assert before.value.remedy != after.value.remedy
