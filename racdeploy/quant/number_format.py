"""Record of a number format: its width, its codes, and what reads and writes its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from racdeploy.plugins import Names
from racdeploy.quant.grid import Bytes, Floats, Grid
from racdeploy.tensors.ggml_types import GGML_TYPES


class Codec(Protocol):
    """Reader and writer of a number format's bytes."""

    @property
    def bits(self) -> float:
        """Bits per weight, with scales."""

    @property
    def block_size(self) -> int:
        """Number of consecutive weights of a row in a quant block."""

    def quantize(self, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
        """Return packed_OP of finite float32 weights, ``I * bits / 8`` bytes a row.

        Args:
            weight_OI: rows of whole quant blocks.
            importance_I: positive weight of each input's squared error.
        """

    def dequantize(self, packed_OP: Bytes, I: int) -> Floats:
        """Return float32 weight_OI of packed rows."""


class GgmlLibrary(Protocol):
    """Module that reads and writes ggml's types, given their ids."""

    def quantize(
        self, ggml_type: int, weight_OI: Floats, importance_I: Floats | None = None
    ) -> Bytes: ...

    def dequantize(self, ggml_type: int, packed_OP: Bytes, I: int) -> Floats: ...


@dataclass(frozen=True)
class GgmlCodec:
    """Codec of a type of ggml, which GGUF files store.

    Args:
        name: of ggml's type, as in :data:`GGML_TYPES`.
        library: :mod:`~racdeploy.quant.floats`, :mod:`~racdeploy.quant.numpy_ggml` or, where gguf
            cannot write the type in numpy, :mod:`~racdeploy.quant.ggml`.
        uses_importance: True if the search of scales takes an importance.
    """

    name: str
    library: GgmlLibrary
    uses_importance: bool = True

    @property
    def type_id(self) -> int:
        """Number of the type in a GGUF file."""
        return GGML_TYPES[self.name].type_id

    @property
    def bits(self) -> float:
        return GGML_TYPES[self.name].bits

    @property
    def block_size(self) -> int:
        return GGML_TYPES[self.name].block_weights

    def quantize(self, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
        return self.library.quantize(self.type_id, weight_OI, importance_I)

    def dequantize(self, packed_OP: Bytes, I: int) -> Floats:
        return self.library.dequantize(self.type_id, packed_OP, I)


@dataclass(frozen=True, kw_only=True)
class Quant:
    """Number format: all that racdeploy knows about it.

    Args:
        codec: reads and writes its bytes. A :class:`GgmlCodec` makes it a format of GGUF files.
        preserves_zero: True if every zero stays zero.
        grid: values and packing of its codes; None if they cannot be chosen.
        js_dtype: its name in transformers.js; empty if ONNX graphs cannot store it.
        fallback: number format of rows that its blocks do not divide; keeps zeros.
        preset_fallback: the same in a preset, as ``tensor_type_fallback`` in llama-quant.cpp;
            empty: ``fallback``.
        is_profiled: True if ``racdeploy bench --profile`` measures its speed: for formats that
            most weights of a model are stored in.
    """

    codec: Codec
    preserves_zero: bool
    grid: Grid | None = None
    js_dtype: str = ""
    fallback: str = "f16"
    preset_fallback: str = ""
    is_profiled: bool = True

    @property
    def formats(self) -> Names:
        """File formats that store it."""
        formats = []
        if isinstance(self.codec, GgmlCodec):
            formats.append("gguf")
        if self.js_dtype:
            formats.append("onnx")
        return tuple(formats)

    @property
    def bits(self) -> float:
        """Bits per weight, with scales."""
        return self.codec.bits

    @property
    def block_size(self) -> int:
        """Number of consecutive weights of a row in a quant block."""
        return self.codec.block_size

    def quantize(self, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
        """Return packed_OP of finite float32 weights; see :meth:`Codec.quantize`."""
        return self.codec.quantize(weight_OI, importance_I)

    def dequantize(self, packed_OP: Bytes, I: int) -> Floats:
        """Return float32 weight_OI of packed rows."""
        return self.codec.dequantize(packed_OP, I)
