"""Strings on which tokenizers disagree: the probe of token parity.

A pre-tokenizer is proven by equal ids on these. All are in NFC, because llama.cpp has no Unicode
normalizer and a tokenizer with one would differ on the rest for that reason alone. The list is the
same everywhere.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator
from random import Random

_WORDS = (
    "hello", "Hello", "HELLO", "camelCaseWord", "snake_case_word", "kebab-case",
    "naïve", "Straße", "Ærøskøbing", "Привет", "ΑΒΓ", "αβγδ", "İstanbul", "東京",
    "北京大学", "한국어", "日本語テキスト", "สวัสดี", "नमस्ते", "مرحبا", "שלום", "გამარჯობა",
    "አማርኛ", "ខ្មែរ", "தமிழ்", "Việt", "ﬁn", "Ⅷ", "x²", "½", "①", "𝒜𝓁𝓅𝒽𝒶", "ªº",
    "ʰʷ", "ǅ",
)  # fmt: skip
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_SPACES = (
    " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\n ", "\t\t", " \t ", "\u00a0", "\u3000",
    "\u2003", "\v", "\f",
)  # fmt: skip
_EMOJI = ("🚀", "😶‍🌫️", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "1️⃣", "✅", "🦙🦙", "☺️")
_MARKS = ("x̂", "q̃", "ā̤", "e̋̃", "क्षि", "กิ้", "מְ", "بِّ", "Z͑ͫ̓ͪ̂", "🅰️")
_TAGS = (
    "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<｜User｜>",
    "<tool_call>", "[INST]",
)  # fmt: skip
_LINES = (
    r"\frac{a}{b} + \sqrt{x^2 + y^2} = \boxed{42}",
    r"$$\sum_{i=1}^{n} i = \frac{n(n+1)}{2}$$",
    r"\begin{align} x &= 1 \\ y &\neq 2 \end{align}",
    "def f(x):\n    return x ** 2  # squared\n\n\nprint(f(3))",
    "if (a != b && c >= d || !e) { x->y[0]++; }",
    "for i in range(10):\n\tfoo[i] += 1\n\t\tbar(i)\n",
    '{"key": [1, 2.5, -3e10], "b": null, "c": "\\u00e9"}',
    "SELECT * FROM t WHERE a='x' AND b<>3;",
    "https://example.com/a/b?x=1&y=%20z#frag",
    "mail.name+tag@sub.example.org",
    "C:\\Users\\name\\file.txt",
    "<div class=\"a\">text &amp; more</div><!-- note -->",
    "3.14159 2,718,281 1e-5 0xDEADBEEF 192.168.0.1 12:34:56 2024-01-31",
    "Wait, let me re-check... 12*13=156; 156-6=150. So the answer is 150.",
    "\"quoted\" 'single' `code` “curly” ‘curly’ «guillemets» 「括弧」",
    "!!!??? ... ---- ==== ____ //// \\\\\\\\ ''''''```````\"\"\"\"",
    "∀x∈ℝ: ⌈x⌉ ≥ x, ∑∏∫ ≤ ≠ ± ∞ → ⇒ €£¥",
    "مرحبا بالعالم ١٢٣ 。、！？ ½ ¾ ⅓",
    "a\u200bb\u200cc\u200dd\ufeffe\u00adf",
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\u0085\u2028\u2029",
    "\U0010ffff\U000e0001\ue000",
)  # fmt: skip


def probe_strings() -> list[str]:
    """Return a few hundred different hard strings, always the same ones."""
    strings = dict.fromkeys(unicodedata.normalize("NFC", text) for text in _strings())
    return list(strings)


def _strings() -> Iterator[str]:
    yield from _LINES
    yield from _TAGS
    yield from _EMOJI + _MARKS + _WORDS

    for count in (1, 2, 3, 4, 5, 7, 10, 31):
        yield "1234567890"[:count] * (1 if count <= 10 else 4)
        yield f"a{'7' * count}b {'9' * count}.{'0' * count}"
        yield " " * count + "x"
        yield "x" + " " * count
        yield "\n" * count + " x\t" * count

    yield from ("١٢٣٤٥", "१२३४५६", "１２３４", "Ⅳ𝟜𝟝", "৪৫ ৬")
    yield from _contractions()

    for left, right in itertools.pairwise(_SPACES):
        yield f"word{left}{right}word{right}{left}"
        yield f"{left}{right}"

    yield from (
        "a" * 300,
        "Supercalifragilistic" * 20,
        "東" * 100,
        "-" * 200,
        "👍" * 40,
        "ab1" * 100,
    )

    for tag in _TAGS:
        yield f"text{tag}text {tag} {tag}\n{tag}{tag}"

    yield from _mixtures()


def _contractions() -> Iterator[str]:
    for ending in _CONTRACTIONS:
        yield f"I{ending} you{ending.upper()} We{ending.title()} 5{ending} {ending}x ’{ending[1:]}"
    yield "'ſ 'S'T'RE'vE'Ll it''s o'clock rock'n'roll dogs' 'tis 'D'd"


def _mixtures() -> Iterator[str]:
    """Yield random sequences of everything above."""
    random = Random("racdeploy probe")
    pieces = [*_WORDS, *_CONTRACTIONS, *_SPACES, *_EMOJI, *_MARKS, *_TAGS[:2]]
    pieces += ["12", "345", "6789", ".", ",", "(", "—"]
    for _ in range(200):
        count = random.randint(2, 12)
        yield "".join(random.choice(pieces) for _ in range(count))
