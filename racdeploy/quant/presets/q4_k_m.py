"""Q4_K_M of llama.cpp: 4 bits, and 6 for the most sensitive linears. Does not keep zeros."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q4_k",
    rules=(
        Rule(r"^output\.weight$", "q6_k"),
        Rule(r"attn_(v|qkv)\.weight$|ffn_down", "q6_k", blocks="more"),
    ),
)
