"""Thoughts under control: which tokens hesitate, what an engine is told, and what a bundle does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from racdeploy.manifest import Manifest, ThinkingControl
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.runtime import load
from racdeploy.runtime.control import (
    check_closing_text,
    describe_control,
    find_hesitation_ids,
    make_budget,
)
from racdeploy.runtime.template import ChatTemplate, PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, find_tags
from tests.support.errors import raises
from tests.support.tiny_artifacts import CLOSE_ID, OPEN_ID, make_bundle

QUESTION = "Ann has 12 apples and buys 30 more. How many apples does she have?"
FORMS = ["Wait", "ĠWait", "wait", "Ġwait", "ĠWAIT", "Wait,", "ĊĊWait", "ĠHmm", "Hmm..."]
OTHERS = ["Waiter", "Ġawait", "But", "Ġ", "H", "mm"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def encoder(bundle: Path) -> PromptEncoder:
    return PromptEncoder.from_folder(bundle)


def test_every_form_of_a_word_is_found(tmp_path: Path) -> None:
    """With and without a space before, in any case, with punctuation; no other word."""
    words = {text: i for i, text in enumerate([*FORMS, *OTHERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path / "tokenizer.json")
    own = PromptEncoder(read, ChatTemplate("x", sandbox=read.sandbox))

    found = find_hesitation_ids(own, ["Wait", "Hmm", "Alternatively"])
    assert found == {"Wait": (0, 1, 2, 3, 4, 5, 6), "Hmm": (7, 8), "Alternatively": ()}
    assert ThinkingControl(hesitation=found).hesitation_ids == tuple(range(9))


def test_an_engine_is_told_only_what_there_is_to_do(encoder: PromptEncoder) -> None:
    tags = find_tags(encoder)
    prompt = encoder.encode(QUESTION)
    off = ThinkingControl(closing="Done.", hesitation={"Wait": (7,)})
    penalty = off.model_copy(update={"hesitation_penalty": 2.0})

    assert make_budget(encoder, tags, prompt, None, off) is None
    assert make_budget(encoder, None, prompt, 8, penalty) is None

    budget = make_budget(encoder, tags, prompt, None, penalty)
    assert budget is not None
    assert (budget.max_tokens, budget.hesitation_ids, budget.hesitation_penalty) == (None, (7,), 2)
    assert budget.starts_open
    assert list(budget.closing_message_ids) == encoder.encode_text("Done.")


def test_a_last_sentence_without_tags_is_allowed(encoder: PromptEncoder) -> None:
    tags = ThinkingTags((OPEN_ID,), (CLOSE_ID,))
    check_closing_text(encoder, tags, "\nI must answer now.\n")
    for tag in ("<think>", "</think>"):
        with raises("tag-in-closing-text", tag):
            check_closing_text(encoder, tags, f"Done. {tag}")


def test_what_is_done_is_said() -> None:
    control = ThinkingControl(
        closing="\nNow.\n",
        hesitation={"Wait": (7,), "Hmm": ()},
        hesitation_penalty=2,
    )
    assert describe_control(512, control) == (
        "it ends after 512 tokens; with 'Now.'; Wait lose 2 logits"
    )
    assert describe_control(None, ThinkingControl()) == ""


def test_a_bundle_runs_as_its_manifest_says(tmp_path: Path) -> None:
    """A forced end with the last sentence in the thinking; a call may choose another budget."""
    made = make_bundle(tmp_path)
    file = made / "racdeploy.json"
    values = json.loads(file.read_text())
    values["generation"]["thinking"] = {"closing": " Now."}
    file.write_text(json.dumps(values))
    assert Manifest.read(made).generation.thinking.closing == " Now."

    with load(made, threads=1) as model:
        said = len(model.encoder.encode_text(" Now."))
        for asked, budget in ((None, 8), (3, 3)):
            result = model.generate(QUESTION, max_thinking_tokens=asked)
            assert (result.state, result.thinking_tokens) == ("forced", budget + said)
            assert result.thinking.endswith("Now.")
