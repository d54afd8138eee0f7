"""The split of thinking and answer, against a slow version that works on strings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.runtime.template import ChatTemplate, PromptEncoder
from racdeploy.runtime.text import StreamDecoder
from racdeploy.runtime.thinking import (
    SplitCompletion,
    ThinkingTags,
    encode_tags,
    find_prompt_state,
    find_tag_names,
    find_tags,
    split_completion,
)
from tests.support.errors import raises
from tests.support.tiny_models import SPECIAL_TOKENS, edit_json, write_tokenizer

EOS = "$"


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def tags(open_tag: str, close_tag: str) -> ThinkingTags:
    return ThinkingTags(tuple(ids(open_tag)), tuple(ids(close_tag)), frozenset({ord(" ")}))


def split_text(
    prompt: str,
    completion: str,
    open_tag: str = "<",
    close_tag: str = ">",
    forced_at: int | None = None,
) -> tuple[str, str, str]:
    """Split texts in which every character is a token."""
    parts = split_completion(
        ids(prompt),
        ids(completion),
        tags(open_tag, close_tag),
        eos_ids=ids(EOS),
        forced_at=forced_at,
    )
    return "".join(map(chr, parts.thinking_ids)), "".join(map(chr, parts.answer_ids)), parts.state


def oracle(prompt: str, completion: str, open_tag: str, close_tag: str) -> tuple[str, str, str]:
    """The same split with ``str.find``."""
    text, tail = completion.rstrip(EOS), prompt.rstrip(" ")
    inside = tail.endswith(open_tag)
    prompt_closed = not inside and tail.endswith(close_tag)
    prompt_bare = not inside and not prompt_closed
    thoughts: list[str] = []
    start = 0
    while True:
        ends = {}
        if inside or (prompt_bare and not thoughts):
            ends["close"] = text.find(close_tag, start)
        if not inside:
            ends["open"] = text.find(open_tag, start)
        lengths = {"close": len(close_tag), "open": len(open_tag)}
        found = {kind: at + lengths[kind] for kind, at in ends.items() if at >= 0}
        if not found:
            break
        kind = min(found, key=lambda k: (found[k], k == "close"))
        if kind == "close":
            thoughts.append(text[start if inside else 0 : ends["close"]])
        inside, start = kind == "open", found[kind]
    if inside:
        thoughts.append(text[start:])
    if not thoughts:
        return "", text, "absent"
    state = "open" if inside else "closed"
    if (len(thoughts) > 1 or prompt_closed) and not inside:
        state = "reopened"
    return "".join(thoughts), "" if inside else text[start:], state


TAG_TEXT = st.text("ab<>/", min_size=1, max_size=3)


@settings(deadline=None, max_examples=600)
@given(
    prompt=st.lists(st.sampled_from([*"ab<>/ ", "OPEN", "CLOSE"]), max_size=6),
    completion=st.lists(st.sampled_from([*"ab<>/ $", "OPEN", "CLOSE"]), max_size=14),
    pair=st.tuples(TAG_TEXT, TAG_TEXT).filter(lambda pair: pair[0] != pair[1]),
)
@example(prompt=["OPEN", " "], completion=["a", "b"], pair=("<", ">"))
@example(prompt=["CLOSE", " "], completion=["OPEN", "b"], pair=("<", ">"))
@example(prompt=[], completion=["a", "CLOSE", "b"], pair=("<a", "</"))
def test_the_split_equals_the_slow_one(
    prompt: list[str], completion: list[str], pair: tuple[str, str]
) -> None:
    named = {"OPEN": pair[0], "CLOSE": pair[1]}
    prompt_text, completion_text = (
        "".join(named.get(c, c) for c in part) for part in (prompt, completion)
    )
    assert oracle(prompt_text, completion_text, *pair) == split_text(
        prompt_text, completion_text, *pair
    )


def find(ids: list[int], wanted: list[int]) -> int:
    """Return where a list begins to hold another, or a place behind it."""
    places = range(len(ids) - len(wanted) + 1)
    return next(
        (place for place in places if ids[place : place + len(wanted)] == wanted), len(ids) + 1
    )


@settings(deadline=None, max_examples=400)
@given(
    prompt=st.lists(st.integers(0, 5), max_size=6),
    completion=st.lists(st.integers(0, 5), max_size=20),
    pair=st.tuples(*[st.lists(st.integers(1, 4), min_size=1, max_size=3)] * 2).filter(
        lambda pair: pair[0] != pair[1]
    ),
    forced=st.booleans(),
)
def test_where_a_thought_began_follows_from_ids_alone(
    prompt: list[int], completion: list[int], pair: tuple[list[int], list[int]], forced: bool
) -> None:
    """Prefilled, emitted, implied or none, for tags of one or several tokens; no text is involved.
    0 is a space.
    """
    open_ids, close_ids = pair
    known = ThinkingTags(tuple(open_ids), tuple(close_ids), frozenset({0}))
    first_open, first_close = find(completion, open_ids), find(completion, close_ids)
    ends = first_open + len(open_ids), first_close + len(close_ids)
    before = find_prompt_state(prompt, known)
    if before == "open":
        expected = "prefilled"
    elif first_open > len(completion) and (first_close > len(completion) or before == "closed"):
        expected = "none"
    else:
        expected = "implied" if before == "none" and ends[1] < ends[0] else "emitted"
    forced_at = first_close if forced and first_close <= len(completion) else None
    parts = split_completion(prompt, completion, known, eos_ids=(9,), forced_at=forced_at)
    if (
        ends[0] != ends[1]
    ):  # one tag may end the other; the longer scan of the slow test decides those
        assert parts.opening == expected
    assert (parts.state == "absent") == (parts.opening == "none")
    assert len(parts.thinking_ids) + len(parts.answer_ids) <= len(completion)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        pytest.param("q<", "abc>42$", ("abc", "42", "closed"), id="R1: the prompt opens"),
        pytest.param("q<  ", "abc>42$", ("abc", "42", "closed"), id="with white space behind"),
        pytest.param("q", "<abc>42$", ("abc", "42", "closed"), id="Qwen3: the model opens"),
        pytest.param(
            "q", " <abc>42$", ("abc", "42", "closed"), id="text before the open tag is neither"
        ),
        pytest.param("q<  > ", "42$", ("", "42", "absent"), id="Qwen3, thinking turned off"),
        pytest.param(
            "q<  > ", "<ab>42$", ("ab", "42", "reopened"), id="thinking although turned off"
        ),
        pytest.param("q", "42$", ("", "42", "absent"), id="no thinking"),
        pytest.param("q<", "abc", ("abc", "", "open"), id="cut"),
        pytest.param("q<", "abc$", ("abc", "", "open"), id="ended inside the thinking"),
        pytest.param("q", "abc>42$", ("abc", "42", "closed"), id="the model forgot the open tag"),
        pytest.param("q<", "abc>42<de>43$", ("abcde", "43", "reopened"), id="reopened"),
        pytest.param("q<", "abc>42<de", ("abcde", "", "open"), id="reopened and cut"),
        pytest.param("q<", ">42$", ("", "42", "closed"), id="an empty thought"),
        pytest.param("is < a tag?", "42$", ("", "42", "absent"), id="a tag in the question"),
        pytest.param("", "", ("", "", "absent"), id="nothing"),
    ],
)
def test_what_models_do(prompt: str, completion: str, expected: tuple[str, str, str]) -> None:
    assert expected == split_text(prompt, completion)


def test_a_forced_close_is_told_from_a_natural_one() -> None:
    assert split_text("<", "abc>42$", forced_at=3) == ("abc", "42", "forced")
    assert split_text("<", "ab>c>42$", forced_at=4) == ("ab", "c>42", "closed")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("abcd>e>42$", ("abcd", "e42", "forced")),
        ("abcd>e>f>42$", ("abcd", "ef42", "forced")),
        ("abcd>e<f>4>2$", ("abcdf", "42", "reopened")),
        ("ab>c>42$", ("ab", "c>42", "closed")),
    ],
)
def test_thinking_that_goes_on_after_a_forced_close(
    completion: str, expected: tuple[str, str, str]
) -> None:
    """The model's own close tag is no text of the answer, in a stream neither."""
    forced_at = 4 if expected[2] != "closed" else None
    assert split_text("<", completion, forced_at=forced_at) == expected

    shown: dict[str, str] = {"thinking": "", "answer": ""}

    def show(text: str, kind: str) -> None:
        shown[kind] += text

    decoder = StreamDecoder(_Characters(), ids("<"), tags("<", ">"), ids(EOS), show, 4)  # type: ignore[arg-type]
    for token in ids(completion):
        decoder.feed(0, [token], None)
    decoder.finish()
    assert shown["answer"].endswith(expected[1])
    assert (">" in shown["answer"]) == (">" in expected[1])


class _Characters:
    """An encoder whose tokens are characters."""

    @property
    def tokenizer(self) -> _Characters:
        return self

    def decode_batch(self, sequences: list[list[int]]) -> list[str]:
        return ["".join(map(chr, ids)) for ids in sequences]


def test_a_forced_tag_that_the_cap_cut_is_no_thinking() -> None:
    assert split_text("<", "abc</", "<", "</>", forced_at=3) == ("abc", "", "open")


def test_a_model_without_tags_only_answers() -> None:
    assert split_completion([1], [2, 3, 0, 0], None, eos_ids=(0,)) == SplitCompletion(
        (), (2, 3), "absent"
    )


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def test_tags_are_found_in_the_vocabulary(tokenizer_folder: Path) -> None:
    """Single tokens; and white space between the tag and the end of the prompt is known."""
    encoder = PromptEncoder.from_folder(tokenizer_folder)
    found = find_tags(encoder)
    assert found is not None
    assert (found.open_ids, found.close_ids) == (
        (SPECIAL_TOKENS["<think>"],),
        (SPECIAL_TOKENS["</think>"],),
    )
    assert find_prompt_state(encoder.encode("Is <think> a tag?"), found) == "open"
    assert find_prompt_state(encoder.encode_text("<think>\n\n</think>\n\n \t"), found) == "closed"
    assert find_prompt_state(encoder.encode_text("<think>\n x"), found) == "none"


def test_tags_of_several_tokens_are_found_by_the_template(tokenizer_folder: Path) -> None:
    source = "{{ messages[0]['content'] }}[THINK]{# closed by [/THINK] #}"
    tokenizer = read_tokenizer(tokenizer_folder / "tokenizer.json")
    plain = PromptEncoder(tokenizer, ChatTemplate(source, sandbox=tokenizer.sandbox))
    found = encode_tags(plain, "[THINK]", "[/THINK]")
    assert found
    assert len(found.open_ids) > 1
    assert find_prompt_state(plain.encode("hello"), found) == "open"


HARMONY = (
    "{% for m in messages %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}"
    "{% if m.thinking %}{{ '<|channel|>analysis<|message|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


@pytest.fixture
def harmony(tokenizer_folder: Path) -> PromptEncoder:
    """A tokenizer whose only control tokens are those of GPT-OSS."""
    file = tokenizer_folder / "tokenizer.json"
    (kind, *_) = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
    added = [kind | {"id": 490 + n, "content": text} for n, text in enumerate(MARKERS)]
    edit_json(file, added_tokens=added)
    tokenizer = read_tokenizer(file)
    return PromptEncoder(tokenizer, ChatTemplate(HARMONY, sandbox=tokenizer.sandbox))


_ANALYSIS = "<|channel|>analysis<|message|>"
_FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("completion", "thinking", "answer", "state"),
    [
        (f"{_ANALYSIS}6 times 7<|end|>{_FINAL}42<|return|>", "6 times 7", "42", "closed"),
        ("<|channel|>final<|message|>42<|return|>", "", "42", "absent"),
        (f"{_ANALYSIS}6 times 7<|end|>", "6 times 7<|end|>", "", "open"),
        (
            f"{_ANALYSIS}a<|end|><|start|>assistant{_ANALYSIS}b<|end|>{_FINAL}42<|return|>",
            f"a<|end|><|start|>assistant{_ANALYSIS}b",
            "42",
            "closed",
        ),
        ("<|channel|>commentary<|message|>42", "", "<|channel|>commentary<|message|>42", "absent"),
    ],
    ids=["both channels", "no thought", "cut", "two thoughts", "another channel"],
)
def test_channels_of_gpt_oss_are_told_apart(
    harmony: PromptEncoder, completion: str, thinking: str, answer: str, state: str
) -> None:
    """The tags are whole headers of channels; text as it comes has none of them."""
    found = find_tags(harmony)
    assert found is not None
    prompt_ids, completion_ids = harmony.encode("6 times 7?"), harmony.encode_text(completion)
    eos = harmony.encode_text("<|return|>")
    parts = split_completion(prompt_ids, completion_ids, found, eos_ids=eos)
    assert harmony.decode(parts.thinking_ids) == thinking
    assert harmony.decode(parts.answer_ids) == answer
    assert parts.state == state

    shown: list[tuple[str, str]] = []
    reader = StreamDecoder(harmony, prompt_ids, found, eos, lambda *piece: shown.append(piece))
    for token in completion_ids:
        reader.feed(0, [token], None)
    reader.finish()
    for kind, expected in (("thinking", thinking), ("answer", answer)):
        assert "".join(text for text, own in shown if own == kind) == expected


def test_an_answer_that_the_prompt_begins_has_no_thought(harmony: PromptEncoder) -> None:
    """As where a template was told to leave the thinking out."""
    found = find_tags(harmony)
    assert found is not None
    rendered = harmony.encode("6 times 7?")
    assert find_prompt_state(rendered, found) == "none"
    final = harmony.encode_text("<|channel|>final<|message|>")
    assert find_prompt_state([*rendered, *final], found) == "closed"
    analysis = harmony.encode_text(_ANALYSIS)
    assert find_prompt_state([*rendered, *analysis], found) == "open"


def test_a_model_that_does_not_think_has_no_tags(tokenizer_folder: Path) -> None:
    file = tokenizer_folder / "tokenizer.json"
    edit_json(file, added_tokens=[])
    source = "{{ messages[0]['content'] }}"
    tokenizer = read_tokenizer(file)
    encoder = PromptEncoder(tokenizer, ChatTemplate(source, sandbox=tokenizer.sandbox))
    assert find_tag_names(encoder) is None


def test_a_tag_without_ids_is_an_error(tokenizer_folder: Path) -> None:
    encoder = PromptEncoder.from_folder(tokenizer_folder)
    with raises("tags-not-encodable", "</think>"):
        encode_tags(encoder, "", "</think>")
