"""IQ4_NL: 32 4-bit indices into 16 uneven values, none of them zero, and a half-precision scale."""

from racdeploy.quant import ggml, make_ggml_members
from racdeploy.quant.formats import q4_0
from racdeploy.quant.grid import Grid

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("iq4_nl", ggml)
PRESERVES_ZERO = False

GRID = Grid(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    BLOCK_SIZE,
    BLOCK_SIZE,
    q4_0.pack,  # the same bytes: only the values of the codes differ
)
