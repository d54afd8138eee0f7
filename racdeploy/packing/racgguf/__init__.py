"""The .racgguf container: a GGUF file without its zeros, and back, byte for byte. The form: docs/racgguf.md.

Needs numpy alone, so that a device unpacks what it runs. Memory stays at one chunk of a tensor.
"""

from racdeploy.packing.racgguf.cache import unpacked
from racdeploy.packing.racgguf.container import SUFFIX, Container, StoredTensor
from racdeploy.packing.racgguf.writer import PackedTensor, pack

__all__ = ["SUFFIX", "Container", "PackedTensor", "StoredTensor", "pack", "unpacked"]
