"""Strings on which tokenizers disagree, in NFC, as llama.cpp has no Unicode normalizer."""

from __future__ import annotations

import json
from importlib.resources import files

from racdeploy.verify.mixed_text import mixed_lines

_LINES = 10_000


def probe_strings() -> list[str]:
    """Return a few hundred different hard strings, always the same ones."""
    file = files("racdeploy.verify") / "probe_strings.json"
    strings: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return strings


def gate_strings(accepted: float) -> list[str]:
    """Return what tokens are compared on: the hard strings, all of which have to be equal.

    Where a share of them may differ, 10,000 lines of mixed text follow: of a few hundred strings,
    one is more than the share that people accept.
    """
    lines = mixed_lines(_LINES) if accepted else ()
    return [*probe_strings(), *lines]
