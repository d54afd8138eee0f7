"""Gemma 3n E2B and E4B, text: four hidden states of a token (AltUp), of which a block renews one.

As in Gemma 4, each block has a per-layer input, and the last blocks share keys and values.
llama.cpp has constants in its source: 20 blocks compute keys, and 10 drop most activations.
"""

from __future__ import annotations

from racdeploy.errors import ModelError
from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import (
    AltUpStates,
    ConfigForm,
    GgufTensors,
    Rope,
    Scaling,
    Window,
)

_SPARSE_BLOCKS, _DROPPED_SHARE = 10, 0.95  # blocks with sparse activations, and their share


def _read(config: Config) -> Config:
    if config["final_logit_softcapping"] is None:
        raise ModelError("damaged-config", "config.json: final_logit_softcapping is null")

    count = config["num_hidden_layers"]
    sparse = _SPARSE_BLOCKS if count > _SPARSE_BLOCKS else 0

    # llama.cpp takes one width, though the config may list one for each block.
    width = config.get("intermediate_size", 16_384)
    if isinstance(width, list):
        if len(width) != count or len(set(width)) > 1:
            raise ModelError(
                "unsupported-variant",
                "config.json: intermediate_size differs between blocks, and llama.cpp takes one",
                remedy="take E2B or E4B, whose blocks are alike",
            )
        width = width[0]

    if config["vocab_size_per_layer_input"] > (config.get("vocab_size") or 262_400):
        raise ModelError(
            "damaged-config", "config.json: vocab_size_per_layer_input is above vocab_size"
        )

    return {
        "intermediate_size": width,
        "activation_sparsity_pattern": config.get("activation_sparsity_pattern")
        or [_DROPPED_SHARE] * sparse + [0.0] * (count - sparse),
    }


_ALTUP_LAUREL = {
    "altup.correct_output_scale": "altup_correct_scale.weight",
    "altup.correction_coefs.weight": "altup_correct_coef.weight",
    "altup.prediction_coefs.weight": "altup_predict_coef.weight",
    "altup.modality_router.weight": "altup_router.weight",
    "altup.router_norm.weight": "altup_router_norm.weight",
    "laurel.linear_left.weight": "laurel_l.weight",
    "laurel.linear_right.weight": "laurel_r.weight",
    "laurel.post_laurel_norm.weight": "laurel_post_norm.weight",
}
_ALTUP_PROJECTIONS = {
    f"model.{name}.{index}.weight": f"{stored}.weight"
    for name, stored in (
        ("altup_projections", "altup_proj"),
        ("altup_unembed_projections", "altup_unembd_proj"),
    )
    for index in range(3)
}
FAMILY = Family(
    architecture="Gemma3nForCausalLM",
    gguf_arch="gemma3n",
    block_tensors={
        **decoder.BLOCK_TENSORS,
        **decoder.GEMMA_NORMS,
        **decoder.PER_LAYER_INPUTS,
        **_ALTUP_LAUREL,
    },
    model_tensors={
        **decoder.MODEL_TENSORS,
        **_ALTUP_PROJECTIONS,
        **decoder.PER_LAYER_MODEL_TENSORS,
    },
    kind_prefixes={"own_keys": ("self_attn.k_", "self_attn.v_")},
    gguf_tensors=GgufTensors(
        shapes={"per_layer_token_embd": ("V", "PP")},  # no text has the tokens beyond
        needs_keys=True,
    ),
    altup=AltUpStates(inputs="altup_num_inputs"),
    no_cut_reason="blocks share keys and values, and each has columns of the token embeddings",
    transforms=dict.fromkeys(_ALTUP_PROJECTIONS, "stack"),
    # VP: tokens that have per-layer inputs; A: hidden states of a token; AA: their pairs; L: rank
    # of the learned residual (LAuReL).
    shapes={
        **decoder.PER_LAYER_SHAPES,
        "altup_correct_coef": ("A", "A"),
        "altup_predict_coef": ("AA", "A"),
        "altup_router": ("A", "D"),
        "laurel_l": ("L", "D"),
        "laurel_r": ("D", "L"),
        "altup_proj": ("D", "D"),
        "altup_unembd_proj": ("D", "D"),
        "per_layer_token_embd": ("VP", "PP"),
    },
    sizes={
        **decoder.PER_LAYER_SIZES,
        "VP": "vocab_size_per_layer_input",
        "A": "altup_num_inputs",
        "AA": "altup_pairs",
        "L": "laurel_rank",
    },
    biases=(),
    config_form=ConfigForm(read=_read, listed=("intermediate_size",)),
    defaults={
        "hidden_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 35,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 15,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_num_inputs": 4,
        "laurel_rank": 64,
    },
    supported_values={
        "hidden_act": (),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "final_logit_softcapping": (30.0,),
        "num_kv_shared_layers": ("=blocks_beyond_20",),
        "activation_sparsity_pattern": ("=sparsity_of_gemma3n",),
        "hidden_size_per_layer_input": (256,),
        "altup_active_idx": (0,),
        "altup_correct_scale": (True,),
        "altup_num_inputs": (4,),
        "laurel_rank": (64,),
    },
    gguf_integers={
        "attention.sliding_window": "sliding_window",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
        "altup.active_idx": "altup_active_idx",
        "altup.num_inputs": "altup_num_inputs",
    },
    gguf_floats={
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    rope=Rope(types=("default",)),
    scaling=Scaling(embedding="sqrt_hidden_size", logit_cap="final_logit_softcapping"),
    window=Window(period=5, is_listed=True),
    lookup_table_modules=("mlp.act_fn", "act_fn"),
    min_transformers="5.8",  # older ones share keys through a cache alone
)
