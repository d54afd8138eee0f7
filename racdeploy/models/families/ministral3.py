"""Ministral 3 and models with its text model: Llama whose queries are scaled by position."""

from __future__ import annotations

from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm, Rope


def _read(config: Config) -> Config:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "attention_temperature": rope.get("llama_4_scaling_beta"),
        "yarn_magnitude": rope.get("mscale_all_dim"),
    }


FAMILY = Family(
    architecture="Ministral3ForCausalLM",
    gguf_arch="mistral3",
    transforms=decoder.ROTARY_TRANSFORMS,
    biases=(),
    config_form=ConfigForm(read=_read),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
    },
    gguf_integers=decoder.LLAMA_INTEGERS,
    gguf_floats={
        "rope.scaling.yarn_log_multiplier": "yarn_magnitude",
        "attention.temperature_scale": "attention_temperature",
    },
    rope=Rope(types=("yarn",)),
    min_transformers="5.0",
)
