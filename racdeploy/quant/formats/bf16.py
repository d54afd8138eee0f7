"""BF16: the upper half of a float32, rounded to nearest even; importance has no effect."""

from racdeploy.quant import GgmlCodec, Quant, numpy_ggml

QUANT = Quant(
    codec=GgmlCodec("bf16", numpy_ggml),
    preserves_zero=True,
    is_profiled=False,  # as fast as f16 at best
)
