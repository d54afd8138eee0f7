"""The text model inside one that also sees or hears: its settings, and its tensors by usual names.

Such a folder says under ``text_config`` what the language model is. Towers for pictures and sound
are left out, and that is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from racdeploy import plugins

KEY = "text_config"
_SHARED = (
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("dtype", "torch_dtype", "quantization_config"),
)
# How names of the language model begin, and as what: as transformers 5 and 4 write them.
_BEGINNINGS = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
Entry = TypeVar("Entry")


def is_inside(config: Mapping[str, Any]) -> bool:
    """Return whether the model that we know is a part of the one that a config describes."""
    inner = config.get(KEY)
    known = plugins.names("families")
    return isinstance(inner, dict) and (
        config.get("model_type") not in known and inner.get("model_type") in known
    )


def take_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model as a ``config.json`` of its own."""
    inner: dict[str, Any] = config[KEY]
    shared = {key: config[key] for key in _SHARED if config.get(key) is not None}
    family = plugins.load("families", inner["model_type"]).FAMILY
    return shared | inner | {"architectures": [family.architecture]}


def take_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors of the language model, by the names that they have alone."""
    found = {}
    for name, entry in entries.items():
        for begins, usual in _BEGINNINGS.items():
            if name.startswith(begins):
                found[usual + name.removeprefix(begins)] = entry

    return found
