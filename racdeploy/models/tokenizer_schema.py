"""The schema of ``tokenizer.json``: types of all parts that racdeploy itself reads.

The tokenizers library reads the same file by its own rules, in another process, and accepts more
than is read here. Readers decide on parts that are missing or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from racdeploy.errors import ArtifactError
from racdeploy.files.reading import Json

_MAX_ID = 1 << 24
FindFault = Callable[[Any], str]


def check_tokenizer(tokenizer: Json, where: str) -> None:
    """Raise ArtifactError for the first part of another type than its readers expect."""
    model = tokenizer.get("model")
    parts = {"model": model, "added_tokens": tokenizer.get("added_tokens")}
    if isinstance(model, dict):
        keys = ["type", "unk_token"]
        if model.get("type", "BPE") == "BPE":
            keys += ["vocab", "merges"]
        parts |= {f"model.{key}": model.get(key) for key in keys}

    for name, value in parts.items():
        fault = "" if value is None else _FAULTS[name](value)
        if fault:
            raise ArtifactError(
                "damaged-tokenizer",
                f"{where} is damaged: {name} {fault}",
                remedy="copy the file again from its source",
            )


def read_merges(model: Json) -> Iterator[tuple[str, str]]:
    """Yield the merges of a checked tokenizer, best first; older files write each as one string."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def flatten_sequence(step: object, key: str) -> list[Json]:
    """Return the steps of nested ``Sequence`` steps, whose parts are under ``key``."""
    if not isinstance(step, dict):
        return []

    if step.get("type") != "Sequence":
        return [step]

    parts = step.get(key)
    nested = parts if isinstance(parts, list) else []
    return [leaf for part in nested for leaf in flatten_sequence(part, key)]


def _text(value: object) -> str:
    return "" if isinstance(value, str) else "is not a string"


def _vocabulary(value: object) -> str:
    if not isinstance(value, dict):
        return "is not an object"

    for text, number in value.items():
        if not _is_id(number):
            return f"says that {text[:80]!r} has id {str(number)[:80]!r}"
    return ""


def _merges(value: object) -> str:
    if not isinstance(value, list):
        return "is not a list"

    for merge in value:
        parts = merge.split(" ") if isinstance(merge, str) else merge  # one string in older files
        is_pair = isinstance(parts, list) and len(parts) == 2
        if not is_pair or not all(isinstance(part, str) for part in parts):
            return f"has {str(merge)[:80]!r}, which is not a merge"
    return ""


def _added(value: object) -> str:
    if not isinstance(value, list):
        return "is not a list"

    for token in value:
        is_one = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_one or not _is_id(token.get("id")):
            return f"has an entry without id or content: {str(token)[:80]!r}"
    return ""


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_ID


_FAULTS: Mapping[str, FindFault] = {
    "model": lambda value: "" if isinstance(value, dict) else "is not an object",
    "added_tokens": _added,
    **dict.fromkeys(("model.type", "model.unk_token"), _text),
    "model.vocab": _vocabulary,
    "model.merges": _merges,
}
