"""Strings on which tokenizers disagree: the probe of token parity.

All are in NFC, because llama.cpp has no Unicode normalizer: a tokenizer with one would differ on
the rest for that reason alone. The last 200 are random sequences of pieces of the others.
"""

from __future__ import annotations

import json
from importlib.resources import files


def probe_strings() -> list[str]:
    """Return a few hundred different hard strings, always the same ones."""
    file = files("racdeploy.verify") / "probe_strings.json"
    strings: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return strings
