"""Q4_K_S of llama.cpp: 4 bits, and 5 in the first blocks. Does not keep zeros."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q4_k",
    rules=(
        Rule(r"^output\.weight$", "q6_k"),
        Rule(r"attn_(v|qkv)\.weight$", "q5_k", blocks="first 4"),
        Rule(r"ffn_down", "q5_k", blocks="first 1/8"),
    ),
)
