"""What ``tokenizer.json`` may say: the kind of all that is read of it here, whoever wrote it.

The tokenizers library reads the same file by rules of its own, in another process: what it takes
may still not be what is read here. A part that is missing or None is for its reader to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from racdeploy.errors import ArtifactError

_MOST_ID = 1 << 24
Fault = Callable[[Any], str]


def check(tokenizer: Mapping[str, Any], where: str) -> None:
    """Raise ArtifactError for the first part of another kind than its readers expect."""
    model = tokenizer.get("model")
    parts = {"model": model, "added_tokens": tokenizer.get("added_tokens")}
    if isinstance(model, dict):
        parts |= {f"model.{key}": model.get(key) for key in ("type", "unk_token")}
        if model.get("type", "BPE") == "BPE":
            parts |= {f"model.{key}": model.get(key) for key in ("vocab", "merges")}

    for name, value in parts.items():
        fault = "" if value is None else _FAULTS[name](value)
        if fault:
            raise ArtifactError(
                f"{where} is damaged: {name} {fault}", remedy="copy the file again from its source"
            )


def _table(value: object) -> str:
    return "" if isinstance(value, dict) else "is no table"


def _text(value: object) -> str:
    return "" if isinstance(value, str) else "is no text"


def _vocabulary(value: object) -> str:
    if not isinstance(value, dict):
        return "is no table"

    for text, number in value.items():
        if not _is_id(number):
            return f"says that {text[:80]!r} has id {str(number)[:80]!r}"
    return ""


def _merges(value: object) -> str:
    if not isinstance(value, list):
        return "is no list"

    for merge in value:
        if not _is_merge(merge):
            return f"has {str(merge)[:80]!r}, which is not a merge"
    return ""


def _added(value: object) -> str:
    if not isinstance(value, list):
        return "is no list"

    for token in value:
        is_one = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_one or not _is_id(token.get("id")):
            return f"has an entry without id or content: {str(token)[:80]!r}"
    return ""


def _is_merge(merge: object) -> bool:
    if isinstance(merge, str):  # of older files
        return merge.count(" ") == 1
    return (
        isinstance(merge, list) and len(merge) == 2 and all(isinstance(each, str) for each in merge)
    )


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_ID


_FAULTS: Mapping[str, Fault] = {
    "model": _table,
    "added_tokens": _added,
    "model.type": _text,
    "model.unk_token": _text,
    "model.vocab": _vocabulary,
    "model.merges": _merges,
}
