"""Layouts of blocks agree with the number formats: weights of zero get the code 0."""

from __future__ import annotations

import numpy as np
import pytest

from racdeploy import quant as quants
from racdeploy.packing.block_layouts import BLOCK_LAYOUTS, BlockLayout


@pytest.mark.parametrize("layout", BLOCK_LAYOUTS.values(), ids=lambda layout: layout.name)
def test_the_code_of_zero_is_that_of_the_number_format(layout: BlockLayout) -> None:
    """Of a row that is half zeros, those and no others have the code 0, and the bytes come back."""
    weight_OI = np.ones((3, 64), dtype=np.float32)
    weight_OI[:, ::2] = 0
    packed_OP = quants.load(layout.name).quantize(weight_OI)
    body_GP = packed_OP.reshape(-1, layout.block_bytes)[:, layout.head_bytes :]

    codes = layout.split(body_GP)
    assert layout.join(codes).tobytes() == body_GP.tobytes()

    if layout.uses_words:  # two codes a byte
        codes = np.stack([codes & 15, codes >> 4], axis=1)
    assert np.count_nonzero(codes) == np.count_nonzero(weight_OI)
