"""What engines do with any model, on any device: facts of their code, which no profile measures.

Source: llama.cpp 0.3.36 in python; onnxruntime 1.32, its operator GroupQueryAttention, constant
folding and prepacking, as racdeploy's engine runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy import quant as quants
from racdeploy.decoding.engine import BATCH_LOGITS_BYTES
from racdeploy.quant.matmulnbits import BLOCK

_SCALE_BITS = 16  # what a float32 scale has more than one in half precision
_FLOAT_BITS = 32.0


@dataclass(frozen=True)
class Traits:
    """What is the same for an engine wherever it runs.

    Args:
        cells: positions by which the part of the cache that is computed with grows.
        cache_bytes: of a number in the key-value cache.
        takes_context: whether the cache of the whole context is memory from the start.
        activations: as wide as the feed-forward part, alive at once.
        scores: of a head and position, alive at once.
        logits_bytes: most of the logits of a prompt's batch, 0 where only the last are computed.
    """

    cells: int
    cache_bytes: int
    takes_context: bool
    activations: int
    scores: int
    logits_bytes: int = 0


LLAMACPP, ONNXRUNTIME = "llamacpp", "onnxruntime"
TRAITS = {
    LLAMACPP: Traits(cells=256, cache_bytes=2, takes_context=True, activations=3, scores=2),
    ONNXRUNTIME: Traits(
        cells=1,
        cache_bytes=4,
        takes_context=False,
        activations=5,
        scores=1,
        logits_bytes=BATCH_LOGITS_BYTES,
    ),
}


def file_bits(engine: str, quant: str) -> float:
    """Return the bits that a weight takes in an engine's file; ONNX has scales in float32."""
    form = quants.load(quant)
    if engine == ONNXRUNTIME and quants.is_blocks(quant):
        return form.BITS + _SCALE_BITS / BLOCK
    return form.BITS


def read_bits(engine: str, quant: str) -> float:
    """Return the bits of a weight that an engine reads for a token.

    onnxruntime widens half precision once, when it loads a file.
    """
    if engine == ONNXRUNTIME and not quants.is_blocks(quant):
        return _FLOAT_BITS
    return file_bits(engine, quant)


@dataclass(frozen=True)
class Copies:
    """Bytes that lie beside the weights an engine computes with; ``passing`` while it loads."""

    kept: float = 0.0
    passing: float = 0.0


def copy_linear(quant: str, size_bytes: float) -> Copies:
    """Return the copies that onnxruntime makes of a linear: of halves, before they are widened."""
    return Copies(passing=size_bytes if quant == "f16" else 0.0)


def copy_table(quant: str, weights: float) -> Copies:
    """Return the copies of an embedding that is the output projection, too.

    The lookup keeps the table. The projection takes it in another shape: as blocks, or transposed,
    and then packed; all of these are alive at once.
    """
    if quants.is_blocks(quant):
        return Copies(kept=weights, passing=weights)
    wide = _FLOAT_BITS / 8 * weights
    if quant == "f16":
        return Copies(kept=wide / 2, passing=2 * wide)
    return Copies(kept=wide, passing=wide)
