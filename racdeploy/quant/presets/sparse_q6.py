"""6 bits that keep zeros; embedding and output, which are dense, have 8."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q6_k",
    rules=(Rule(r"^(token_embd|output)\.weight$", "q8_0"),),
)
