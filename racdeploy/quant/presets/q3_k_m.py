"""Q3_K_M of llama.cpp: 3 bits, and 4 or 5 for the most sensitive linears. Loses some zeros."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q3_k",
    rules=(
        Rule(r"^output\.weight$", "q6_k"),
        Rule(r"attn_(v|qkv)\.weight$", "q5_k", blocks="first 2"),
        Rule(r"ffn_down", "q5_k", blocks="first 1/16"),
        Rule(r"attn_(v|qkv|output)\.weight$|ffn_down", "q4_k"),
    ),
)
