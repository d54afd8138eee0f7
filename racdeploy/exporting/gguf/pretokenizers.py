"""Find the built-in pre-tokenizer of llama.cpp that equals the one of a tokenizer.json.

None equals o200k or Tekken; the nearest one is written if the recipe accepts that.
Source: llama.cpp ``src/llama-vocab.cpp``, ``llm_tokenizer_bpe`` and ``tokenizer_pre``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from racdeploy.errors import ModelError
from racdeploy.files.reading import Json

_MAX_SHOWN = 500  # characters of steps in a message
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS_AND_SPACES}"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS_AND_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_CASED = tuple(
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{upper}[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{lower}"
    for upper, lower in ("*+", "+*")
)
_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# Unlike those that llama.cpp has for them, it keeps combining marks in words: of 10,380 strings, 0
# to 89 differ instead of 315 to 368. It also handles only ASCII capitals. Older versions lack it.
NEAREST = "granite-embed-multi-97m"
APPROXIMATE_PRE_TOKENIZERS = {
    rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASH}": "Tekken",
    rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASH}": "o200k",
}
"""Pre-tokenizers without an equal in llama.cpp; the nearest is :data:`NEAREST`."""
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("split " + _QWEN2, "bytes"), False): "qwen2",
    (("split " + _LLAMA3, "bytes"), True): "llama-bpe",
    (("split " + _LLAMA3, "bytes"), False): "smaug-bpe",
    (("split " + _QWEN35, "bytes"), False): "qwen35",
    (("bytes with regex",), False): "gpt-2",
    (("digits", "bytes with regex"), False): "smollm",
    ((*("split " + part for part in _DEEPSEEK3), "bytes"), False): "deepseek-v3",
}


def find_approximation(pre_tokenizers: Iterable[Json]) -> str | None:
    """Return the name of a pre-tokenizer without an equal in llama.cpp, or None."""
    return _find_known_approximation(list(_name_steps(pre_tokenizers)))


def find_pre_tokenizer(
    pre_tokenizers: Iterable[Json], *, ignore_merges: bool = False, approximate: bool = False
) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json, given its steps.

    Args:
        ignore_merges: the model takes a word that is a token as it is.
        approximate: accept the nearest one if llama.cpp has no equal.
    """
    steps = tuple(_name_steps(pre_tokenizers))
    known = _find_known_approximation(steps)
    if known and approximate:
        return NEAREST
    if known:
        raise ModelError(
            "approximate-pre-tokenizer",
            f"llama.cpp only approximates the pre-tokenizer {known} of this tokenizer:"
            " capitals outside ASCII and combining marks are split differently",
            remedy="accept a fraction of hard strings that differ, which is counted and shown: "
            "export.accept_token_differences = 0.001",
        )

    name = PRE_TOKENIZERS.get((steps, ignore_merges))
    if name is None:
        raise ModelError(
            "unknown-pre-tokenizer",
            f"no llama.cpp pre-tokenizer is known for {format_steps(steps) or 'none'} with"
            f" ignore_merges {ignore_merges}",
            remedy="look it up in llama.cpp's src/llama-vocab.cpp and set export.pre_tokenizer in"
            " the recipe",
        )

    return name


def describe_lost_normalizer(normalizers: Iterable[Json]) -> str:
    """Return a note on a normalizer that llama.cpp does not apply, or an empty string."""
    kinds = [step.get("type") for step in normalizers]
    if not kinds:
        return ""

    if kinds == ["NFC"]:
        return (
            "the tokenizer normalizes text to NFC and llama.cpp does not: text that is not NFC gets"
            " other tokens from llama.cpp"
        )

    raise ModelError(
        "unsupported-tokenizer",
        f"the tokenizer's normalizer {format_steps(kinds)} has no counterpart in llama.cpp",
        remedy="only byte-level BPE tokenizers without a normalizer or with NFC can be exported"
        " to GGUF",
    )


def _find_known_approximation(steps: Iterable[str]) -> str | None:
    for step in steps:
        if known := APPROXIMATE_PRE_TOKENIZERS.get(step.removeprefix("split ")):
            return known
    return None


def _name_steps(pre_tokenizers: Iterable[Json]) -> Iterator[str]:
    """Yield one canonical phrase per step; an unknown step is its JSON value."""
    for step in pre_tokenizers:
        match step:
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": behavior}:
                kind = (behavior, bool(step.get("invert", False)))
                # In both kinds every match is a word, and known expressions match all of a text.
                covers = kind in (("Isolated", False), ("Removed", True))
                yield f"split {regex}" if covers else f"split by {behavior} {regex}"
            case {"type": "Digits", "individual_digits": True}:
                yield "digits"
            case {"type": "ByteLevel", "add_prefix_space": False}:
                yield "bytes with regex" if step.get("use_regex", True) else "bytes"
            case _:
                yield str(step)


def format_steps(steps: Iterable[object]) -> str:
    """Return steps in one line of bounded length, for a message."""
    return " + ".join(" ".join(str(step).split()) for step in steps)[:_MAX_SHOWN]
