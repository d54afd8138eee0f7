"""6 bits that keep zeros; embedding and output, which are dense, have 8."""

from racdeploy.quant.presets import Rule

FORMATS = ("gguf",)
QUANT = "q6_k"
RULES = (Rule(r"^(token_embd|output)\.weight$", "q8_0"),)
