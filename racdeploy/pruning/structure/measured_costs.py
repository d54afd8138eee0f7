"""What a cut costs a published model on text, measured, as a warning before one is made.

A model that was taught one kind of problem has room to spare, and a published one has not. The
plugins of structures have the figures: nats of KL from the dense SmolLM2-135M-Instruct on text,
without recovery, in 8 bits. Source: ``benchmarks/cut_costs.py``; benchmarks/RESULTS.md has the
table.
"""

from __future__ import annotations

from collections.abc import Iterator

from racdeploy import plugins
from racdeploy.recipe import Structure

MODEL = "SmolLM2-135M-Instruct"
DOWNLOAD_TEXT_KL = 0.11
"""The same of the file that people would download instead, llama.cpp's Q4_K_M: 105 MB."""


def note_text_costs(structure: Structure, *, is_recovered: bool) -> Iterator[str]:
    """Yield a sentence for each cut that is known to cost more than a smaller number format.

    Args:
        is_recovered: whether the model is trained after the cut.
    """
    for part in structure.cut_parts:
        measured: dict[float, float] = plugins.read_constants("structures", part).get("TEXT_KL", {})
        kept = structure.kept_share(part)
        milder = [share for share in measured if share >= kept]
        if not milder:
            continue

        share = min(milder)
        if measured[share] <= DOWNLOAD_TEXT_KL:
            continue
        afterwards = " before recovery" if is_recovered else ", and nothing recovers it here"
        yield (
            f"{part}={share:g} moved {MODEL} {measured[share]:.2g} nats from dense on text"
            f"{afterwards}; llama.cpp's Q4_K_M is {DOWNLOAD_TEXT_KL:g} away: expect as much of a "
            "model that was not taught one kind of problem"
        )
