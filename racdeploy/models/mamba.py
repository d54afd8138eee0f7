"""State spaces of Mamba 2, as several families have them: tensor names, shapes, and settings.

M: all channels of a state space; MH: its heads; C: length of its convolution; G: groups, whose
norms are apart; MG: channels of a group; GN: states of all groups.
"""

from __future__ import annotations

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
    "ssm_in": ("M+M+GN+GN+MH", "D"),
    "ssm_conv1d": ("M+GN+GN", "1", "C"),
    "ssm_dt": ("MH",),
    "ssm_a": ("MH",),
    "ssm_d": ("MH",),
    "ssm_norm": ("M",),
    "ssm_out": ("D", "M"),
}
GGUF_SHAPES = {"ssm_a": ("MH", "1"), "ssm_d": ("MH", "1"), "ssm_norm": ("G", "MG")}
SIZES = {
    "M": "mamba_width",
    "MH": "mamba_n_heads",
    "C": "mamba_d_conv",
    "G": "mamba_n_groups",
    "MG": "mamba_group_width",
    "GN": "mamba_groups_width",
}
GGUF_INTEGERS = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.inner_size": "mamba_width",
    "ssm.time_step_rank": "mamba_n_heads",
}
OLD_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
"""Kinds of blocks → their names in published files, the only ones that transformers 4 knows."""
OLD_KINDS = {name: kind for kind, name in OLD_NAMES.items()}


def name_tensors(module: str) -> dict[str, str]:
    """Return the names of a state space's tensors inside a block → GGUF names."""
    return {f"{module}.{name}": in_file for name, in_file in _NAMES.items()}
