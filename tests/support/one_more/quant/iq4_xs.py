"""IQ4_XS: 4-bit places in a table that has no zero, a scale for each 32 weights and each 256."""

from racdeploy.quant import GgmlCodec, Quant, ggml

QUANT = Quant(codec=GgmlCodec("iq4_xs", ggml), preserves_zero=False)
