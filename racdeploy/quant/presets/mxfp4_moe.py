"""MXFP4_MOE of llama.cpp: experts as 4-bit floats, all else 8 bits; keeps zeros."""

from racdeploy.quant.presets import Rule

FORMATS = ("gguf",)
QUANT = "q8_0"
RULES = (Rule(r"_exps\.weight$", "mxfp4"),)
