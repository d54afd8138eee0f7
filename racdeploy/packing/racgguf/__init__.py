"""The .racgguf container: a GGUF file without its zeros, and back. The form: docs/racgguf.md.

Needs numpy alone, so that a device unpacks what it runs. Memory stays at one chunk of a tensor.
"""

from racdeploy.packing.racgguf.container import (
    READ_BYTES,
    SUFFIX,
    Container,
    Source,
    StoredTensor,
    unpacked,
)
from racdeploy.packing.racgguf.writer import PackedTensor, TensorPacker, pack, read_pieces

__all__ = [
    "READ_BYTES",
    "SUFFIX",
    "Container",
    "PackedTensor",
    "Source",
    "StoredTensor",
    "TensorPacker",
    "pack",
    "read_pieces",
    "unpacked",
]
