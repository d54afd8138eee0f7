"""8 bits everywhere: every zero is kept and no answer changes."""

FORMATS = ("gguf",)
QUANT = "q8_0"
RULES = ()
