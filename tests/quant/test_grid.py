"""Packed codes against the dequantizers of ggml and onnxruntime's documentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.quant import ggml
from tests.support.codes import draw_codes, read_as_file, store_codes

GRIDS = [n for n in plugins.list_names("quant") if quants.has_grid(n)]
GGUF = [name for name in GRIDS if "gguf" in quants.load(name).formats]
I = 512


def test_every_format_of_few_bits_has_a_grid() -> None:
    """Those that store floats need none."""
    assert set(plugins.list_names("quant")) - set(GRIDS) == {"f32", "f16", "bf16"}


@pytest.mark.parametrize("name", GRIDS)
def test_packed_codes_are_the_weights_that_they_stand_for(name: str) -> None:
    """Bit for bit, over all codes, step codes and minima, and with a scale of zero."""
    grid, codes = quants.load_grid(name), draw_codes(name, 9, I)
    codes.scale_OX[3] = 0 if grid.scale == "half" else codes.scale_OX[3]
    assert np.array_equal(read_as_file(name, codes), grid.decode(codes))

    spoiled_OI = codes.code_OI.copy()
    spoiled_OI[0, 0] = spoiled_OI[0, 0] ^ 1
    assert not np.array_equal(
        read_as_file(name, replace(codes, code_OI=spoiled_OI)), grid.decode(codes)
    )


@pytest.mark.parametrize("name", GGUF)
def test_ggml_and_gguf_py_read_the_same(name: str) -> None:
    """Our own dequantizer is one of the two for each format."""
    codes = draw_codes(name, 5, I, seed=1)
    packed_OP = quants.load_grid(name).pack(codes)
    number = quants.load_ggml(name).type_id
    by_c_OI = ggml.dequantize(number, packed_OP, I)
    assert np.array_equal(by_c_OI, gguf_quants.dequantize(packed_OP, GGMLQuantizationType(number)))
    assert np.array_equal(by_c_OI, quants.load_grid(name).decode(codes))


@pytest.mark.parametrize("name", GRIDS)
def test_stored_codes_are_read_as_they_were(tmp_path: Path, name: str) -> None:
    """Scales too: those that half precision has, and powers of two that it has not."""
    codes = draw_codes(name, 9, I)
    (stored,) = store_codes(tmp_path, "w", name, codes).values()
    for field, value in vars(stored.read_codes()).items():
        np.testing.assert_array_equal(value, getattr(codes, field))
    assert np.array_equal(stored.read(), quants.load_grid(name).decode(codes))
    assert np.array_equal(stored.read_packed(), quants.load_grid(name).pack(codes))
