"""Qwen3 mixtures of experts: all experts of a block are one GGUF tensor."""

from __future__ import annotations

from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm


def _read(config: Config) -> Config:
    # transformers 5 writes the second
    return {"num_experts": config.get("num_experts") or config.get("num_local_experts")}


_EXPERTS = decoder.name_linears("mlp.experts.*", decoder.EXPERTS)
FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    gguf_arch="qwen3moe",
    block_tensors={
        **decoder.NON_MLP_TENSORS,
        **decoder.HEAD_NORMS,
        "mlp.gate.weight": "ffn_gate_inp.weight",
        **_EXPERTS,
    },
    sizes={"E": "num_experts", "EF": "moe_intermediate_size"},
    config_form=ConfigForm(read=_read),
    defaults={"num_key_value_heads": 4, "norm_topk_prob": False, "use_sliding_window": False},
    supported_values={
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
    },
    gguf_integers={
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
)
