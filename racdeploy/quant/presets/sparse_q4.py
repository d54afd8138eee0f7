"""4 bits that keep zeros, 5 for the most sensitive linears, 8 for embedding and output."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q4_0",
    rules=(
        Rule(r"^(token_embd|output)\.weight$", "q8_0"),
        Rule(
            r"attn_v\.weight$|ffn_down", "q5_0", blocks="more"
        ),  # can be packed, which Q6_K cannot
    ),
)
