"""Strings that llama.cpp would tokenize differently: counted before any work, refused or accepted.

Only tokenizers for which no equal pre-tokenizer is known are looked at here; every artifact is
compared again when it is exported.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from racdeploy import export as exports
from racdeploy import plugins
from racdeploy.errors import ModelError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import MOST_DIFFERENCES, Export
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verify.differences import TokenDifferences
from racdeploy.verify.measure import probe_tokens
from racdeploy.verify.probe_strings import gate_strings


def check_tokens(checkpoint: Checkpoint, settings: Export) -> str:
    """Count them on the tokenizer alone, and refuse more than the settings accept.

    Returns:
        What was found, one sentence; empty where the engine is known to tokenize alike.
    """
    form = exports.load(settings.format)
    if not form.TOKENIZER_PREFIX:
        return ""

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        name = form.write_approximated(checkpoint, file, settings.pre_tokenizer)
        if not name:
            return ""

        encoder = PromptEncoder.from_folder(checkpoint.folder)
        with plugins.load("engines", form.BACKEND).open_vocabulary(file) as engine:
            probes = probe_tokens(engine, encoder, gate_strings(MOST_DIFFERENCES))

    assert probes is not None, "a vocabulary was written for it"
    found = TokenDifferences.count(probes)
    accepted = settings.accept_token_differences
    if found.share <= accepted:
        return f"llama.cpp's pre-tokenizer {name}: {found}"

    raise ModelError(
        "no-equal-pre-tokenizer",
        f"llama.cpp has no equal of this tokenizer's pre-tokenizer; of those it has, {name!r} "
        f"leaves {found.share:.3%} of the strings different"
        + (f", and {accepted:.3%} is accepted: " if accepted else ": ")
        + str(found),
        remedy=_advise(found),
    )


def _advise(found: TokenDifferences) -> str:
    needed = found.share_to_accept
    if needed > MOST_DIFFERENCES:
        return (
            f"more than {MOST_DIFFERENCES:.0%} cannot be accepted: name another pre-tokenizer "
            "with export.pre_tokenizer, or export to ONNX, whose programs read tokenizer.json"
        )

    return (
        f"accept them by name: export.accept_token_differences = {needed:g}, or "
        f"--accept-token-differences {needed:g}; the report, the manifest and the card show the "
        "count. Or export to ONNX, whose programs read tokenizer.json"
    )
