"""A smaller vocabulary: every text still goes in and comes out, and kept text is cut as before."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from racdeploy.exporting.gguf import export
from racdeploy.files.texts import read_texts
from racdeploy.models.bpe import BytePairs, unsupported_reason
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import read_old_ids
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structures import vocabulary
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Structure
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.sandbox import tokenizer as reading
from racdeploy.tensors import safetensors
from racdeploy.verification.probe_strings import make_mixed_lines, read_probe_strings
from tests.support.cut_models import cut_checkpoint
from tests.support.errors import raises
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import SPECIAL_TOKENS, TRAINED_TOKENS, edit_json, make_checkpoint
from tests.support.tiny_pieces import pieces_json, train_pieces
from tests.support.tiny_traces import TRACES

TOKENS = 3000
PRE_TOKENIZERS = ("qwen2", "llama-bpe", "gpt-2", "smollm", "gemma", "mistral")
KEPT_TEXT = make_mixed_lines(120)
_ALL_CHARACTERS = unicodedata.normalize("NFC", "".join(map(chr, range(0x2500))))


@cache
def _trained_model(lines: int) -> dict[str, Any]:
    """Return a BPE model trained on mixed text, with merges over all boundaries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_training_texts(lines), trainer)
    assert tokenizer.get_vocab_size() == TOKENS
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _training_texts(lines: int) -> tuple[str, ...]:
    """Return texts without added tokens: a trained token that reads as one would take its place."""
    texts = (*make_mixed_lines(lines), *read_probe_strings())
    return tuple(text for text in texts if "<" not in text)


def _make_model(folder: Path, pre_tokenizer: str = "qwen2", **config: Any) -> Checkpoint:
    """Return a checkpoint with 3,000 trained tokens, five added ones and rows of padding."""
    make_checkpoint(folder, "llama", pre_tokenizer=pre_tokenizer, vocab_size=TOKENS + 24, **config)
    file = folder / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    first = {}
    if pre_tokenizer in ("gemma", "mistral"):
        # All characters of the texts become tokens; those of other scripts fall back to bytes.
        texts = (t for t in _training_texts(2000) if max(map(ord, t), default=0) < 0x800)
        pieces = train_pieces(tuple(texts), TOKENS, ("<b>", "<i>"))
        trained = pieces_json(pieces, ("<b>", "<i>"), space_first=pre_tokenizer == "mistral")
        own = [token for token in written["added_tokens"] if token["content"] in SPECIAL_TOKENS]
        written = trained | {"added_tokens": [*trained["added_tokens"], *own]}
        first = {token["content"]: token["id"] for token in trained["added_tokens"]}
    else:
        ignore_merges = written["model"]["ignore_merges"]
        written["model"] = _trained_model(2000) | {"ignore_merges": ignore_merges}
    shift = TOKENS - TRAINED_TOKENS
    for token in written["added_tokens"]:
        token["id"] = first.get(token["content"], token["id"] + shift)
    file.write_text(json.dumps(written), encoding="utf-8")

    ends = {"eos_token_id": TOKENS + 2, "pad_token_id": TOKENS}
    edit_json(folder / "config.json", **ends)
    edit_json(folder / "generation_config.json", **(ends | {"eos_token_id": [TOKENS + 2, TOKENS]}))
    decoder = {str(t["id"]): {"content": t["content"]} for t in written["added_tokens"]}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    return Checkpoint(folder)


def _cut(checkpoint: Checkpoint, keep: float, texts: tuple[str, ...], out: Path) -> Path:
    used = _ids(read_tokenizer(checkpoint.tokenizer.file), texts)
    old_ids = vocabulary.choose(checkpoint, keep, {i for ids in used for i in ids})
    return vocabulary.rewrite(checkpoint, old_ids, out)


def _ids(tokenizer: reading.Tokenizer, texts: tuple[str, ...]) -> list[list[int]]:
    return tokenizer.encode_batch(texts)


def _decode(tokenizer: reading.Tokenizer, ids: list[list[int]]) -> list[str]:
    return tokenizer.decode_batch(ids)


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_kept_text_is_cut_as_before_and_any_text_comes_back(
    tmp_path: Path, pre_tokenizer: str
) -> None:
    """Kept lines have the very same tokens; 3,000 others come back byte for byte, in more."""
    checkpoint = _make_model(tmp_path / "dense", pre_tokenizer)
    cut = _cut(checkpoint, 1600, KEPT_TEXT, tmp_path / "cut")
    dense = read_tokenizer(checkpoint.tokenizer.file)
    small = read_tokenizer(cut / "tokenizer.json")
    old_ids = read_old_ids(cut)

    assert small.get_vocab_size() == 1600 == len(old_ids)
    found = [old_ids[ids].tolist() for ids in _ids(small, KEPT_TEXT)]
    assert found == _ids(dense, KEPT_TEXT)

    others = (*make_mixed_lines(3000), *read_probe_strings(), _ALL_CHARACTERS)
    before, after = _ids(dense, others), _ids(small, others)
    assert _decode(dense, before) == _decode(small, after)
    assert list(others) == _decode(small, after) or pre_tokenizer == "mistral", (
        "Mistral's tokenizer loses a space behind an added token, cut or not"
    )
    assert sum(map(len, before)) < sum(map(len, after))


def test_a_token_that_another_is_built_of_has_to_stay(tmp_path: Path) -> None:
    """Without the closure, kept text falls apart: the test above can fail."""
    checkpoint = _make_model(tmp_path / "dense")
    dense = read_tokenizer(checkpoint.tokenizer.file)
    pairs = BytePairs.read(checkpoint.tokenizer)
    used = {i for ids in _ids(dense, KEPT_TEXT) for i in ids}
    alone = used | pairs.added | pairs.byte_ids
    assert alone < pairs.add_needed(used)

    old_ids = np.array(sorted(alone))
    small = read_tokenizer(
        vocabulary.rewrite(checkpoint, old_ids, tmp_path / "cut") / "tokenizer.json"
    )
    assert _ids(dense, KEPT_TEXT) != [old_ids[ids].tolist() for ids in _ids(small, KEPT_TEXT)]
    assert list(KEPT_TEXT) == _decode(small, _ids(small, KEPT_TEXT))


def test_a_token_is_built_as_the_library_builds_it(tmp_path: Path) -> None:
    """The tokens on the way to one are those that tokenizers needs: without any of them it gives
    another result.
    """
    checkpoint = _make_model(tmp_path / "dense")
    pairs = BytePairs.read(checkpoint.tokenizer)
    longest = sorted(pairs.texts, key=lambda i: (-len(pairs.texts[i]), i))
    model = checkpoint.tokenizer.tokenizer_json["model"]

    for token in [i for i in longest if i not in pairs.added][:20]:
        text = pairs.texts[token]
        built = pairs.list_needed(token)
        for missing in sorted(built - {token} - pairs.byte_ids):
            gone = pairs.texts[missing]
            merges = [pair for pair in pairs.merges if gone not in (*pair, "".join(pair))]
            left = [other for other in model["vocab"] if other != gone]
            vocab = {other: i for i, other in enumerate(left)}
            other = Tokenizer(models.BPE(vocab=vocab, merges=merges))
            assert [text] != other.encode(text).tokens, (text, gone)

        vocab = {pairs.texts[old]: i for i, old in enumerate(built | pairs.byte_ids)}
        merges = [pair for pair in pairs.merges if vocab.keys() >= {*pair, "".join(pair)}]
        assert [text] == Tokenizer(models.BPE(vocab=vocab, merges=merges)).encode(text).tokens


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_llama_cpp_tokenizes_the_exported_file_alike(tmp_path: Path, pre_tokenizer: str) -> None:
    """Ids of 2,000 mixed lines and the probes, as tokenizers gives them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1}
    checkpoint = _make_model(tmp_path / "dense", pre_tokenizer, **sizes)
    cut = _cut(checkpoint, 1500, KEPT_TEXT, tmp_path / "cut")
    exported = export(Checkpoint(cut), tmp_path / "cut.gguf", quant="q8_0")

    texts = (*read_probe_strings(), *make_mixed_lines(2000))
    (answer,) = ask_llama([exported.path], [1, 2], texts)
    assert _ids(read_tokenizer(cut / "tokenizer.json"), texts) == answer.tokens


@pytest.mark.parametrize(
    ("family", "tied", "sharded"),
    [("llama", False, True), ("qwen2", True, False), ("qwen3", True, True), ("phi3", False, False)],
)
def test_the_logits_of_kept_tokens_do_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, sharded: bool
) -> None:
    """The folder opens in transformers; each kept token has the dense model's logit.

    The same rows are multiplied by the same vectors in float32; only the order of sums may change,
    by 64 terms of about 1: 64 · 2^-24 = 4e-6.
    """
    monkeypatch.setattr(safetensors, "_COPY_BYTES", 1000)  # many pieces a tensor
    folder = make_checkpoint(tmp_path / "dense", family, tied=tied, sharded=sharded)
    cut = _cut(Checkpoint(folder), 400, ("12+30=42",), tmp_path / "cut")
    old_ids = torch.tensor(read_old_ids(cut))
    assert Checkpoint(cut).tied == tied

    new = torch.arange(0, 400, 7)[None]
    with torch.no_grad():
        dense, small = (
            AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)
            for each in (folder, cut)
        )
        expected = dense(old_ids[new]).logits[..., old_ids]
        found = small(new).logits

    assert (1, new.shape[1], 400) == found.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)


def test_every_file_names_tokens_by_their_new_ids(tmp_path: Path) -> None:
    """Post-processor, configs and decoder of added tokens move together; no old ids are left."""
    checkpoint = _make_model(tmp_path / "dense")
    folder = checkpoint.folder
    repeating = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
    for name in repeating:
        (folder / name).write_bytes(b"of another program")
    start = {"id": "<|im_start|>", "type_id": 0}
    edit_json(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|im_start|>": {
                    "id": "<|im_start|>",
                    "ids": [TOKENS + 1],
                    "tokens": ["<|im_start|>"],
                }
            },
        },
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": TOKENS,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    edit_json(
        folder / "generation_config.json",
        suppress_tokens=[30, TOKENS - 1],
        bad_words_ids=[[TOKENS + 3, TOKENS + 4], [30, TOKENS - 2]],
        bos_token_id=TOKENS + 20,
        forced_eos_token_id=TOKENS - 3,
    )

    cut = _cut(Checkpoint(folder), 1000, KEPT_TEXT[:10], tmp_path / "cut")
    tokenizer = Tokenizer.from_file(str(cut / "tokenizer.json"))
    ids = {old: new for new, old in enumerate(read_old_ids(cut).tolist())}
    assert TOKENS - 3 in ids, "what has a role stays"
    assert not {TOKENS - 1, TOKENS - 2} & ids.keys()

    special = {text: tokenizer.token_to_id(text) for text in SPECIAL_TOKENS}
    assert list(special.values()) == list(range(995, 1000))
    assert tokenizer.encode("12").ids[0] == special["<|im_start|>"]
    assert Tokenizer.from_file(str(cut / "tokenizer.json")).padding["pad_id"] == 995

    config, generation = (
        json.loads((cut / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (
        1000,
        997,
        995,
    )
    assert generation["eos_token_id"] == [997, 995]
    assert generation["suppress_tokens"] == [ids[30]]
    assert generation["bad_words_ids"] == [[998, 999]]
    assert generation["forced_eos_token_id"] == ids[TOKENS - 3]
    assert generation["bos_token_id"] is None, "it named a row of padding"
    assert Checkpoint(cut).eos_ids == (997, 995)
    assert not any((cut / name).exists() for name in repeating)

    encoder = PromptEncoder.from_folder(cut)
    (prompt,) = [encoder.encode("What is 12 + 30?")]
    theirs = PreTrainedTokenizerFast.from_pretrained(cut)
    asked = [{"role": "user", "content": "What is 12 + 30?"}]
    chat = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert prompt == list(chat)
    tags = find_tags(encoder)
    assert tags is not None
    assert (tags.open_ids, tags.close_ids) == ((998,), (999,))


def test_the_least_is_named_and_is_enough(tmp_path: Path) -> None:
    """One token less than the least is refused with that number; the least gives exactly it."""
    folder = make_checkpoint(tmp_path / "model", "qwen2")
    checkpoint = Checkpoint(folder)
    used = _ids(read_tokenizer(folder / "tokenizer.json"), ("How many apples? 12+30=42",))[0]
    needed = BytePairs.read(checkpoint.tokenizer).add_needed(used)
    assert needed == set(vocabulary.choose(checkpoint, len(needed), used))

    with raises("vocabulary-too-small", f"--keep vocabulary={len(needed)} "):
        vocabulary.choose(checkpoint, len(needed) - 1, used)

    with raises("vocabulary-too-large", "485"):
        vocabulary.choose(checkpoint, 486, used)


def test_a_share_is_of_the_tokenizers_tokens(tmp_path: Path) -> None:
    """Rows of padding do not count, and all of a vocabulary is the tokenizer without them."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen2"))
    assert len(vocabulary.choose(checkpoint, 0.8, ())) == round(0.8 * 485)
    assert vocabulary.choose(checkpoint, 485, ()).tolist() == list(range(485))


def test_further_tokens_come_by_rank(tmp_path: Path) -> None:
    """What no text uses is filled up in the order of the merges."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen2"))
    pairs = BytePairs.read(checkpoint.tokenizer)
    least = pairs.add_needed(())
    filled = set(vocabulary.choose(checkpoint, len(least) + 50, ()).tolist()) - least
    # Trained in one go, a token's id is in the order of its merge.
    assert sorted(filled) == sorted(set(pairs.texts) - least)[:50]


@pytest.mark.parametrize(("asked", "rows"), [(8192, 8192), (8170, 8192), (400, 400), (401, 401)])
def test_rows_are_rounded_up_where_that_costs_little(asked: int, rows: int) -> None:
    """To a multiple of 32, by at most one in a hundred."""
    assert vocabulary.round_up(asked) == rows


def test_widths_and_zeros_stay_as_they_are(tmp_path: Path) -> None:
    """The folder of a model whose blocks differ is cut like any other: only rows are gone."""
    dense = make_checkpoint(tmp_path / "dense", "qwen2", dtype="float32")
    narrow = Checkpoint(cut_checkpoint(dense, tmp_path / "narrow", [(4, 64), (2, 32)]))
    cut = Checkpoint(_cut(narrow, 400, ("12+30=42",), tmp_path / "cut"))
    assert cut.shape.widths["intermediate_size"] == (64, 32)
    assert cut.shape.widths["num_attention_heads"] == (4, 2)

    old_ids = read_old_ids(cut.folder)
    for name in narrow.entries:
        before, after = narrow.read(name), cut.read(name)
        expected = before[old_ids] if name == "model.embed_tokens.weight" else before
        np.testing.assert_array_equal(after, expected)


def test_codes_stay_codes(tmp_path: Path) -> None:
    """A model whose linears are stored as codes has the same ones afterwards."""
    dense = Checkpoint(make_checkpoint(tmp_path / "dense", "qwen2"))
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    prune_blocks(dense, TRACES, [], Pruning(), blocks, quant="q4_0")
    coded = Checkpoint(assemble(dense, blocks, tmp_path / "coded"))
    cut = Checkpoint(_cut(coded, 400, ("12",), tmp_path / "cut"))
    assert cut.coded.keys() == coded.coded.keys() == {*coded.shape.prunable_weights}
    for name, entry in cut.coded.items():
        assert np.array_equal(entry.read_packed(), coded.coded[name].read_packed()), name
    assert len(cut.read("model.embed_tokens.weight")) < len(coded.read("model.embed_tokens.weight"))


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Two cuts of a model are equal, file by file; further files are copied."""
    folder = make_checkpoint(tmp_path / "model", "qwen2")
    (folder / "importance.safetensors").write_bytes(b"as it was")
    checkpoint = Checkpoint(folder)
    first, again = (_cut(checkpoint, 400, ("12",), tmp_path / name) for name in ("a", "b"))
    contents = [
        {file.name: file.read_bytes() for file in each.iterdir()} for each in (first, again)
    ]
    assert contents[0] == contents[1]
    assert contents[0]["importance.safetensors"] == b"as it was"


@pytest.mark.parametrize("pre_tokenizer", ["mistral", "gemma"])
def test_pieces_without_all_bytes_are_refused(tmp_path: Path, pre_tokenizer: str) -> None:
    """A character that is no token would be lost."""
    folder = make_checkpoint(tmp_path / "model", "llama", pre_tokenizer=pre_tokenizer)
    vocabulary.check(Checkpoint(folder), Structure(keep={"vocabulary": 0.9}))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<0x9F>", "<0x9f>"), encoding="utf-8")
    with raises("vocabulary-cannot-be-cut", "stand for bytes"):
        vocabulary.check(Checkpoint(folder), Structure(keep={"vocabulary": 0.9}))


def test_a_space_stays_where_no_text_needs_it(tmp_path: Path) -> None:
    """SentencePiece's sign for it would come back from bytes as itself."""
    folder = make_checkpoint(tmp_path / "model", "llama", pre_tokenizer="gemma")
    pairs = BytePairs.read(Checkpoint(folder).tokenizer)
    assert pairs.ids["▁"] in pairs.add_needed(())


def test_ids_that_the_library_does_not_follow_are_refused(tmp_path: Path) -> None:
    """An added token behind a gap loads as another id than its file says."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    written["added_tokens"][-1]["id"] += 5
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    with raises("token-ids-differ", "484"):
        BytePairs.read(Checkpoint(folder).tokenizer)


def test_other_tokenizers_are_refused() -> None:
    """The kind is named, or the option that changes what merges do."""
    assert "WordPiece" in unsupported_reason({"model": {"type": "WordPiece"}})
    assert "Unigram" in unsupported_reason({"model": {"type": "Unigram"}})
    bytes_first = {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}
    plain = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    given = plain | {"end_of_word_suffix": "</w>"}
    assert "end_of_word_suffix" in unsupported_reason(
        {"model": given, "pre_tokenizer": bytes_first}
    )
    assert "no merges" in unsupported_reason(
        {"model": {"type": "BPE"}, "pre_tokenizer": bytes_first}
    )
    assert unsupported_reason({"model": plain, "pre_tokenizer": bytes_first}) == ""


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS[:-1])
def test_a_users_text_is_kept(tmp_path: Path, pre_tokenizer: str) -> None:
    """Pieces of a long file are tokenized as the whole, but where a text gets a space in front, as
    Mistral's; its tokens are needed.
    """
    checkpoint = _make_model(tmp_path / "dense", pre_tokenizer)
    text = "\n".join(make_mixed_lines(2500)) + "\n    indented\n\n\nend"
    file = tmp_path / "notes.txt"
    file.write_text(text, encoding="utf-8", newline="")
    pieces = read_texts([str(file)], vocabulary.TEXTS_KEY)
    assert len(pieces) > 1
    assert "".join(pieces) == text

    dense = read_tokenizer(checkpoint.tokenizer.file)
    (whole,) = _ids(dense, (text,))
    assert whole == [i for ids in _ids(dense, tuple(pieces)) for i in ids]

    settings = Structure(keep={"vocabulary": 600}, vocabulary_text=(str(file),))
    with raises("vocabulary-too-small"):
        vocabulary.check(checkpoint, settings)


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, and the line of one that is not UTF-8."""
    with raises("file-unreadable", "none.txt", "No such file"):
        read_texts([str(tmp_path / "none.txt")], vocabulary.TEXTS_KEY)

    file = tmp_path / "latin.txt"
    file.write_bytes("one\ntwo\ncafé\n".encode("latin-1"))
    with raises("text-not-utf8", "latin.txt:3"):
        read_texts([str(file)], vocabulary.TEXTS_KEY)


@pytest.mark.slow
@pytest.mark.parametrize("pre_tokenizer", ["qwen2", "gemma"])
def test_ten_thousand_mixed_lines_come_back(tmp_path: Path, pre_tokenizer: str) -> None:
    """Byte for byte, by tokenizers and by llama.cpp's ids."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1}
    checkpoint = _make_model(tmp_path / "dense", pre_tokenizer, **sizes)
    cut = _cut(checkpoint, 1000, KEPT_TEXT[:20], tmp_path / "cut")
    small = read_tokenizer(cut / "tokenizer.json")
    lines = make_mixed_lines(10_000)
    found = _ids(small, lines)
    assert list(lines) == _decode(small, found)

    exported = export(Checkpoint(cut), tmp_path / "cut.gguf", quant="q8_0")
    (answer,) = ask_llama([exported.path], [1, 2], lines)
    assert found == answer.tokens
