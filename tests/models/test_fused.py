"""Tensors of all experts of a block: read expert by expert, and written as they lay before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from racdeploy.models import fused_experts
from racdeploy.models.fused_experts import FusedExperts
from racdeploy.tensors import mxfp4
from racdeploy.tensors.safetensors import read_tensor_entries, write_entries
from tests.support.errors import raises

E, D, F = 3, 64, 32
PARTS = ("experts.*.gate.weight", "experts.*.up.weight")
LAYOUTS = [
    FusedExperts(PARTS, interleaved=interleaved, inputs_first=inputs_first)
    for interleaved in (False, True)
    for inputs_first in (False, True)
]


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write tensors of one block, and one outside."""
    named = {f"b.0.{name}": value for name, value in tensors.items()}
    file = folder / "fused.safetensors"
    save_file(named | {"norm": torch.ones(4)}, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("is_bias", [False, True])
def test_each_expert_is_read_by_itself_and_all_are_written_back(
    layout: FusedExperts, is_bias: bool, tmp_path: Path
) -> None:
    """Against torch's own slices; a file that is written again has the same bytes."""
    shape = (E, 2 * F) if is_bias else (E, D, 2 * F) if layout.inputs_first else (E, 2 * F, D)
    torch.manual_seed(0)
    whole = torch.randn(shape).bfloat16()
    file = write(tmp_path, {"gate_up": whole})

    apart = fused_experts.unfuse(read_tensor_entries(file), "b", {"gate_up": layout}, E)
    assert set(apart) == {"norm"} | {
        f"b.0.{part}" for expert in range(E) for part in layout.names(expert)
    }

    for expert in range(E):
        rows = whole[expert].T if layout.inputs_first and not is_bias else whole[expert]
        for place, part in enumerate(layout.names(expert)):
            own = rows[place::2] if layout.interleaved else rows[place * F : (place + 1) * F]
            entry = apart[f"b.0.{part}"]
            assert entry.size_bytes == 2 * own.numel()
            found = torch.from_numpy(entry.read()).view(torch.bfloat16)
            torch.testing.assert_close(found, own, rtol=0, atol=0)

    write_entries(
        fused_experts.fuse(apart, "b", {"gate_up": layout}), tmp_path / "again.safetensors"
    )
    again = load_file(tmp_path / "again.safetensors")
    assert torch.equal(again["b.0.gate_up"], whole)
    assert set(again) == {"norm", "b.0.gate_up"}


def test_experts_of_two_dtypes_are_written_in_float32(tmp_path: Path) -> None:
    """As after a training of some that had codes: the values stay."""
    (layout, *_) = LAYOUTS
    names = [part for expert in range(E) for part in layout.names(expert)]
    apart = {name: torch.randn(F, D) for name in names}
    apart[names[2]] = apart[names[2]].bfloat16()
    entries = read_tensor_entries(write(tmp_path, apart))
    write_entries(fused_experts.fuse(entries, "b", {"gate_up": layout}), tmp_path / "all")
    whole = torch.stack([apart[name].float() for name in names]).view(E, 2 * F, D)
    assert torch.equal(load_file(tmp_path / "all")["b.0.gate_up"], whole)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Every code beside every exponent that a weight may have, and both zeros."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (E, 2 * F, 2, 16), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(0, 250, (E, 2 * F, 2), dtype=torch.uint8, generator=generator)
    file = write(tmp_path, {"gate_up_blocks": codes, "gate_up_scales": exponents})
    return file, codes, exponents


def test_mxfp4_is_read_as_transformers_and_ggml_do(
    packed: tuple[Path, torch.Tensor, torch.Tensor],
) -> None:
    """Bit by bit, with the sign of zeros; another nibble order would be noticed."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    file, codes, exponents = packed
    layout = FusedExperts(PARTS, interleaved=True, inputs_first=True)
    apart = fused_experts.unfuse(read_tensor_entries(file), "b", {"gate_up": layout}, E)
    expected = convert_moe_packed_tensors(codes, exponents, dtype=torch.float32)  # inputs first

    for expert in range(E):
        for place, part in enumerate(layout.names(expert)):
            entry = apart[f"b.0.{part}"]
            assert isinstance(entry, mxfp4.Mxfp4Entry)
            found_OI = (entry.read().astype(np.uint32) << 16).view(np.float32)
            own_OI = expected[expert].T[place::2].numpy()
            np.testing.assert_array_equal(found_OI.view(np.int32), own_OI.view(np.int32))

            block_GP = entry.read_packed().reshape(-1, 17)
            as_ggml_GS = gguf.dequantize(block_GP, gguf.GGMLQuantizationType.MXFP4)
            np.testing.assert_array_equal(as_ggml_GS.reshape(found_OI.shape), found_OI)

            code_GX = block_GP[:, 1:]
            code_GX[:] = code_GX >> 4 | code_GX << 4
            swapped_GS = gguf.dequantize(block_GP, gguf.GGMLQuantizationType.MXFP4)
            assert not np.array_equal(swapped_GS, as_ggml_GS)


def test_mxfp4_is_written_as_bfloat16(
    packed: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """Which holds the same values: codes have two bits behind the point."""
    file, _, _ = packed
    layout = FusedExperts(PARTS, interleaved=True, inputs_first=True)
    described = {"gate_up": layout}
    apart = fused_experts.unfuse(read_tensor_entries(file), "b", described, E)
    write_entries(fused_experts.fuse(apart, "b", described), tmp_path / "again.safetensors")
    again = fused_experts.unfuse(
        read_tensor_entries(tmp_path / "again.safetensors"), "b", described, E
    )
    for name, entry in apart.items():
        np.testing.assert_array_equal(again[name].read(), entry.read())
    assert again["b.0.experts.0.up.weight"].dtype == "BF16"


def test_exponents_at_the_ends_are_what_the_format_says() -> None:
    """2^-128 is exact, too."""
    codes = np.full((1, 2, 16), 0x71, np.uint8)  # half of one, and six
    bits = mxfp4.to_bfloat16(codes, np.array([[0, 127]], np.uint8))
    values = (bits.astype(np.uint32) << 16).view(np.float32)[0]
    assert values[[0, 1]].tolist() == [2.0**-128, 6 * 2.0**-127]
    assert values[[32, 33]].tolist() == [0.5, 6.0]


def test_weights_that_are_no_numbers_are_refused(
    packed: tuple[Path, torch.Tensor, torch.Tensor],
) -> None:
    """By an exponent of 255, which ggml would take for a number."""
    file, codes, exponents = packed
    exponents[1, 7, 0] = 255
    write(file.parent, {"gate_up_blocks": codes, "gate_up_scales": exponents})
    described = {"gate_up": FusedExperts(PARTS, interleaved=True)}
    apart = fused_experts.unfuse(read_tensor_entries(file), "b", described, E)
    apart["b.0.experts.1.gate.weight"].read()
    with raises("weights-not-finite", "fused.safetensors"):
        apart["b.0.experts.1.up.weight"].read()


@pytest.mark.parametrize(
    ("tensors", "code", "value"),
    [
        ({"gate_up": torch.ones(4)}, "damaged-experts", "[4]"),
        ({"gate_up": torch.ones(2, 5, 4)}, "damaged-experts", "[2, 5, 4]"),
        ({"gate_up": torch.ones(3, 4, 4)}, "damaged-experts", "[3, 4, 4]"),
        ({"gate_up": torch.ones(2, 0, 4)}, "damaged-experts", "[2, 0, 4]"),
        (
            {
                "gate_up": torch.ones(2, 4, 32),
                "gate_up_blocks": torch.ones(2, 4, 1, 16, dtype=torch.uint8),
                "gate_up_scales": torch.ones(2, 4, 1, dtype=torch.uint8),
            },
            "tensor-stored-twice",
            "b.0.experts.0.gate.weight",
        ),
        (
            {"gate_up_blocks": torch.ones(2, 4, 2, 16, dtype=torch.uint8)},
            "damaged-experts",
            "b.0.gate_up_scales",
        ),
        (
            {
                "gate_up_blocks": torch.ones(2, 4, 2, 16, dtype=torch.uint8),
                "gate_up_scales": torch.ones(2, 4, 3, dtype=torch.uint8),
            },
            "damaged-experts",
            "[2, 4, 3]",
        ),
        (
            {
                "gate_up_blocks": torch.ones(2, 4, 2, 16),
                "gate_up_scales": torch.ones(2, 4, 2, dtype=torch.uint8),
            },
            "damaged-experts",
            "[2, 4, 2, 16]",
        ),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(
    tensors: dict[str, torch.Tensor], code: str, value: str, tmp_path: Path
) -> None:
    entries = read_tensor_entries(write(tmp_path, tensors))
    with raises(code, value):
        fused_experts.unfuse(entries, "b", {"gate_up": FusedExperts(PARTS)}, 2)


def test_a_tensor_of_very_many_experts_costs_nothing(tmp_path: Path) -> None:
    """Its shape is a stranger's: axes without a length take no bytes in a file."""
    file = write(tmp_path, {"gate_up": torch.ones(2, 4, 4)})
    entries = dict(read_tensor_entries(file))
    name = "b.0.gate_up"
    entries[name] = replace(entries[name], shape=(1 << 40, 0, 2))
    with raises("damaged-experts", str([1 << 40, 0, 2])):
        fused_experts.unfuse(entries, "b", {"gate_up": FusedExperts(PARTS)}, 2)


def test_exponents_alone_are_no_secret(tmp_path: Path) -> None:
    """They stay among the tensors, and are refused there as unknown."""
    file = write(tmp_path, {"gate_up_scales": torch.ones(2, 4, 1, dtype=torch.uint8)})
    apart = fused_experts.unfuse(
        read_tensor_entries(file), "b", {"gate_up": FusedExperts(PARTS)}, 2
    )
    assert "b.0.gate_up_scales" in apart
