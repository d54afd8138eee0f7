"""Falcon-H1: attention and a Mamba 2 state space side by side in every block.

Activations are multiplied by constants on their way; in a GGUF file these are in the weights. So it
has an output projection even if that is the embedding, whose multiplier differs.
"""

from __future__ import annotations

from racdeploy.models import decoder, mamba
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm, GgufTensors, Modules, RecurrentState, Scaling


def _read(config: Config) -> Config:
    gate, down = config["mlp_multipliers"]
    z, x, b, c, dt = config["ssm_multipliers"]  # as many as matrices in in_proj
    return {
        "gate_multiplier": gate,
        "down_multiplier": down,
        "ssm_multipliers": [z, x, b, c, dt],
        "logits_divisor": 1 / config["lm_head_multiplier"],
        "mamba_head_dim": config["mamba_d_ssm"] // config["mamba_n_heads"],
    }


FAMILY = Family(
    architecture="FalconH1ForCausalLM",
    gguf_arch="falcon-h1",
    block_tensors={
        **decoder.name_linears("self_attn", decoder.ATTENTION),
        "input_layernorm.weight": "attn_norm.weight",
        "pre_ff_layernorm.weight": "ffn_norm",
        **mamba.name_tensors("mamba"),
        **decoder.name_linears("feed_forward", decoder.FEED_FORWARD),
    },
    model_tensors={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.final_layernorm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    modules=Modules(final_norm="model.final_layernorm"),
    state=RecurrentState(marking="hybrid", optional=("mamba.norm.weight",)),
    scaling=Scaling(
        rows={
            "token_embd": ("embedding_multiplier",),
            "output": ("lm_head_multiplier",),
            "attn_q": ("attention_in_multiplier",),
            "attn_k": ("key_multiplier", "attention_in_multiplier"),
            "attn_v": ("attention_in_multiplier",),
            "attn_output": ("attention_out_multiplier",),
            "ssm_in": ("ssm_in_multiplier", "ssm_multipliers"),
            "ssm_out": ("ssm_out_multiplier",),
            "ffn_gate": ("gate_multiplier",),
            "ffn_down": ("down_multiplier",),
        },
        embedding="embedding_multiplier",
        logit_divisor="logits_divisor",
    ),
    transforms={"mamba.A_log": "decay"},
    gguf_tensors=GgufTensors(shapes=mamba.GGUF_SHAPES, needs_output=True),
    sizes=mamba.SIZES,
    biases=("ssm_conv1d",),
    config_form=ConfigForm(read=_read),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "mamba_d_ssm": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_norm_before_gate": True,
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 1.0],
        "lm_head_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "key_multiplier": 1.0,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
    },
    supported_values={
        "mamba_norm_before_gate": (False,),
    },
    gguf_integers={"vocab_size": "vocab_size", **mamba.GGUF_INTEGERS},
    min_transformers="4.53",
)
