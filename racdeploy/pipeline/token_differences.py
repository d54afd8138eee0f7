"""Strings that llama.cpp would tokenize differently, counted before any work.

Only tokenizers without an equal pre-tokenizer in llama.cpp are checked here; every artifact is
compared again after its export.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from racdeploy import exporting, plugins
from racdeploy.errors import ModelError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import MAX_TOKEN_DIFFERENCES, Export
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.measurements import encode_probes, probe_tokens
from racdeploy.verification.token_comparison import TokenComparison


def check_tokens(checkpoint: Checkpoint, settings: Export) -> str:
    """Count the differing strings by the tokenizer alone, and refuse more than is accepted.

    Returns:
        A sentence on the differences; empty if the engine is known to tokenize alike.

    Raises:
        ModelError: more strings differ than the settings accept.
    """
    form = exporting.load(settings.format)
    if not form.TOKENIZER_PREFIX:
        return ""

    # A GGUF file without tensors is enough for llama.cpp's tokenizer.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        name = form.write_approximate_tokenizer(checkpoint, file, settings.pre_tokenizer)
        if not name:
            return ""

        encoder = PromptEncoder.from_folder(checkpoint.folder)
        with plugins.load("engines", form.BACKEND).open_vocabulary(file) as engine:
            expected = encode_probes(encoder, MAX_TOKEN_DIFFERENCES)
            probes = probe_tokens(engine.tokenize, expected)

    assert probes is not None, "a vocabulary was written for it"
    differences = TokenComparison.count(probes)
    accepted = settings.accept_token_differences
    if differences.share <= accepted:
        return f"llama.cpp's pre-tokenizer {name}: {differences}"

    raise ModelError(
        "no-equal-pre-tokenizer",
        f"llama.cpp has no equal of this tokenizer's pre-tokenizer; with the nearest, {name!r}, "
        f"{differences.share:.3%} of the strings differ"
        + (f", and {accepted:.3%} is accepted: " if accepted else ": ")
        + str(differences),
        remedy=_advise(differences),
    )


def _advise(differences: TokenComparison) -> str:
    needed = differences.share_to_accept
    if needed > MAX_TOKEN_DIFFERENCES:
        return (
            f"more than {MAX_TOKEN_DIFFERENCES:.0%} cannot be accepted: name another pre-tokenizer "
            "with export.pre_tokenizer, or export to ONNX, whose programs read tokenizer.json"
        )

    return (
        f"accept them by name: export.accept_token_differences = {needed:g}, or "
        f"--accept-token-differences {needed:g}; the report, the manifest and the card show the "
        "count. Or export to ONNX, whose programs read tokenizer.json"
    )
