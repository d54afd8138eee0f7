"""What every packing promises, and which pairs of packing and number format are refused.

``bitmask_op`` is in racdeploy-kernels, and so are its tests: kernels/tests/test_accel_graph.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from racdeploy import packing as packings
from racdeploy import plugins
from racdeploy import quant as quants
from tests.support.errors import raises
from tests.support.packed_files import draw_rows, store_in_gguf, store_in_onnx

PACKINGS = [name for name in plugins.list_names("packing") if name != "bitmask_op"]
QUANTS = plugins.list_names("quant")
FORMATS = plugins.list_names("formats")


def shared_formats(packing_name: str, quant_name: str) -> tuple[str, ...]:
    """Return the file formats that store both."""
    stored = packings.load(packing_name).FORMATS
    return tuple(name for name in quants.load(quant_name).formats if name in stored)


def list_formats(kind: str, name: str) -> tuple[str, ...]:
    """Return the file formats that store a quant or a packing."""
    return quants.load(name).formats if kind == "quant" else packings.load(name).FORMATS


@pytest.fixture
def sparse_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the name ``sparse`` stand for a packing that leaves zeros out."""
    module, load = ModuleType("sparse"), plugins.load
    module.FORMATS = ("gguf", "onnx")  # type: ignore[attr-defined]
    module.REQUIRES_ZEROS = True  # type: ignore[attr-defined]
    module.reason_for_plain = lambda quant, zeros_fraction: ""  # type: ignore[attr-defined]
    monkeypatch.setattr(
        plugins,
        "load",
        lambda kind, name: module if (kind, name) == ("packing", "sparse") else load(kind, name),
    )


def refuse_pair(packing_name: str, quant_name: str, zeros: float) -> bool:
    """Return whether a tensor of the quant with that share of zeros is not packed."""
    packing, quant = packings.load(packing_name), quants.load(quant_name)
    if packing.REQUIRES_ZEROS and not quant.preserves_zero:
        return True
    return bool(packing.reason_for_plain(quant_name, zeros))


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("quant_name", QUANTS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_what_is_stored_is_read_back(
    packing_name: str, quant_name: str, sparsity: float, tmp_path: Path
) -> None:
    """Every byte returns through the calls of exporter and reader, and the file names the packing
    wherever it fits.
    """
    shared = shared_formats(packing_name, quant_name)
    if not shared:
        return  # refused with a reason: the tests below
    packed_OP, zeros = draw_rows(quant_name, 8, sparsity)
    label = "plain" if refuse_pair(packing_name, quant_name, zeros) else packing_name

    if "gguf" in shared:
        found, _, plain, restored = store_in_gguf(tmp_path, packing_name, quant_name, packed_OP)
        assert (found, restored) == (label, plain)
    if "onnx" in shared:
        found, _, rows_OP = store_in_onnx(tmp_path, packing_name, quant_name, packed_OP, zeros)
        assert found == label
        np.testing.assert_array_equal(rows_OP, packed_OP)


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("quant_name", QUANTS)
def test_a_quant_is_refused_before_any_work_or_packs_zeros(
    packing_name: str, quant_name: str
) -> None:
    """What is not refused fits where half is zero.

    One that leaves zeros out never fits a dense tensor.
    """
    packing = packings.load(packing_name)
    formats = shared_formats(packing_name, quant_name)
    if formats and refuse_pair(packing_name, quant_name, 1.0):
        with raises("packing-unfit-for-quant", packing_name, quant_name, "'plain'"):
            packings.check(formats[0], quant_name, packing_name)
        return
    for name in formats:
        packings.check(name, quant_name, packing_name)
    if not formats:
        return
    assert packing.reason_for_plain(quant_name, 0.5) == ""
    assert bool(packing.reason_for_plain(quant_name, 0.0)) == packing.REQUIRES_ZEROS


@pytest.mark.parametrize(
    "packing_name", [name for name in PACKINGS if packings.load(name).REQUIRES_ZEROS]
)
@pytest.mark.parametrize("quant_name", QUANTS)
def test_leaving_zeros_out_makes_smaller(
    packing_name: str, quant_name: str, tmp_path: Path
) -> None:
    """Half the weights zero is less than 0.85 of the bytes in every number format that fits."""
    shared = shared_formats(packing_name, quant_name)
    if not shared or refuse_pair(packing_name, quant_name, 0.5):
        return
    packed_OP, zeros = draw_rows(quant_name, 64, 0.5)
    if "gguf" in shared:
        _, size_bytes, *_ = store_in_gguf(tmp_path, packing_name, quant_name, packed_OP)
    else:
        _, size_bytes, _ = store_in_onnx(tmp_path, packing_name, quant_name, packed_OP, zeros)
    assert size_bytes < 0.85 * packed_OP.size


@pytest.mark.parametrize("quant_name", QUANTS)
def test_plain_goes_with_every_quant(quant_name: str) -> None:
    """Nothing is left out, so nothing can be lost."""
    for name in quants.load(quant_name).formats:
        packings.check(name, quant_name, "plain")


@pytest.mark.usefixtures("sparse_packing")
@pytest.mark.parametrize("quant_name", QUANTS)
def test_leaving_zeros_out_needs_a_quant_that_keeps_them(quant_name: str) -> None:
    """A sparse packing is refused, with alternatives, for exactly the quants that lose zeros."""
    name = quants.load(quant_name).formats[0]
    if quants.load(quant_name).preserves_zero:
        packings.check(name, quant_name, "sparse")
        return
    with raises("packing-unfit-for-quant", "sparse", quant_name) as caught:
        packings.check(name, quant_name, "sparse")
    others = caught.value.remedy.rpartition("quants ")[2].split(", ")
    assert {"gguf": "q8_0", "onnx": "f16"}[name] in others
    assert quant_name not in others


@pytest.mark.parametrize("kind", ["quant", "packing"])
def test_what_a_format_does_not_store_is_refused(kind: str) -> None:
    """The message names the format and what it stores, which it then takes."""
    for name in plugins.list_names(kind):
        stored_by = list_formats(kind, name)
        assert stored_by
        assert set(stored_by) <= {*FORMATS, "onnx"}
        for format_name in set(FORMATS) - set(stored_by):
            pair = (name, "plain") if kind == "quant" else ("f16", name)
            with raises("not-stored-by-format", f"'{format_name}'", f"{kind} '{name}'") as caught:
                packings.check(format_name, *pair)
            offered = caught.value.remedy.removeprefix("it stores ").split(", ")
            assert all(format_name in list_formats(kind, other) for other in offered)


def test_unknown_names_are_refused() -> None:
    """A typing error names the nearest packing or quant."""
    with raises("unknown-plugin", "'plain'"):
        packings.check("gguf", "q8_0", "plan")
    with raises("unknown-plugin", "mean 'q8_0'"):
        packings.check("gguf", "q8", "plain")
