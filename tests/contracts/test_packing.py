"""What every packing promises, and which pairs of packing and number format are refused."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from racdeploy import packing as packings
from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.errors import UnknownPluginError, UsageError

PACKINGS = plugins.names("packing")
QUANTS = plugins.names("quant")


@pytest.fixture
def sparse_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the name ``sparse`` stand for a packing that leaves zeros out."""
    module, load = ModuleType("sparse"), plugins.load
    module.REQUIRES_ZEROS = True  # type: ignore[attr-defined]
    module.fits = lambda quant, zeros_fraction: ""  # type: ignore[attr-defined]
    monkeypatch.setattr(
        plugins, "load", lambda kind, name: module if (kind, name) == ("packing", "sparse") else load(kind, name)
    )


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("quant_name", QUANTS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_unpacking_gives_the_same_rows(packing_name: str, quant_name: str, sparsity: float) -> None:
    """Packing loses nothing, wherever it says that it fits."""
    packing, quant = packings.load(packing_name), quants.load(quant_name)
    if (packing.REQUIRES_ZEROS and not quant.PRESERVES_ZERO) or packing.fits(quant, sparsity):
        return  # refused with a reason: the tests below
    generator = np.random.default_rng(0)
    weight_OI = generator.standard_normal((6, 512)).astype(np.float32)
    packed_OP = quant.quantize(np.where(generator.random((6, 512)) < sparsity, np.float32(0), weight_OI))
    stored = packing.pack(quant, packed_OP)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(packing.unpack(quant, stored, 6), packed_OP)


@pytest.mark.parametrize("packing_name", PACKINGS)
@pytest.mark.parametrize("quant_name", QUANTS)
def test_a_quant_is_refused_before_any_work_or_packs_zeros(packing_name: str, quant_name: str) -> None:
    """What is not refused fits where half is zero; one that leaves zeros out never fits a dense tensor."""
    packing, quant = packings.load(packing_name), quants.load(quant_name)
    if (packing.REQUIRES_ZEROS and not quant.PRESERVES_ZERO) or packing.fits(quant, 1.0):
        with pytest.raises(UsageError, match=f"{packing_name}.*{quant_name}") as caught:
            packings.check(quant_name, packing_name)
        assert "plain" in caught.value.remedy
        return
    packings.check(quant_name, packing_name)
    assert packing.fits(quant, 0.5) == ""
    assert bool(packing.fits(quant, 0.0)) == packing.REQUIRES_ZEROS


@pytest.mark.parametrize("packing_name", [name for name in PACKINGS if packings.load(name).REQUIRES_ZEROS])
@pytest.mark.parametrize("quant_name", QUANTS)
def test_leaving_zeros_out_makes_smaller(packing_name: str, quant_name: str) -> None:
    """Half the weights zero is less than 0.85 of the bytes in every number format that fits."""
    packing, quant = packings.load(packing_name), quants.load(quant_name)
    if not quant.PRESERVES_ZERO or packing.fits(quant, 0.5):
        return
    generator = np.random.default_rng(0)
    weight_OI = generator.standard_normal((64, 512)).astype(np.float32)
    packed_OP = quant.quantize(np.where(generator.random((64, 512)) < 0.5, np.float32(0), weight_OI))
    assert packing.pack(quant, packed_OP).size < 0.85 * packed_OP.size


@pytest.mark.parametrize("quant_name", QUANTS)
def test_plain_goes_with_every_quant(quant_name: str) -> None:
    """Nothing is left out, so nothing can be lost."""
    packings.check(quant_name, "plain")


@pytest.mark.usefixtures("sparse_packing")
@pytest.mark.parametrize("quant_name", QUANTS)
def test_leaving_zeros_out_needs_a_quant_that_keeps_them(quant_name: str) -> None:
    """A sparse packing is refused, with alternatives, for exactly the quants that lose zeros."""
    if quants.load(quant_name).PRESERVES_ZERO:
        packings.check(quant_name, "sparse")
        return
    with pytest.raises(UsageError, match="does not keep") as caught:
        packings.check(quant_name, "sparse")
    assert "q8_0" in caught.value.remedy
    assert quant_name not in caught.value.remedy


def test_unknown_names_are_refused() -> None:
    """A typing error names the nearest packing or quant."""
    with pytest.raises(UnknownPluginError, match="did you mean 'plain'"):
        packings.check("q8_0", "plan")
    with pytest.raises(UnknownPluginError, match="did you mean 'q8_0'"):
        packings.check("q8", "plain")
