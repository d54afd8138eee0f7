"""New token ids in the files of a model: tokenizer, configs, and the list of old ids.

The index of an old id in :data:`OLD_IDS_FILE` is its new id. Ids of removed tokens are removed
from the configs; texts, as in the chat template, do not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.files.reading import Json, read_json
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.models.tokenizer_schema import read_merges

OLD_IDS_FILE = "vocabulary_ids.json"
"""Holds under :data:`_KEY` the ids of the tokens in the uncut model, in the new order."""
STALE_FILES = frozenset({"tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"})
"""Tokenizer files that are not rewritten and not copied: they repeat tokenizer.json."""
_KEY = "old_ids"
_NAMING = ("_token_id", "_token_ids", "_token_index")
_ID_KEYS = (*_NAMING, "pad_id", "suppress_tokens", "bad_words_ids")
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
OldIds = NDArray[np.int64]
NewIds = Mapping[int, int]


def read_old_ids(folder: Path) -> OldIds:
    """Return the ids that a folder's tokens had before the vocabulary was cut, in the new order."""
    values = read_json(folder / OLD_IDS_FILE).get(_KEY)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ArtifactError(
            "damaged-vocabulary-ids",
            f"{folder / OLD_IDS_FILE} is damaged: {_KEY} is not a list of ids",
        )
    return np.array(values, np.int64)


def map_new_ids(old_ids: OldIds) -> NewIds:
    """Return a map from the old id of each kept token to its new id."""
    return {old: new for new, old in enumerate(old_ids.tolist())}


def translate_ids(ids: Iterable[int], new: NewIds) -> tuple[int, ...] | None:
    """Return the new ids of some old ones; None if one of the tokens was removed."""
    translated = [new.get(old) for old in ids]
    kept = [i for i in translated if i is not None]
    return tuple(kept) if len(kept) == len(translated) else None


def find_config_ids(files: TokenizerFiles) -> set[int]:
    """Return the ids that the configs name: end of sequence, padding and others."""
    return {i for config in _read_configs(files).values() for i in _find_ids(config)}


def renumber_files(files: TokenizerFiles, old_ids: OldIds) -> dict[str, str]:
    """Return the new texts of all files that name ids, by file name."""
    ids = map_new_ids(old_ids)
    written: Json = {"tokenizer.json": renumber_tokenizer(files.tokenizer_json, ids)}
    for name, config in _read_configs(files).items():
        written[name] = _renumber_ids(config, ids)
    written["config.json"]["vocab_size"] = len(old_ids)

    texts = {
        name: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        for name, value in written.items()
    }
    texts[OLD_IDS_FILE] = json.dumps({_KEY: old_ids.tolist()}) + "\n"
    return texts


def _read_configs(files: TokenizerFiles) -> dict[str, Json]:
    present = [name for name in _CONFIGS if (files.folder / name).is_file()]
    return {name: read_json(files.folder / name) for name in present}


def renumber_tokenizer(tokenizer: Json, ids: NewIds) -> Json:
    """Return a parsed tokenizer.json with only the tokens of ``ids``, under their new ids.

    A merge is kept, in its order, if its two parts and its result are kept.
    """
    model = dict(tokenizer["model"])
    kept = {text: ids[old] for text, old in model["vocab"].items() if old in ids}
    model["vocab"] = dict(sorted(kept.items(), key=itemgetter(1)))

    # The order of the merges is their rank, so kept ones stay in order and in their written form.
    model["merges"] = [
        merge
        for merge, pair in zip(model["merges"], read_merges(model), strict=True)
        if kept.keys() >= {*pair, "".join(pair)}
    ]

    added = tokenizer.get("added_tokens") or []
    renumbered = [{**token, "id": ids[token["id"]]} for token in added]

    changed = {
        "padding": _renumber_ids(tokenizer.get("padding"), ids),
        "added_tokens": sorted(renumbered, key=itemgetter("id")),
        "post_processor": _renumber_processor(tokenizer.get("post_processor"), ids),
        "model": model,
    }
    return {**tokenizer, **changed}


def _renumber_processor(step: Any, ids: NewIds) -> Any:
    """Renumber the tokens around a text: ``ids`` of a template, and pairs ``[text, id]``."""
    if isinstance(step, list):
        return [_renumber_processor(each, ids) for each in step]
    if not isinstance(step, dict):
        return step

    changed = {}
    for key, value in step.items():
        if key == "ids":
            changed[key] = [ids[old] for old in value]
        elif key in ("sep", "cls"):
            changed[key] = [value[0], ids[value[1]]]
        else:
            changed[key] = _renumber_processor(value, ids)

    return changed


def _renumber_ids(value: Any, ids: NewIds) -> Any:
    """Renumber the values of keys that end as in :data:`_ID_KEYS`, and ``added_tokens_decoder``."""
    if not isinstance(value, dict):
        return value

    changed: Json = {}
    for key, inside in value.items():
        if key == "added_tokens_decoder":
            kept = [old for old in inside if int(old) in ids]
            changed[key] = {str(ids[int(old)]): inside[old] for old in kept}
        else:
            renumber = _replace if key.endswith(_ID_KEYS) else _renumber_ids
            changed[key] = renumber(inside, ids)

    return changed


def _replace(value: Any, ids: NewIds) -> Any:
    """Return the new id, or list of ids; a list within a list is dropped if it lost a token."""
    if _is_id(value):
        return ids.get(value)
    if not isinstance(value, list):
        return value

    kept = []
    for each in value:
        new = _replace(each, ids)
        is_whole = not isinstance(each, list) or len(new) == len(each)
        if new is not None and is_whole:
            kept.append(new)

    return kept


def _find_ids(value: Any) -> Iterator[int]:
    if not isinstance(value, dict):
        return

    for key, inside in value.items():
        if key.endswith(_NAMING):
            listed = inside if isinstance(inside, list) else [inside]
            yield from filter(_is_id, listed)
        else:
            yield from _find_ids(inside)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0
