"""Which of llama.cpp's built-in pre-tokenizers does what a tokenizer.json says.

No name does all of o200k or Tekken; the one that is nearest is written where that is accepted.
Source: llama.cpp ``src/llama-vocab.cpp``, ``llm_tokenizer_bpe`` and ``tokenizer_pre``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from racdeploy.errors import ModelError
from racdeploy.models.tokenizer_form import flatten

_SHOWN = 500  # characters of steps, in a message
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


class Approximation(NamedTuple):
    """What an expression is known as, llama.cpp's own name for it, and the one that is nearest."""

    known_as: str
    own: str
    nearest: str


# Unlike llama.cpp's own names for these, it keeps combining marks in words: of 10,380 strings, 0 to
# 89 differ in place of 315 to 368. It too knows capitals in ASCII only. Older versions lack it.
_NEAREST = "granite-embed-multi-97m"
APPROXIMATED = {
    rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASH}": Approximation("Tekken", "tekken", _NEAREST),
    rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASH}": (
        Approximation("o200k", "gpt-4o", _NEAREST)
    ),
}
TABLE: dict[tuple[tuple[str, ...], bool], str] = {
    (("split " + _QWEN2, "bytes"), False): "qwen2",
    (("split " + _LLAMA3, "bytes"), True): "llama-bpe",
    (("split " + _LLAMA3, "bytes"), False): "smaug-bpe",
    (("split " + _QWEN35, "bytes"), False): "qwen35",
    (("bytes with regex",), False): "gpt-2",
    (("digits", "bytes with regex"), False): "smollm",
    ((*("split " + part for part in _DEEPSEEK3), "bytes"), False): "deepseek-v3",
}


def find_approximation(tokenizer: Mapping[str, Any]) -> Approximation | None:
    """Return what comes nearest to a pre-tokenizer that llama.cpp has no equal of; else None."""
    for step in _name_steps(tokenizer.get("pre_tokenizer")):
        if known := APPROXIMATED.get(step.removeprefix("split ")):
            return known
    return None


def find_pre_tokenizer(tokenizer: Mapping[str, Any], *, approximate: bool = False) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json.

    Args:
        approximate: whether the nearest will do where llama.cpp has no equal.
    """
    known = find_approximation(tokenizer)
    if known and approximate:
        return known.nearest
    if known:
        raise ModelError(
            "approximate-pre-tokenizer",
            f"llama.cpp only approximates the pre-tokenizer {known.known_as} of this tokenizer:"
            " capitals outside ASCII and combining marks are split differently",
            remedy="accept a share of hard strings that differ, which is counted and shown: "
            "export.accept_token_differences = 0.001",
        )

    steps = tuple(_name_steps(tokenizer.get("pre_tokenizer")))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    name = TABLE.get((steps, ignore_merges))
    if name is None:
        raise ModelError(
            "unknown-pre-tokenizer",
            f"no llama.cpp pre-tokenizer is known for {show(steps) or 'none'} with"
            f" ignore_merges {ignore_merges}",
            remedy="look it up in llama.cpp's src/llama-vocab.cpp and set export.pre_tokenizer in"
            " the recipe",
        )

    return name


def note_normalizer(tokenizer: Mapping[str, Any]) -> str:
    """Return what llama.cpp leaves out of a tokenizer's normalizer, or an empty string."""
    kinds = [step.get("type") for step in flatten(tokenizer.get("normalizer"), "normalizers")]
    if not kinds:
        return ""

    if kinds == ["NFC"]:
        return (
            "the tokenizer normalizes text to NFC and llama.cpp does not: text that is not NFC gets"
            " other tokens when llama.cpp tokenizes it"
        )

    raise ModelError(
        "unsupported-tokenizer",
        f"the tokenizer's normalizer {show(kinds)} has no counterpart in llama.cpp",
        remedy="only byte-level BPE tokenizers without a normalizer or with NFC can be exported"
        " to GGUF",
    )


def _name_steps(pre_tokenizer: object) -> Iterator[str]:
    """Yield one canonical phrase per step; anything unusual stays visible in the phrase."""
    for step in flatten(pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": behavior}:
                how = (behavior, bool(step.get("invert", False)))
                # either way every match is a word; the known expressions leave nothing between two
                covers = how in (("Isolated", False), ("Removed", True))
                yield f"split {regex}" if covers else f"split by {behavior} {regex}"
            case {"type": "Digits", "individual_digits": True}:
                yield "digits"
            case {"type": "ByteLevel", "add_prefix_space": False}:
                yield "bytes with regex" if step.get("use_regex", True) else "bytes"
            case _:
                yield str(step)


def show(steps: Iterable[object]) -> str:
    """Return steps, which are as their author wrote them, in one line."""
    return " + ".join(" ".join(str(step).split()) for step in steps)[:_SHOWN]
