"""MXFP4_MOE of llama.cpp: experts as 4-bit floats, all else 8 bits; keeps zeros."""

from racdeploy.quant.presets import Preset, Rule

PRESET = Preset(
    quant="q8_0",
    rules=(Rule(r"_exps\.weight$", "mxfp4"),),
)
