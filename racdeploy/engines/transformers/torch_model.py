"""Build transformers models from a checkpoint that racdeploy has read itself.

transformers 4.57 ignores the rope settings that transformers 5 writes, so the config is normalized
first. A skeleton lives on the meta device; blocks are filled one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from racdeploy.errors import ModelError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_tensors

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return the model on the meta device, with sdpa attention and working rotary embeddings."""
    config = _config(checkpoint)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation="sdpa", dtype=torch.float32
        )
    for name in checkpoint.family.rotary.values():
        rotary: Any = model.get_submodule(name)
        model.set_submodule(name, type(rotary)(config=rotary.config))
    embedding = model.get_submodule("model.embed_tokens")
    if "embed_scale" in dict(embedding.named_buffers()):
        embedding.register_buffer(
            "embed_scale", torch.tensor(embedding_scale(checkpoint)), persistent=False
        )
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not empty, (
        f"families/{checkpoint.config['model_type']}.py does not say how to fill {empty}"
    )
    return model.eval()


def embedding_scale(checkpoint: Checkpoint) -> float:
    """Return what the model multiplies token embeddings by."""
    setting = checkpoint.family.embedding_scale
    return float(checkpoint.setting(setting)) if setting else 1.0


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Return the whole model in float32.

    Raises:
        ModelError: tensors are missing, or the file holds tensors the architecture does not have.
    """
    model = skeleton(checkpoint)
    expected = dict(model.named_parameters())
    if checkpoint.tied:
        expected.pop("lm_head.weight", None)
    check_tensors(checkpoint, expected.keys())
    for name in expected:
        fill_parameter(model, name, checkpoint)
    if checkpoint.tied:
        head, embedding = model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")
        head.register_parameter("weight", embedding.get_parameter("weight"))
    return model


@contextmanager
def looked_up(model: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Round what ggml looks up in a table as the table does.

    Source: ``ggml_vec_gelu_f32`` and ``ggml_table_gelu_f16`` in ggml-cpu/vec.h: GELU of a number
    rounded to half precision, itself rounded to half precision; from -10 down it is 0, and from 10
    up the number itself.
    """
    family = checkpoint.family
    names = [
        f"{family.blocks}.{block}.{name}"
        for block in range(checkpoint.integer("num_hidden_layers"))
        for name in family.looked_up
    ]
    hooks = [model.get_submodule(name).register_forward_hook(_table_gelu) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _table_gelu(
    _: nn.Module, arguments: tuple[torch.Tensor, ...], __: torch.Tensor
) -> torch.Tensor:
    (x,) = arguments
    value = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, value))


def fill_parameter(model: nn.Module, name: str, checkpoint: Checkpoint) -> None:
    """Read one tensor in float32 and put it in place of the meta parameter of that name."""
    value = torch.from_numpy(checkpoint.read(name))
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if module.get_parameter(leaf).shape != value.shape:
        raise ModelError(
            f"{name} is {tuple(value.shape)} in the file and {tuple(module.get_parameter(leaf).shape)} by config.json"
        )
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _config(checkpoint: Checkpoint) -> Any:
    values = {
        k: v
        for k, v in checkpoint.config.items()
        if k not in {"rope_parameters", "quantization_config"}
    }
    rope = checkpoint.rope
    values["rope_theta"] = rope["rope_theta"]
    values["head_dim"] = checkpoint.head_size  # YaRN on Mistral fails where it is null
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    if rope["rope_type"] == "longrope":  # Phi3Config wants exactly these
        scaling = {
            "type": "longrope",
            **{key: rope.get(key) for key in ("short_factor", "long_factor")},
        }
    values["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if rope["rope_type"] not in {"default", *ROPE_INIT_FUNCTIONS}:
        raise ModelError(
            f"unknown rope type {rope['rope_type']!r} in {checkpoint.folder}/config.json"
        )
    values.pop("transformers_version", None)
    config = AutoConfig.for_model(**values)
    if checkpoint.config.get("use_sliding_window"):
        raise ModelError(f"{checkpoint.folder}: sliding-window attention is not supported")
    return config
