"""F16: IEEE half precision, rounded to nearest even; exporters refuse weights beyond 65504."""

from racdeploy.quant import GgmlCodec, Quant, floats

QUANT = Quant(
    codec=GgmlCodec("f16", floats),
    preserves_zero=True,
    js_dtype="fp16",
)
