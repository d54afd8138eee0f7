"""Change JSON as JSON, most of the time: changed as bytes, it seldom is a value any more."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.harness import Mutate, Mutator

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *(0.0, -0.0, 0.5, 1e-310, 1e300, float("inf"), float("nan")),
    *("", "a", "..", "/etc/passwd", "a\0b", "\n", "\u202e", "\ud800", "☃", "a" * 300, "0" * 64),
    *([], {}, [[]], [0], ["a"], {"a": 1}, [1, 2], [[1, 2]], {"type": "a"}, {"content": "a"}),
)
_MAX_STEPS = 3


def of_json(words: tuple[Any, ...] = ()) -> Callable[[Mutate], Mutator]:
    """Return the mutator of texts that are JSON; ``words`` are values that its readers know."""

    def mutator(mutate: Mutate) -> Mutator:
        def change(data: bytes, most: int, seed: int) -> bytes:
            random = Random(seed)
            changed = change_json(data, random, words) if random.random() < 0.6 else None
            return changed if changed and len(changed) <= most else mutate(data, most)

        return change

    return mutator


def change_json(data: bytes, random: Random, words: tuple[Any, ...] = ()) -> bytes | None:
    """Return a JSON text with some values changed, moved or left out; None where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None

    root = [value]
    for _ in range(random.randint(1, _MAX_STEPS)):
        _change(root, random, words)

    try:
        return json.dumps(root[0], ensure_ascii=random.random() < 0.5).encode("utf-8", "replace")
    except (ValueError, RecursionError):
        return None


def _change(root: list[Any], random: Random, words: tuple[Any, ...]) -> None:
    places = list(_list_places(root))
    holder, key = random.choice(places)
    other, other_key = random.choice(places)

    match random.randrange(7):
        case 0 | 1:
            holder[key] = copy.deepcopy(random.choice(_ODD))
        case 2:
            holder[key] = copy.deepcopy(random.choice(words)) if words else [holder[key]]
        case 3:
            holder[key] = copy.deepcopy(other[other_key])
        case 4 if holder is not root:
            del holder[key]
        case 5 if isinstance(holder, dict):
            holder[str(random.choice((*words, *_ODD)))] = copy.deepcopy(other[other_key])
        case 5 if holder is not root:
            holder.insert(key, copy.deepcopy(other[other_key]))
        case _:
            holder[key] = _change_single(holder[key], random)


def _list_places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Return every holder of a value with the key or index that leads to it."""
    places = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return places


def _change_single(value: Any, random: Random) -> Any:
    match value:
        case bool():
            return not value
        case int():
            near = (value + 1, value - 1, -value, value * 2)
            return random.choice((*near, value % (1 << 64) << 32, float(value % (1 << 53))))
        case float():
            return random.choice((-value, value * 10, value + 1e-9, str(value)))
        case str():
            place = random.randint(0, len(value))
            put = random.choice(("", "a", "\0", "é", "{{", "}", "/"))
            return value[:place] + put + value[place + 1 :]
        case list():
            return value * 2 if len(value) < 50 else value[:1]
        case _:
            return [value]
