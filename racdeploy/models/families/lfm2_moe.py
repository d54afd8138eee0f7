"""LFM2 8B-A1B: LFM2's blocks, with experts in all but the first.

A router chooses experts by their sigmoids and a bias for each, which their weights leave out.
"""

from __future__ import annotations

from dataclasses import replace

from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.families.lfm2 import FAMILY as LFM2
from racdeploy.models.family_parts import ConfigForm, ExpertLayout

_SIGMOID = 2  # ``LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID``


def _read(config: Config) -> Config:
    width = config["intermediate_size"]  # that of LFM2 is computed from its setting
    return {
        **LFM2.config_form.read(config),
        "intermediate_size": width,
        "expert_gating_func": _SIGMOID,
    }


_EXPERTS = {
    f"feed_forward.experts.*.{name}.weight": f"ffn_{part}_exps.weight"
    for name, part in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
}
FAMILY: Family = replace(
    LFM2,
    architecture="Lfm2MoeForCausalLM",
    gguf_arch="lfm2moe",
    block_tensors={
        **LFM2.block_tensors,
        "feed_forward.gate.weight": "ffn_gate_inp.weight",
        "feed_forward.expert_bias": "exp_probs_b.bias",
        **_EXPERTS,
    },
    experts=ExpertLayout(dense_blocks="num_dense_layers"),
    kind_prefixes={
        **LFM2.kind_prefixes,
        "dense": ("feed_forward.w",),
        "sparse": ("feed_forward.gate", "feed_forward.expert"),
    },
    sizes={**LFM2.sizes, "E": "num_experts", "EF": "moe_intermediate_size"},
    config_form=ConfigForm(read=_read),
    defaults={
        **LFM2.defaults,
        "num_hidden_layers": 32,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1792,
        "intermediate_size": 7168,
    },
    supported_values={
        **LFM2.supported_values,
        "norm_topk_prob": (True,),
        "use_expert_bias": (True,),
        "routed_scaling_factor": (1, 1.0),
    },
    gguf_integers={
        **LFM2.gguf_integers,
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_gating_func": "expert_gating_func",
        "leading_dense_block_count": "num_dense_layers",
    },
    min_transformers="5.0",
)
