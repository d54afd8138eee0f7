"""F32: IEEE single precision, stored unchanged."""

from racdeploy.quant import GgmlCodec, Quant, floats

QUANT = Quant(
    codec=GgmlCodec("f32", floats),
    preserves_zero=True,
    js_dtype="fp32",
    is_profiled=False,  # a reference, wider than what a device runs
)
