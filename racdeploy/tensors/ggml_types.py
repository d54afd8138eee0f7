"""Number formats of ggml: type id, and weights and bytes of a quant block.

Source: ``type_traits`` in ggml.c, which a test compares with ``ggml_types.toml``.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import NamedTuple


class GgmlType(NamedTuple):
    """A number format of ggml: its quant, id in a GGUF file, weights and bytes of a quant block."""

    name: str
    type_id: int
    block_weights: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, with scales."""
        return 8 * self.block_bytes / self.block_weights


_TABLE = files("racdeploy.tensors") / "ggml_types.toml"
_ROWS = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
GGML_TYPES = {name: GgmlType(name, *row) for name, row in _ROWS.items()}
"""Number formats by the name of their quant."""
TYPES_BY_ID = {known.type_id: known for known in GGML_TYPES.values()}
"""The same by type id."""
