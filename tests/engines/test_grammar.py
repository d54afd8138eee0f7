"""Answers that keep a JSON schema: what the grammar lets through, and when it begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from racdeploy.engines.backends.llamacpp import open_engine, open_vocabulary
from racdeploy.engines.engine import Engine, EngineSettings, Sampling, ThinkingBudget
from racdeploy.engines.sequence import GeneratedSequence
from tests.support.errors import raises
from tests.support.tiny_artifacts import CLOSE_ID, EOS_ID, OPEN_ID, make_gguf
from tests.support.tiny_models import SPECIAL_TOKENS

NUMBERS = {"n": {"type": "integer"}, "x": {"type": "number"}, "ok": {"type": "boolean"}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "numbers": {"type": "object", "properties": NUMBERS, "required": ["x", "n"]},
    "nothing required": {"properties": NUMBERS, "additionalProperties": False},
    "no properties": {"type": "object", "properties": {}, "additionalProperties": False},
    "odd values": {"enum": ['a"b', "line\nend", "\\", "é", "🙂", 3, None, [1, {"a": 2}]]},
    "odd names": {"properties": {'a"\\\n': {"const": 1}}, "required": ['a"\\\n']},
    "text": {"properties": {"s": {"type": "string"}}, "required": ["s"]},
    "types": {"type": "array", "items": {"type": ["boolean", "null"]}},
    "types of values": {"type": ["string", "null"], "enum": ["a", None]},
    "alternatives": {
        "anyOf": [{"type": "array", "items": {"const": 1}}, {"properties": {"b": {"const": 2}}}]
    },
    "references of one name": {
        "properties": {
            "integer": {"$ref": "#/$defs/a/properties/v"},
            "v": {"$ref": "#/$defs/b/properties/v"},
        },
        "required": ["integer", "v"],
        "$defs": {
            "a": {"properties": {"v": {"enum": [1, 2]}}},
            "b": {"properties": {"v": {"type": "array", "items": {"const": "b"}}}},
        },
        "title": "Two",
    },
    "own base": {
        "properties": {
            "a": {"$id": "http://x/a", "$ref": "#/$defs/v", "$defs": {"v": {"const": 1}}},
        },
        "$defs": {"v": {"const": 2}},
        "required": ["a"],
    },
}
STOP_IDS = (EOS_ID, SPECIAL_TOKENS["<|endoftext|>"])  # all that llama.cpp knows
BUDGET = ThinkingBudget((CLOSE_ID,), (OPEN_ID,), max_tokens=3, starts_open=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    settings = EngineSettings(3072, parallel=4, threads=1)
    with open_engine(make_gguf(tmp_path_factory.mktemp("grammar")), settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_vocabulary(make_gguf(tmp_path_factory.mktemp("vocabulary"))) as vocabulary:
        pieces = [bytes.fromhex(piece) for piece in vocabulary.info["pieces"]]
        yield lambda ids: b"".join(map(pieces.__getitem__, ids)).decode("utf-8", "replace")


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_keeps_its_schema_whatever_the_model_prefers(
    engine: Engine, decode: Any, name: str
) -> None:
    """Of a random model at a high temperature, as jsonschema judges; where llama.cpp knows one end
    more, it is no part of the answer.
    """
    sampling = Sampling(3000, STOP_IDS[:1], temperature=5.0, schema=SCHEMAS[name])
    ended = 0
    for seed in range(6):
        (completion,) = engine.generate([[1, 2]], replace(sampling, seed=seed))
        if completion.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(decode(completion.ids[:-1])), SCHEMAS[name])
    assert ended > 2


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^a$"},
        {"type": "array", "items": {}, "maxItems": 3},
        {"allOf": [{"type": "string"}]},
        {"not": {}},
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
        {"$ref": "http://example.com/schema.json"},
        {"$ref": "#/$defs/none"},
        {"anyOf": [{"type": "null"}], "properties": {}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"required": ["b"]},
        {"type": "thing"},
        {"type": {}},
        {"items": True, "type": "array"},
        {"enum": []},
        {"const": "\ud800"},
        {"properties": {str(i): {"enum": [str(i)] * 9} for i in range(999)}},
    ],
)
def test_what_no_grammar_keeps_is_refused(engine: Engine, schema: dict[str, Any]) -> None:
    """And the engine goes on."""
    for _ in range(2):
        with raises("schema-not-supported"):
            engine.generate([[1, 2]], Sampling(5, (EOS_ID,), schema=schema))
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    with raises("schema-not-supported"):
        engine.generate([[1, 2]], Sampling(5, (EOS_ID,), schema=deep))
    assert engine.generate([[1, 2]], Sampling(2, (EOS_ID,)))


def test_no_tag_comes_inside_an_answer(engine: Engine) -> None:
    """A tag's token spells text that a JSON string may hold; it would open a thought."""
    schema = {"type": "string"}
    for seed in range(4):
        sampling = Sampling(400, STOP_IDS, 50.0, seed=seed, budget=BUDGET, schema=schema)
        (completion,) = engine.generate([[1, OPEN_ID]], sampling)
        close = completion.ids.index(CLOSE_ID)
        assert close == 3
        assert not {OPEN_ID, CLOSE_ID} & set(completion.ids[close + 1 :])


class Letters:
    """Grammar that allows 1 and then 2."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allows(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.equal(ids, (1, 2, 5)[len(self.accepted)])

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize(
    ("starts_open", "open_ids", "wanted", "expected"),
    [
        (True, (4,), [3, 3, 0, 3, 3], [3, 3, 0, 1, 2, 5]),  # 0 closes the thought
        (True, (4,), [3] * 9, [3, 3, 3, 0, 1, 2, 5]),  # the budget of three closes it
        (False, (4,), [4, 3, 0, 3, 3], [4, 3, 0, 1, 2, 5]),
        (False, (4, 3), [4, 3, 2, 0, 4], [4, 3, 2, 0, 1, 2, 5]),
        (False, (4,), [3, 3, 3], [1, 2, 5]),
        (False, (4,), [1, 4, 4], [1, 2, 5]),
        (None, (4,), [4, 4, 4], [1, 2, 5]),  # a model without thoughts
    ],
)
def test_a_grammar_begins_behind_the_thought(
    starts_open: bool | None, open_ids: tuple[int, ...], wanted: list[int], expected: list[int]
) -> None:
    """A thought may come first, and is free; the grammar sees nothing of it."""
    budget = None
    if starts_open is not None:
        budget = ThinkingBudget((0,), open_ids, max_tokens=3, starts_open=starts_open)
    grammar = Letters()
    sampling = Sampling(20, (5,), budget=budget, schema={})
    sequence = GeneratedSequence(0, [0], sampling, 100, grammar)
    tokens = iter(wanted)
    while sequence.finish_reason is None:
        logits_V = np.zeros(6, np.float32)
        logits_V[next(tokens, 3)] = 9.0
        sequence.step(logits_V)

    assert sequence.ids == expected
    assert grammar.accepted == [1, 2]


def test_an_engine_without_grammars_refuses_a_schema() -> None:
    """It would ignore it."""
    with raises("engine-without-grammar"):
        GeneratedSequence(0, [0], Sampling(2, (5,), schema={}), 100)
