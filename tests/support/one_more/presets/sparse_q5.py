"""5 bits, every zero kept; 8 bits for embedding and output, which are dense."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q5_0",
    rules=(Rule(r"^(token_embd|output)\.weight$", "q8_0"),),
)
