"""Strings on which tokenizers disagree, in NFC, as llama.cpp has no Unicode normalizer."""

from __future__ import annotations

import json
from importlib.resources import files


def probe_strings() -> list[str]:
    """Return a few hundred different hard strings, always the same ones."""
    file = files("racdeploy.verify") / "probe_strings.json"
    strings: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return strings
