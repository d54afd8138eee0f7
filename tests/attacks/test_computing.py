"""What a stranger's file makes us compute: bounded in time and memory, and one clear line.

Every case is a line of a table. One process carries out a table, with what it starts, and says of
each case how it ended and what it took.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.attacked import Outcome, attack
from tests.support.tiny_models import edit_json, write_tokenizer
from tests.support.yardstick import is_too_long

DOUBLED = (
    "{% set ns = namespace(a=[0], b=[0]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}"
)
DOUBLED += "{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
WIDE = "{% set ns = namespace(x='x' * 8000000) %}"
NESTED = "{% for a in [1] %}" * 21 + "x" + "{% endfor %}" * 21

TEMPLATES = {
    "format at compile time": "{{ '%700000000d' % 1 }}",
    "format": "{{ '%700000000d' % messages|length }}",
    "format filter": "{{ '%700000000d'|format(messages|length) }}",
    "format method": "{{ '{:700000000d}'.format(messages|length) }}",
    "equal lists": DOUBLED + "{{ ns.a == ns.b }}",
    "printed list": DOUBLED + "{{ ns.a }}",
    "tojson": DOUBLED + "{{ ns.a|tojson }}",
    "sum of lists": "{% set x = [[0] * 900000] * 900 %}{{ x|sum(start=[])|length }}",
    "join": WIDE + "{{ ns.x.join(['y'] * 900)|length }}",
    "join filter": WIDE + "{{ (['y'] * 900)|join(ns.x)|length }}",
    "replace": WIDE + "{{ ns.x|replace('x', 'y' * 900)|length }}",
    "replace method": WIDE + "{{ ns.x.replace('x', 'y' * 900)|length }}",
    "expandtabs": "{{ ('\t' * 900000).expandtabs(900)|length }}",
    "indent": "{{ ('x\n' * 900000)|indent(900)|length }}",
    "list of texts": WIDE + "{% set y = [] %}{{ [ns.x ~ 1, ns.x ~ 2] * 10 }}",
    "power": "{{ 7 ** 99999999 }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=1000) }}",
    "doubled text": (
        "{% set ns = namespace(x='xxxxxxxx') %}"
        "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "squared number": (
        "{% set ns = namespace(x=3) %}"
        "{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
    ),
    "indented": "{{ messages | tojson(indent=9999999999) }}",
    "centred": "{{ 'x' | center(9999999999) }}",
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "slow sort": "{% for i in range(99999) %}{% set x = range(99999)|sort %}{% endfor %}",
    "nested loops": NESTED,
    "break outside": "{% break %}",
    "cycler without items": "{{ cycler() }}",
    "many statements": "{% set a = 1 %}" * 300_000,
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "surrogate": "{{ '\\ud800' }}",
}


def _normalizer(step: dict[str, Any], times: int = 34, *first: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": [*first, *[step] * times]}}


def _decoder(step: dict[str, Any], times: int = 34) -> dict[str, Any]:
    return {"decoder": {"type": "Sequence", "decoders": [step] * times}}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _split(expression: str) -> dict[str, Any]:
    pattern = {"Regex": expression}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": split}


LONG = "xxxxxxxxxx" * 100
TOKENIZERS = {
    "34 replacements": _normalizer(_replace("e", "ee")),
    "34 replacements when decoding": _decoder(_replace("e", "ee")),
    "empty pattern": _normalizer(_replace("", LONG), 5),
    "empty pattern when decoding": _decoder(_replace("", LONG), 5),
    "prepended": _normalizer(_replace("x", "xx"), 34, {"type": "Prepend", "prepend": "x" * 1000}),
    "precompiled nonsense": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    },
    "unknown token beyond": {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}},
    "scores that are no numbers": {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1e999]]}
    },
    "words without unknown": {"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "b"}},
    "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}},
    "strip beyond": {"decoder": {"type": "Strip", "content": "a", "start": 2**63, "stop": 2**63}},
    "catastrophic split": _split(r"(?:\D|\d|.)*Z$|((a+)+)+b|(.*.*.*.*.*.*.*.*=.*)+$"),
    "no expression": _split("((("),
    "version": {"version": "9.9"},
    "no model": {"model": None},
    "unknown model": {"model": {"type": "Nothing"}},
    "ids beyond": {"added_tokens": [{"id": 2**40, "content": "a"}]},
    "no object": {"normalizer": 3},
}

SCORERS = {
    "catastrophic expression": (r"regex:(\D|\d|.)*Z$", "a1" * 200, "7"),
    "nested repeats": ("regex:(x+x+)+y", "x" * 60, "7"),
    "huge repeat": ("regex:(?:a{1,65535}){1,65535}b", "a" * 9999, "7"),
    "no expression": ("regex:(((", "1", "1"),
}
QUADRATIC = {
    "gold of words": ("auto", "The answer is four.", "a " * 60_000 + "1"),
    "gold of spaces": ("number", "7", " " * 60_000 + "1"),
    "open boxes": ("boxed", r"\boxed{" * 20_000, "7"),
    "open brackets": ("choice", "(" * 60_000 + "1", "B"),
    "no letter": ("choice", "B", "-" * 60_000),
}
LICENSES = {
    "many lines": "---\n" + "license: a \n" * 30_000 + "license: a b\n",
    "no lines": "---" + "\n" * 330_000,
}

MAX_SECONDS = 2.0
MEMORY_BYTES = 300 * 2**20


def check(found: Outcome, healthy: Outcome, codes: tuple[int, ...]) -> None:
    """Compare an outcome with the promise, and with what a healthy case took."""
    assert found.code in codes, found.message
    bar_s = healthy.processor_s + MAX_SECONDS
    assert not is_too_long(found.processor_s, bar_s), f"{found.processor_s:.1f} s"
    assert found.memory_bytes < healthy.memory_bytes + MEMORY_BYTES
    if found.code:
        assert found.message == found.message.strip()
        assert 20 < len(found.message.splitlines()[0]) < 3000


@pytest.fixture(scope="module")
def templates() -> dict[str, Outcome]:
    sources = {"healthy": "{{ messages[0].content }}", **TEMPLATES}
    outcomes = attack(("template", [source]) for source in sources.values())
    return dict(zip(sources, outcomes, strict=True))


@pytest.mark.answers("M1")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template(templates: dict[str, Outcome], name: str) -> None:
    check(templates[name], templates["healthy"], (2,))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folders = {}
    for name, changes in {"healthy": {}, **TOKENIZERS}.items():
        folders[name] = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folders[name])
        if changes:
            edit_json(folders[name] / "tokenizer.json", **changes)

    outcomes = attack(("tokenizer", [str(folder)]) for folder in folders.values())
    return dict(zip(folders, outcomes, strict=True))


@pytest.mark.answers("M2")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer(tokenizers: dict[str, Outcome], name: str) -> None:
    check(tokenizers[name], tokenizers["healthy"], (2,))


@pytest.fixture(scope="module")
def scores() -> dict[str, Outcome]:
    cases = {"healthy": ("auto", "4", "4"), **SCORERS, **QUADRATIC}
    outcomes = attack(("scorer", list(case)) for case in cases.values())
    return dict(zip(cases, outcomes, strict=True))


@pytest.mark.answers("M4")
@pytest.mark.parametrize("name", [*SCORERS, *QUADRATIC])
def test_a_scorer(scores: dict[str, Outcome], name: str) -> None:
    """An expression is refused; of a long text, a verdict will do."""
    check(scores[name], scores["healthy"], (2,) if name in SCORERS else (0, 2))


@pytest.mark.parametrize("name", LICENSES)
def test_a_model_card(tmp_path: Path, name: str) -> None:
    for folder, text in (("healthy", "---\nlicense: mit\n---\n"), ("hostile", LICENSES[name])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text(text)

    cases = [("license", [str(tmp_path / folder)]) for folder in ("healthy", "hostile")]
    healthy, found = attack(cases)
    check(found, healthy, (0,))
