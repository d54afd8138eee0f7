"""The .racgguf container: pack a GGUF file without its zeros, and unpack it.

Format: docs/reference/racgguf.md. Needs only numpy, so that any device can unpack. One chunk of a
tensor is in memory at a time.
"""

from racdeploy.packing.racgguf.container import (
    READ_BYTES,
    SUFFIX,
    ByteReader,
    Container,
    StoredTensor,
    unpack_to_cache,
)
from racdeploy.packing.racgguf.writer import PackedTensor, TensorPacker, iter_tensor_bytes, pack

__all__ = [
    "READ_BYTES",
    "SUFFIX",
    "ByteReader",
    "Container",
    "PackedTensor",
    "StoredTensor",
    "TensorPacker",
    "iter_tensor_bytes",
    "pack",
    "unpack_to_cache",
]
