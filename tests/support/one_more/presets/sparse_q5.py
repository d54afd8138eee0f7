"""5 bits, every zero kept; 8 bits for embedding and output, which are dense."""

from racdeploy.quant.presets import Rule

FORMATS = ("gguf",)
QUANT = "q5_0"
RULES = (Rule(r"^(token_embd|output)\.weight$", "q8_0"),)
