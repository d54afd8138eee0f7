"""IQ4_NL: 32 4-bit indices into 16 uneven values, none of them zero, and a half-precision scale."""

from racdeploy.quant import GgmlCodec, Quant, ggml
from racdeploy.quant.formats import q4_0
from racdeploy.quant.grid import Grid

QUANT = Quant(
    codec=GgmlCodec("iq4_nl", ggml),
    preserves_zero=False,
    grid=Grid(
        values=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        block_size=32,
        group_size=32,
        pack=q4_0.pack,  # the same bytes: only the values of the codes differ
    ),
)
