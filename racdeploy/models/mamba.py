"""What families with state spaces of Mamba 2 share: tensor names, shapes, and settings.

M: all channels of a state space; MH: its heads; MC: what the convolution sees; C: its length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_NAMES = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
SHAPES = {
    "ssm_in": ("M+MC+MH", "D"),
    "ssm_conv1d": ("MC", "1", "C"),
    "ssm_dt": ("MH",),
    "ssm_a": ("MH",),
    "ssm_d": ("MH",),
    "ssm_norm": ("M",),
    "ssm_out": ("D", "M"),
}
LAID = {"ssm_a": ("MH", "1"), "ssm_d": ("MH", "1")}
SIZES = {
    "M": "mamba_width",
    "MC": "mamba_convolved_width",
    "MH": "mamba_n_heads",
    "C": "mamba_d_conv",
}
# As transformers 5 writes it, and as others do.
_UNLIMITED = ([0.0, {"__float__": "Infinity"}], [0.0, math.inf])


def name_tensors(module: str) -> dict[str, str]:
    """Return names inside a block, of a state space that is this module → GGUF names."""
    return {f"{module}.{name}": in_file for name, in_file in _NAMES.items()}


def read_limit(config: Mapping[str, Any]) -> Any:
    """Return how long the steps of a state may be; None where any length may be."""
    limit = config.get("time_step_limit")
    return None if limit in _UNLIMITED else limit
