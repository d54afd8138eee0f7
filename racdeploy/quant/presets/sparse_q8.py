"""8 bits everywhere: keeps zeros, and answers do not change."""

FORMATS = ("gguf",)
QUANT = "q8_0"
RULES = ()
