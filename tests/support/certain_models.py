"""Tiny checkpoints whose likeliest tokens are certain, on every processor and after every cut.

A random model's next token hangs on the last bits of sums, and so do its thinking, its verdict and
the exit code of its build. Here each token of :data:`SAID` makes the next one far likelier than all
others: its embedding is twenty times what the random blocks add to it, and the output row of the
token after it points the same way. Where one matrix is both, a token repeats itself instead.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.support.tiny_models import make_checkpoint

SAID = "\nAnn has 7 apples</think>The answer is right.<|im_end|>"
"""What it says, after the line break that ends the prompt."""
_ANSWER_LOGIT = 13.0
"""Of the next token; those of all others are about 0, with a deviation of 0.4."""


def make_certain_checkpoint(folder: Path, family: str, **options: Any) -> Path:
    """Write a model that answers every prompt with :data:`SAID`, or repeats its last token if tied.

    Args:
        folder: created, or emptied.
        family: as :func:`tests.support.tiny_models.make_checkpoint` takes it.
        options: the same, but that the output projection has a matrix of its own by default.
    """
    make_checkpoint(folder, family, **{"tied": False} | options)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (embedding,) = (
        name for name in tensors if name.endswith(("embed_tokens.weight", "embeddings.weight"))
    )
    embedding_VD = tensors[embedding].float()
    embedding_VD /= embedding_VD.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)  # of padding
    tensors[embedding] = embedding_VD.to(tensors[embedding].dtype)

    if "lm_head.weight" in tensors:
        said = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SAID).ids
        assert len(set(said)) == len(said), "a token decides which one is next"
        head_VD = tensors["lm_head.weight"]
        for token, following in itertools.pairwise(said):
            direction_D = embedding_VD[token] * (_ANSWER_LOGIT / embedding_VD.shape[1])
            head_VD[following] = direction_D.to(head_VD.dtype)

    save_file(tensors, file, metadata={"format": "pt"})
    return folder
