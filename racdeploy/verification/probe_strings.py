"""Strings on which tokenizers disagree, in NFC because llama.cpp has no Unicode normalizer."""

from __future__ import annotations

import json
from importlib.resources import files

from racdeploy.verification.mixed_text import make_mixed_lines

_MIXED_LINES = 10_000


def read_probe_strings() -> list[str]:
    """Read a few hundred different strings that are hard to tokenize."""
    file = files("racdeploy.verification") / "probe_strings.json"
    strings: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return strings


def choose_probe_strings(accepted: float) -> list[str]:
    """Return the strings on which token ids are compared.

    Args:
        accepted: share of the strings that may differ. If it is above 0, 10,000 lines of mixed text
            are added: of a few hundred strings, one alone would exceed the usual share.
    """
    lines = make_mixed_lines(_MIXED_LINES) if accepted else ()
    return [*read_probe_strings(), *lines]
