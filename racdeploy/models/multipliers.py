"""Multipliers that a model applies to activations, and a GGUF file has in its weights.

Source: llama.cpp ``conversion/falcon_h1.py``.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from racdeploy.models.shape import ModelShape


def list_row_factors(shape: ModelShape, name: str) -> list[NDArray[np.float32]]:
    """Return the factors of the rows of a tensor in a GGUF file, applied one after the other.

    Each is one number for all rows, (1, 1), or one for each, (O, 1).
    """
    stored = re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")
    factors = []
    for setting in shape.family.scaling.rows.get(stored, ()):
        value_X = np.atleast_1d(np.float32(shape.setting(setting)))
        if len(value_X) > 1:  # one for each of the matrices in a tensor
            letters = shape.family.axes[stored][0].split("+")
            value_X = np.repeat(value_X, [shape.sizes[0][letter] for letter in letters])
        factors.append(value_X[:, None])
    return factors
