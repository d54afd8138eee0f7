"""Pack and unpack chunks of a bitmask packing: heads, a mask of one bit a weight, non-zero codes.

Four-bit codes have no mask: words of four are stored, zeros included, see ``buckets.py``. A chunk
depends on no other, so one chunk is in memory at a time. Format: docs/reference/racgguf.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.packing.block_layouts import CHUNK_WEIGHTS, BlockLayout, Bytes
from racdeploy.packing.buckets import BucketTable, count_number_bytes
from racdeploy.packing.masks import count_mask_bytes, pack_mask, unpack_mask

ReadBytes = Callable[[int], Bytes]
"""Returns the next bytes of a file, as many as asked for, or raises an ArtifactError."""
MIN_WORD_WEIGHTS = 4096
"""Minimum weights of a tensor packed in words.

Unpacking has to build its table, which takes as long as unpacking 200,000 weights.
"""

_DEFLATED = 1 << 31  # bit of a size field: the plane is deflated
# A plane with an entropy of more than 6 bits a byte inflates at about 90 MB/s and saves little. It
# is deflated in one chunk of eight: enough for the file to be smaller than zstd -19 makes it, at a
# quarter of the speed at most. Files of five-bit codes are small enough without.
_MAX_ENTROPY_BITS = 6.0
_MAX_IN_SLOW_CHUNK = 7.9
_SLOW_CHUNK, _SLOW_CYCLE = 3, 8
# Scales are few: inflating them takes longer than reading them, unless it saves half.
_MAX_HEAD_BITS = 4.0


def count_codes(layout: BlockLayout, plain: Bytes) -> NDArray[np.int64]:
    """Count zero and other codes of a chunk; for codes in words, count each of the 16 codes."""
    codes = _split_codes(layout, plain)
    if layout.uses_words:
        pairs = np.bincount(codes, minlength=256).reshape(16, 16)  # two codes a byte
        return np.asarray(pairs.sum(0) + pairs.sum(1))
    kept = int(np.count_nonzero(codes))
    return np.array([codes.size - kept, kept])


def count_map_bytes(layout: BlockLayout, weights: int) -> int:
    """Return the bytes in front of the codes of chunks: their bucket numbers, or their mask."""
    return count_number_bytes(weights) if layout.uses_words else count_mask_bytes(weights)


def pack_chunk(layout: BlockLayout, plain: Bytes, index: int, table: BucketTable | None) -> bytes:
    """Return the stored bytes of a chunk.

    Args:
        plain: its bytes in the plain file, whole blocks.
        index: of the chunk in its tensor.
        table: of the tensor, if its codes are stored in words.
    """
    blocks_GP = plain.reshape(-1, layout.block_bytes)
    heads_PG = np.ascontiguousarray(blocks_GP[:, : layout.head_bytes].T)
    planes = [_encode(head_G, _MAX_HEAD_BITS) for head_G in heads_PG]

    codes = _split_codes(layout, plain)
    if table:
        first, payload = table.encode(codes)
        planes.append((payload.size, payload.tobytes()))
    else:
        keep = codes != 0
        first = pack_mask(keep)
        planes += _encode_codes(layout, codes[keep], index)

    sizes = [size for size, _ in planes]
    fields = np.array([len(blocks_GP), *sizes], dtype="<u4")
    stored = [data for _, data in planes]
    return fields.tobytes() + first.tobytes() + b"".join(stored)


def unpack_chunk(
    layout: BlockLayout,
    take: ReadBytes,
    table: BucketTable | None = None,
    max_weights: int = CHUNK_WEIGHTS,
) -> Bytes:
    """Return the plain bytes of the next chunk.

    Raises:
        ArtifactError: it is damaged, or has more weights than allowed; nothing is allocated then.
    """
    blocks, *sizes = take(4 * (1 + layout.plane_count)).view("<u4").tolist()
    weights = blocks * layout.block_weights
    if not 0 < weights <= max_weights:
        raise ArtifactError(
            "damaged-packing", f"a chunk of {weights} weights where 1 to {max_weights} can be"
        )

    # Bucket numbers or a mask, then planes: those of heads, then those of codes.
    first = take(count_map_bytes(layout, weights))
    heads = [_decode(sizes.pop(0), blocks, take) for _ in range(layout.head_bytes)]

    if table:
        body = table.decode(first, take(sizes[0]), layout.zero_code)
    else:
        keep = _unpack_mask(first, weights)
        codes = np.zeros(weights, dtype=layout.code_dtype)
        codes[keep] = _take_kept(layout, len(keep), sizes, take)
        body = layout.join(codes)

    if heads:
        # Each plane of heads has one byte of every block.
        plain = np.empty(heads[0].size * layout.block_bytes, dtype=np.uint8)
        plain_G = plain.view(layout.block_dtype)
        for number, head in enumerate(heads):
            plain_G[f"head_{number}"] = head
        plain_G["body"] = body.view(layout.block_dtype["body"])
        return plain
    return body


def _split_codes(layout: BlockLayout, plain: Bytes) -> NDArray[Any]:
    blocks_GP = plain.reshape(-1, layout.block_bytes)
    return layout.split(blocks_GP[:, layout.head_bytes :])


def _unpack_mask(mask: Bytes, weights: int) -> NDArray[np.intp]:
    """Return the indices of the kept codes; a mask with more bits is an ArtifactError."""
    if weights % 8 and mask[-1] >> weights % 8:
        raise ArtifactError("damaged-packing", "a mask has bits behind the end of its chunk")

    return np.flatnonzero(unpack_mask(mask, weights))


def _take_kept(
    layout: BlockLayout, count: int, sizes: Sequence[int], take: ReadBytes
) -> NDArray[Any]:
    """Return the next ``count`` codes, joined from their planes."""
    fields: list[NDArray[Any]] = []
    shift = 0
    for bits, size in zip(layout.plane_bits, sizes, strict=True):
        plane = _decode(size, -(-count * bits // 8), take)
        field = _unpack_bits(plane, bits)[:count].astype(layout.code_dtype, copy=False)
        if shift:
            field = field << shift
        fields.append(field)
        shift += bits

    return reduce(np.bitwise_or, fields)


def _encode_codes(layout: BlockLayout, kept: NDArray[Any], index: int) -> list[tuple[int, bytes]]:
    """Return the planes of codes; low bytes are apart from sign and exponent, which repeat."""
    slow = index % _SLOW_CYCLE == _SLOW_CHUNK and not layout.has_fifth_bits
    max_bits = _MAX_IN_SLOW_CHUNK if slow else _MAX_ENTROPY_BITS

    planes = []
    shift = 0
    for bits in layout.plane_bits:
        numbers = (kept >> shift).astype(np.uint8)
        bits_NX = np.unpackbits(numbers[:, None], axis=1, count=bits, bitorder="little")
        planes.append(_encode(np.packbits(bits_NX, bitorder="little"), max_bits))
        shift += bits
    return planes


def _unpack_bits(packed: Bytes, bits: int) -> Bytes:
    """Return the numbers that `_encode_codes` packed, and the zeros that fill the last byte."""
    if bits == 8:
        return packed

    numbers = np.empty((packed.size, 8 // bits), dtype=np.uint8)
    for index in range(8 // bits):
        numbers[:, index] = packed >> np.uint8(index * bits)
    numbers &= np.uint8((1 << bits) - 1)
    return numbers.reshape(-1)


def _encode(plane: Bytes, max_bits: float) -> tuple[int, bytes]:
    """Return the size field and bytes of a plane, deflated if its entropy is low enough."""
    if plane.size and _measure_entropy(plane) <= max_bits:
        deflate = zlib.compressobj(
            level=6, method=zlib.DEFLATED, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_RLE
        )
        data = deflate.compress(plane.data) + deflate.flush()
        if len(data) < plane.size:
            return len(data) | _DEFLATED, data
    return plane.size, plane.tobytes()


def _measure_entropy(plane: Bytes) -> float:
    """Return the entropy of a byte in bits, as if bytes were independent."""
    share = np.bincount(plane, minlength=256) / plane.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def _decode(size: int, plane_bytes: int, take: ReadBytes) -> Bytes:
    """Return the plane with this size field; a size other than expected is an ArtifactError."""
    if not size & _DEFLATED:
        if size != plane_bytes:
            raise ArtifactError(
                "damaged-packing", f"{size} bytes of codes where the mask keeps {plane_bytes}"
            )
        return take(size)

    stored_bytes = size - _DEFLATED
    if stored_bytes >= plane_bytes:
        raise ArtifactError(
            "damaged-packing",
            f"{stored_bytes} deflated bytes of codes where {plane_bytes} plain ones are enough",
        )

    # One byte more than there should be is enough to see that there are too many.
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)

    try:
        data = inflate.decompress(take(stored_bytes).data, plane_bytes + 1)
    except zlib.error as error:
        raise ArtifactError("damaged-packing", f"its codes cannot be inflated: {error}") from error

    if len(data) != plane_bytes or not inflate.eof or inflate.unused_data:
        raise ArtifactError(
            "damaged-packing",
            f"codes inflate to {len(data)} bytes or end early, the mask keeps {plane_bytes}",
        )

    return np.frombuffer(data, dtype=np.uint8)
