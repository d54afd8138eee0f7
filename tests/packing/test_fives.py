"""Five-bit codes come to the places that their mask says, as one after another would."""

from __future__ import annotations

import numpy as np
import pytest

from racdeploy.errors import ArtifactError
from racdeploy.packing.chunks import Taker, pack_chunk, unpack_chunk
from racdeploy.packing.fives import deposit
from racdeploy.packing.layouts import LAYOUTS

Q5_0 = LAYOUTS[6]
BLOCK_BYTES = 22


def _slowly(keep: np.ndarray, codes: list[int]) -> bytes:
    """Return the bodies of blocks as ggml has them, weight by weight.

    Code 16 is zero, weight 16 comes behind 0.
    """
    bodies, rest = bytearray(), iter(codes)
    for keep_32 in keep.reshape(-1, 32).tolist():
        fifths, nibbles = 0, [0] * 16
        for number, kept in enumerate(keep_32):
            place = number // 2 + number % 2 * 16
            code = (next(rest) if kept else 0) ^ 16
            fifths |= (code >> 4) << place
            nibbles[place % 16] |= (code & 15) << 4 * (place // 16)
        bodies += fifths.to_bytes(4, "little") + bytes(nibbles)
    return bytes(bodies)


def _deposited(keep: np.ndarray, codes: list[int], spare: int = 0) -> bytes:
    """Return the same from ``deposit``; ``spare`` fills what is left of the planes' last bytes."""
    low = np.array(
        [*(code & 15 for code in codes), spare & 15][: -(-len(codes) // 2) * 2], dtype=np.uint8
    )
    fifth = np.array(
        [*(code >> 4 for code in codes), *[spare >> 4] * 7][: -(-len(codes) // 8) * 8],
        dtype=np.uint8,
    )
    planes = iter(
        [(low[::2] | low[1::2] << 4).astype(np.uint8), np.packbits(fifth, bitorder="little")]
    )
    asked = []

    def plane(bits: int) -> np.ndarray:
        asked.append(bits)
        return next(planes)

    fifths, nibbles = deposit(np.packbits(keep, bitorder="little"), plane)
    assert [4 * len(codes), len(codes)] == asked
    return np.concatenate([fifths.reshape(-1, 4), nibbles.reshape(-1, 16)], axis=1).tobytes()


@pytest.mark.parametrize("quarter", range(4))
def test_every_byte_of_a_mask_moves_its_codes(quarter: int) -> None:
    """Each of 256 masks, in each quarter of a block and behind any number of codes, and bits that
    belong to nothing.
    """
    generator = np.random.default_rng(quarter)
    bytes_ = generator.integers(0, 256, (256, 4)).astype(np.uint8)
    bytes_[:, quarter] = generator.permutation(256)
    keep = np.unpackbits(bytes_.reshape(-1), bitorder="little").view(np.bool_)
    codes = generator.integers(0, 32, int(keep.sum())).tolist()
    assert _slowly(keep, codes) == _deposited(keep, codes, spare=31)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_masks_of_any_density(share: float) -> None:
    """Nothing kept, everything kept, and what lies between; zero is a code that may be kept too."""
    generator = np.random.default_rng(1)
    keep = generator.random(40 * 32) < share
    codes = generator.integers(0, 32, int(keep.sum())).tolist()
    assert _slowly(keep, codes) == _deposited(keep, codes)


def test_planes_of_another_size_are_refused() -> None:
    """Low bits or fifth bits that are more or fewer than the mask keeps, and a plane that is
    missing.
    """
    plain = np.random.default_rng(2).integers(0, 256, 8 * BLOCK_BYTES).astype(np.uint8)
    record = np.frombuffer(pack_chunk(Q5_0, plain, 0), dtype=np.uint8)
    assert plain.tobytes() == unpack_chunk(Q5_0, Taker(record)).tobytes()
    for place in (3, 4):
        for change in (-1, 1):
            damaged = record.copy()
            sizes = damaged[: 4 * (1 + Q5_0.planes)].view("<u4")
            sizes[place] = int(sizes[place]) + change
            with pytest.raises(ArtifactError, match="the mask keeps"):
                unpack_chunk(Q5_0, Taker(damaged))
    with pytest.raises(ArtifactError, match="wanted"):
        unpack_chunk(Q5_0, Taker(record[:-1]))
