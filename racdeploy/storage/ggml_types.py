"""The number formats of ggml: type id, and weights and bytes of a quant block.

Source: ``type_traits`` in ggml.c; a test compares every row with the library that llama-cpp-python
ships.
"""

from __future__ import annotations

from typing import NamedTuple


class GgmlType(NamedTuple):
    """One number format.

    Args:
        number: its id in a GGUF file.
        block_weights: of a quant block; 1 where a weight stands alone.
        block_bytes: of a quant block, its scales included.
    """

    number: int
    block_weights: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, with scales."""
        return 8 * self.block_bytes / self.block_weights


GGML_TYPES = {
    "f32": GgmlType(0, 1, 4),
    "f16": GgmlType(1, 1, 2),
    "q4_0": GgmlType(2, 32, 18),
    "q4_1": GgmlType(3, 32, 20),
    "q5_0": GgmlType(6, 32, 22),
    "q5_1": GgmlType(7, 32, 24),
    "q8_0": GgmlType(8, 32, 34),
    "q8_1": GgmlType(9, 32, 36),
    "q2_k": GgmlType(10, 256, 84),
    "q3_k": GgmlType(11, 256, 110),
    "q4_k": GgmlType(12, 256, 144),
    "q5_k": GgmlType(13, 256, 176),
    "q6_k": GgmlType(14, 256, 210),
    "q8_k": GgmlType(15, 256, 292),
    "iq2_xxs": GgmlType(16, 256, 66),
    "iq2_xs": GgmlType(17, 256, 74),
    "iq3_xxs": GgmlType(18, 256, 98),
    "iq1_s": GgmlType(19, 256, 50),
    "iq4_nl": GgmlType(20, 32, 18),
    "iq3_s": GgmlType(21, 256, 110),
    "iq2_s": GgmlType(22, 256, 82),
    "iq4_xs": GgmlType(23, 256, 136),
    "i8": GgmlType(24, 1, 1),
    "i16": GgmlType(25, 1, 2),
    "i32": GgmlType(26, 1, 4),
    "i64": GgmlType(27, 1, 8),
    "f64": GgmlType(28, 1, 8),
    "iq1_m": GgmlType(29, 256, 56),
    "bf16": GgmlType(30, 1, 2),
    "tq1_0": GgmlType(34, 256, 54),
    "tq2_0": GgmlType(35, 256, 66),
    "mxfp4": GgmlType(39, 32, 17),
    "nvfp4": GgmlType(40, 64, 36),
    "q1_0": GgmlType(41, 128, 18),
    "q2_0": GgmlType(42, 64, 18),
}
"""By name, as quants are called."""
