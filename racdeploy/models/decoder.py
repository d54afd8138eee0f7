"""Defaults of Llama-shaped decoders: tensor names, shapes, and the configs llama.cpp supports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from racdeploy.models import mamba

Transform = Literal["rotary", "plus_one", "stack", "value_rows", "value_columns", "decay"]
"""A change of a tensor on export; implemented in :mod:`racdeploy.models.conversion`.

- ``rotary``: reorder each head's rows from half-split rotary pairs to llama.cpp's interleaved ones.
- ``plus_one``: add 1, for norms that the model stores as the distance from 1.
- ``stack``: stack matrices into one tensor of three axes: those of all experts, whose names differ
  in ``*``, or those that have one name in the file; planned in ``exporting/gguf/tensors.py``.
- ``value_rows``, ``value_columns``: reorder the value heads of linear attention, which have fewer
  key heads, along one axis.
- ``decay``: from the logarithm ``A_log`` to the negative rate, heads in the order of value_rows.
"""

# GGUF names of linears that share an input, in forward order.
INPUT_GROUPS = (
    ("attn_q", "attn_k", "attn_v"),
    ("attn_qkv", "attn_gate"),
    ("attn_output",),
    ("ssm_in", "shortconv.in_proj"),
    ("ssm_out", "shortconv.out_proj"),
    ("ffn_gate", "ffn_up", "ffn_gate_up"),
    ("ffn_down",),
    ("ffn_gate_exps", "ffn_up_exps"),
    ("ffn_down_exps",),
    ("ffn_gate_up_shexp", "ffn_up_shexp"),
    ("ffn_down_shexp",),
)
# Projections of a module → GGUF names.
QKV = {"q": "attn_q", "k": "attn_k", "v": "attn_v"}
ATTENTION = {**QKV, "o": "attn_output"}
FEED_FORWARD = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
EXPERTS = {part: f"{stored}_exps" for part, stored in FEED_FORWARD.items()}
WEIGHT_AND_BIAS = ("weight", "bias")


def name_linears(
    module: str, stored: Mapping[str, str], kinds: Iterable[str] = ("weight",)
) -> dict[str, str]:
    """Return the names of a module's projections inside a block → GGUF names."""
    return {
        f"{module}.{name}_proj.{kind}": f"{in_file}.{kind}"
        for name, in_file in stored.items()
        for kind in kinds
    }


NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
HEAD_NORMS = {
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
POST_NORMS = {  # after each part of a block
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
GEMMA_NORMS = {  # before and after each part of a block
    "input_layernorm.weight": "attn_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    **POST_NORMS,
    **HEAD_NORMS,
}
PER_LAYER_INPUTS = {  # of Gemma: those of a block, and those of the model
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
}
PER_LAYER_MODEL_TENSORS = {
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
_ATTENTION_TENSORS = name_linears("self_attn", ATTENTION, WEIGHT_AND_BIAS)
LINEAR_TENSORS = _ATTENTION_TENSORS | name_linears("mlp", FEED_FORWARD, WEIGHT_AND_BIAS)
BLOCK_TENSORS = LINEAR_TENSORS | NORMS
NON_MLP_TENSORS = _ATTENTION_TENSORS | NORMS
"""Tensors of a block without those of Llama's feed-forward part."""
MODEL_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ALL_LINEARS = (*ATTENTION.values(), *FEED_FORWARD.values())


def list_kinds(blocks: int, period: int, usual: str = "sliding_attention") -> list[str]:
    """Return the kind of each block if every n-th has full attention; at period 0 all have."""
    kinds = []
    for block in range(1, blocks + 1):
        has_full_attention = not period or block % period == 0
        kinds.append("full_attention" if has_full_attention else usual)
    return kinds


EXPERT_SHAPES = {
    "ffn_gate_inp": ("E", "D"),
    "ffn_gate_exps": ("EF", "D"),
    "ffn_up_exps": ("EF", "D"),
    "ffn_down_exps": ("D", "EF"),
}
# D hidden, F feed-forward, V vocabulary, K head size, H query heads, Q columns of all query heads,
# KV of all key heads, E experts, EF one expert's feed-forward; others in mamba. A sum where one
# tensor holds several matrices. A tensor that is not listed is a vector of D.
SHAPES = {
    "token_embd": ("V", "D"),
    "output": ("V", "D"),
    "attn_q": ("Q", "D"),
    "attn_k": ("KV", "D"),
    "attn_v": ("KV", "D"),
    "attn_output": ("D", "Q"),
    "attn_q_norm": ("K",),
    "attn_k_norm": ("K",),
    "ffn_gate": ("F", "D"),
    "ffn_up": ("F", "D"),
    "ffn_down": ("D", "F"),
    "exp_probs_b": ("E",),
    "ffn_gate_up": ("F+F", "D"),
    **EXPERT_SHAPES,
    **mamba.SHAPES,
}
# P: a per-layer input; PP: those of all blocks.
PER_LAYER_SHAPES = {
    "inp_gate": ("P", "D"),
    "proj": ("D", "P"),
    "per_layer_token_embd": ("V", "PP"),
    "per_layer_model_proj": ("PP", "D"),
    "per_layer_proj_norm": ("P",),
}
PER_LAYER_SIZES = {"P": "hidden_size_per_layer_input", "PP": "per_layer_inputs_width"}
LLAMA_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
LLAMA_INTEGERS = {"vocab_size": "vocab_size", "rope.dimension_count": "rotary_width"}
ROTARY_TRANSFORMS: dict[str, Transform] = {
    f"self_attn.{name}_proj.{part}": "rotary" for name in "qk" for part in WEIGHT_AND_BIAS
}


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp that also computes a family, with other widths in each block.

    Its fields replace those of the family. Several parameters with one GGUF name are concatenated
    along the outputs.

    Args:
        tied: whether the output projection must be the embedding.
    """

    gguf_arch: str
    block_tensors: Mapping[str, str] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    gguf_integers: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False


# Llama, written for Nemotron, whose blocks differ.
DECI = GgufArchitecture(
    "deci",
    transforms=ROTARY_TRANSFORMS,
    biases=ALL_LINEARS,
    gguf_integers=LLAMA_INTEGERS,
)
# Qwen3 with q, k and v in one matrix, and without an output projection.
OPENELM = GgufArchitecture(
    "openelm",
    block_tensors=name_linears("self_attn", dict.fromkeys(QKV, "attn_qkv")),
    gguf_integers={"rope.dimension_count": "rotary_width"},
    tied=True,
)

# Values of config.json that llama.cpp takes for granted; a missing key counts as one of them.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1, 1.0),
    "is_causal": (True,),
    "pretraining_tp": (1,),
    "time_step_limit": (),
}
UNLIMITED_STEP = ([0.0, {"__float__": "Infinity"}], [0.0, math.inf])
"""Limits of a state's time step that are none, as transformers 5 writes infinity, and others."""
ANY_ROTARY_SHARE = {"partial_rotary_factor": None}
