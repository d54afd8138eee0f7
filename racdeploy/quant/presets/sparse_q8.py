"""8 bits everywhere: keeps zeros, and answers do not change."""

from racdeploy.quant.presets import Preset

PRESET = Preset(quant="q8_0")
