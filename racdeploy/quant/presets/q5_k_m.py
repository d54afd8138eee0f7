"""Q5_K_M of llama.cpp: 5 bits, and 6 for the most sensitive linears. Does not keep zeros."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q5_k",
    rules=(
        Rule(r"^output\.weight$", "q6_k"),
        Rule(r"attn_(v|qkv)\.weight$|ffn_down", "q6_k", blocks="more"),
    ),
)
