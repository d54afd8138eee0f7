"""The text model of a multimodal one: its config, and its tensors under the usual names.

The config has the language model under ``text_config``. Vision and audio towers are left out, which
the notes of the checkpoint report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from racdeploy import plugins
from racdeploy.models.config_schema import Config

KEY = "text_config"
_SHARED = (
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "dtype", "torch_dtype", "quantization_config",
)  # fmt: skip
# Prefixes of the language model in a multimodal one, by transformers 5 and 4 → prefixes alone.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
Entry = TypeVar("Entry")


def is_multimodal(config: Config) -> bool:
    """Return True if a config describes a multimodal model whose text model is supported."""
    inner = config.get(KEY)
    known = plugins.list_names("families")
    return isinstance(inner, dict) and (
        config.get("model_type") not in known and inner.get("model_type") in known
    )


def extract_text_config(config: Config) -> dict[str, Any]:
    """Return the config of the language model as a ``config.json`` of its own."""
    inner: dict[str, Any] = config[KEY]
    shared = {key: config[key] for key in _SHARED if config.get(key) is not None}
    family = plugins.load("families", inner["model_type"]).FAMILY
    return shared | inner | {"architectures": [family.architecture]}


def extract_text_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors of the language model, under the names of a text-only model."""
    text_entries = {}
    for name, entry in entries.items():
        for prefix, usual in _PREFIXES.items():
            if name.startswith(prefix):
                text_entries[usual + name.removeprefix(prefix)] = entry

    return text_entries
