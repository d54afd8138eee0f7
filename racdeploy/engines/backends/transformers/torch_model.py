"""Build transformers models from a checkpoint that racdeploy has read itself.

transformers 4.57 ignores the rope settings that transformers 5 writes, so the config is normalized
first. The model is built on the meta device, and blocks are filled one at a time. Where blocks
differ in width, which transformers' configurations cannot express, each is resized before.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from racdeploy.engines.backends.transformers import sinks
from racdeploy.engines.backends.transformers.experts import unfuse_experts
from racdeploy.errors import ModelError
from racdeploy.files.reading import artifact_errors
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.models.tensor_coverage import check_tensors

_DECODER = "model"
_ROTARY = ("rotary_emb", "pos_emb")  # LFM2 in transformers 4 uses the second
SUM_ROUNDING = 16 * 2.0**-24
"""Error of a sum of some hundred float32 products, over the root mean square of such sums: each of
N additions rounds by 2^-24 of a partial sum, which adds up to the square root of N."""
_COMPARE_FILE = "compare the file with the one that the model's authors publish"
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return the model on the meta device, with sdpa attention and working rotary embeddings."""
    shape = checkpoint.shape
    shape.family.check_transformers()
    has_sinks = "attn_sinks.weight" in shape.family.block_tensors.values()
    attention = sinks.register() if has_sinks else "sdpa"
    with artifact_errors(f"{checkpoint.folder}/config.json", _COMPARE_FILE), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _config(checkpoint), attn_implementation=attention, dtype=torch.float32
        )

        unfuse_experts(model, shape.family.expert_linears)
        _fix_buffers(model)

    _tag_blocks(model, shape)
    if not shape.is_uniform:
        for block in range(shape.block_count):
            _fit_block(model, shape, block)

    # Buffers are computed and not in the file: they need values even while weights have none.
    rotary: Any
    for name, rotary in _rotary(model).items():
        has_kinds = "rope_type" in inspect.signature(type(rotary)).parameters
        kind = {"rope_type": rotary.rope_type} if has_kinds else {}
        model.set_submodule(f"{_DECODER}.{name}", type(rotary)(config=rotary.config, **kind))

    _fill_scales(model, shape)

    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    model_type = shape.config["model_type"]
    assert not empty, f"families/{model_type}.py does not say how to fill {empty}"
    return model.eval()


def _fill_scales(model: nn.Module, shape: ModelShape) -> None:
    """Fill the constant scales of modules, which no file holds."""
    D = shape.hidden_size
    compute_mup = getattr(sys.modules[type(model).__module__], "compute_mup_vector", None)
    scales = {
        "mup_vector": compute_mup(model.config) if compute_mup else 1.0,  # of Falcon-H1
        "router_input_scale": 1 / D,
        "per_layer_projection_scale": D**-0.5,
        "per_layer_input_scale": 2**-0.5,
    }

    for module in list(model.modules()):
        embed_scale = getattr(module, "scalar_embed_scale", embedding_scale(shape))
        values = {**scales, "embed_scale": embed_scale}

        for name, _ in list(module.named_buffers(recurse=False)):
            if name in values:
                module.register_buffer(name, torch.as_tensor(values[name]), persistent=False)


def _rotary(model: nn.Module) -> dict[str, nn.Module]:
    """Return the rotary embeddings by their names in the decoder."""
    rotary: dict[str, nn.Module] = {}
    for name, each in model.get_submodule(_DECODER).named_children():
        if name.startswith(_ROTARY):
            inner = {f"{name}.{kind}": module for kind, module in each.named_children()}
            rotary |= inner or {name: each}
    return rotary


def _round_ramp(rotary: Any) -> nn.Module:
    """Return a rotary embedding whose YaRN ramp begins and ends at whole dimensions."""
    config = copy.deepcopy(rotary.config)
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        settings = getattr(config, key, None)
        if isinstance(settings, dict):
            settings["truncate"] = True

    result: nn.Module = type(rotary)(config=config)
    return result


def _fix_buffers(model: nn.Module) -> None:
    """Turn buffers that the checkpoint stores into parameters, so that all are filled alike."""
    stored = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name in stored:
            owner, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(owner), leaf)
            set_parameter(model, name, buffer)


def _tag_blocks(model: nn.Module, shape: ModelShape) -> None:
    """Set the attention type and index of each block; without a list, all have a window."""
    config: Any = model.config
    types: Any = getattr(config, "layer_types", None)
    if shape.family.kind_prefixes:  # its names differ between releases
        types = shape.layer_types

    kinds = types or ["sliding_attention"] * shape.block_count
    for index, kind in enumerate(kinds):
        block: Any = model.get_submodule(f"{shape.family.blocks}.{index}")
        block.attention_type = kind
        block.number = index


def make_position_embeddings(
    model: nn.Module, block: Any, hidden_BTD: Tensor, position_1T: Tensor
) -> dict[str, Any]:
    """Return the keyword arguments of a block for rotary embeddings."""
    modules = _rotary(model)
    if not modules:
        return {"position_embeddings": None}

    if "rotary_emb_local" in modules:  # Gemma 3 in transformers 4: its blocks choose
        return {
            "position_embeddings_global": modules["rotary_emb"](hidden_BTD, position_1T),
            "position_embeddings_local": modules["rotary_emb_local"](hidden_BTD, position_1T),
        }

    for_attention = modules.get(f"rotary_embs.{block.attention_type}")  # OLMo 3 in transformers 4
    rotary = for_attention or modules.get("pos_emb") or modules["rotary_emb"]
    has_kinds = "layer_type" in inspect.signature(rotary.forward).parameters  # in transformers 5
    kind = (block.attention_type,) if has_kinds else ()
    return {"position_embeddings": rotary(hidden_BTD, position_1T, *kind)}


def _fit_block(model: nn.Module, shape: ModelShape, block: int) -> None:
    """Resize the linears of a block, on the meta device, to the block's own widths."""
    family = shape.family
    module = model.get_submodule(f"{family.blocks}.{block}")
    sizes = shape.sizes[block]

    for name, _ in list(module.named_parameters()):
        empty = torch.empty(widths.tensor_shape(family, name, sizes), device="meta")
        set_parameter(module, name, empty)

    for linear in shape.linears[block]:
        matrix: Any = module.get_submodule(linear)
        matrix.out_features, matrix.in_features = matrix.weight.shape

    fit_attention(module, sizes)


def fit_attention(block: nn.Module, sizes: Mapping[str, int]) -> None:
    """Set the numbers of heads of a block's attention; ``sizes`` are by a family's letters."""
    # Some attentions compute them once, some read their config in every call.
    attention: Any = getattr(block, "self_attn", None)
    if attention is None:
        return
    attention.num_key_value_groups = sizes["Q"] // sizes["KV"]
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = sizes["Q"] // sizes["K"]
    attention.config.num_key_value_heads = sizes["KV"] // sizes["K"]


def embedding_scale(shape: ModelShape) -> float:
    """Return the factor of token embeddings."""
    setting = shape.family.scaling.embedding
    return float(shape.setting(setting)) if setting else 1.0


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Return the whole model in float32.

    Raises:
        ModelError: the file does not hold exactly the model's tensors, in their shapes.
    """
    model = build_skeleton(checkpoint)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    if checkpoint.tied:
        shapes.pop("lm_head.weight", None)
    check_tensors(checkpoint, shapes)

    for name in shapes:
        fill_parameter(model, name, checkpoint)

    if checkpoint.tied:
        head = model.get_submodule("lm_head")
        head.register_parameter("weight", model.get_parameter(checkpoint.family.embedding))

    return model


@dataclass(frozen=True)
class GgmlRounding:
    """Roundings of ggml that torch imitates; YaRN's ramp is always rounded.

    Args:
        has_tables: whether GELU is looked up in a table in half precision, as on a CPU.
        jitter_seed: if not None, numbers are changed by a float32 rounding before they are looked
            up. Two such passes differ as much as any two orders of sums do.
    """

    has_tables: bool = True
    jitter_seed: int | None = None


@contextmanager
def round_as_ggml(
    model: nn.Module, shape: ModelShape, rounding: GgmlRounding | None = None
) -> Iterator[None]:
    """Round in the body as ggml does: values that it looks up in a table, and YaRN's ramp.

    Source: ``ggml_vec_gelu_f32`` and ``ggml_table_gelu_f16`` in ggml-cpu/vec.h: GELU of a number
    rounded to half precision, itself rounded to half precision; from -10 down it is 0, and from 10
    up the number itself. ``ggml_rope_yarn_corr_dims`` in ggml.c: the ends are whole dimensions.
    """
    rounding = rounding or GgmlRounding()
    family = shape.family
    rotary = _rotary(model) if shape.rounds_yarn_ramp else {}
    for name, module in rotary.items():
        model.set_submodule(f"{_DECODER}.{name}", _round_ramp(module))

    hooks = []
    dropped_shares = _match_llama_sparsity(model)
    table = partial(_look_up_gelu, jitter=_seed_jitter(rounding.jitter_seed))
    for block in range(shape.block_count) if rounding.has_tables else ():
        for name in family.lookup_table_modules:
            module = model.get_submodule(f"{family.blocks}.{block}.{name}")
            hooks.append(module.register_forward_hook(table))

    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, share in dropped_shares.items():
            part.activation_sparsity = share
        for name, module in rotary.items():
            model.set_submodule(f"{_DECODER}.{name}", module)


def _match_llama_sparsity(model: nn.Module) -> dict[Any, float]:
    """Let Gemma 3n's first blocks drop as many activations as llama.cpp; return the former shares.

    The variance of F activations is divided by F here, and by F - 1 in llama.cpp (``gaussian_topk``
    in ``src/models/gemma3n.cpp``), so that the same threshold belongs to another share.
    """
    before = {}
    for each in model.modules():
        part: Any = each
        if getattr(part, "activation_sparsity", 0):
            before[part] = part.activation_sparsity
            F = part.intermediate_size
            normal = NormalDist()
            threshold = normal.inv_cdf(part.activation_sparsity) * math.sqrt(F / (F - 1))
            part.activation_sparsity = normal.cdf(threshold)
    return before


def _seed_jitter(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _look_up_gelu(
    _: nn.Module, arguments: tuple[Tensor, ...], __: Tensor, *, jitter: torch.Generator | None
) -> Tensor:
    (x,) = arguments
    if jitter is not None:
        scale = SUM_ROUNDING * x.square().mean().sqrt()
        x = x + scale * torch.randn(x.shape, generator=jitter)
    rounded = x.half().float()
    value = nn.functional.gelu(rounded, approximate="tanh").half().float()

    value = torch.where(x <= -10, torch.zeros_like(x), value)
    return torch.where(x >= 10, x, value)


def make_cache(model: nn.Module, checkpoint: Checkpoint) -> Any:
    """Return an empty cache, or None where a model makes its own."""
    if not checkpoint.family.has_state:
        return DynamicCache()

    # In transformers 4, most models with a state make their cache, but not these.
    module = sys.modules[type(model).__module__]
    if make := getattr(module, "FalconHybridMambaAttentionDynamicCache", None):
        devices = ["cpu"] * checkpoint.shape.block_count
        return make(model.config, batch_size=1, dtype=torch.float32, devices=devices)

    make = getattr(module, "HybridMambaAttentionDynamicCache", None)
    return make(model.config, batch_size=1, dtype=torch.float32) if make else None


def fill_parameter(model: nn.Module, name: str, checkpoint: Checkpoint) -> None:
    """Read one tensor in float32 and replace the meta parameter of that name.

    Its shape has been checked by :func:`racdeploy.models.tensor_coverage.check_tensors`.
    """
    set_parameter(model, name, torch.from_numpy(checkpoint.read(name)))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter of a module that has this name, or add it."""
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    module.get_submodule(owner).register_parameter(leaf, parameter)


def _config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration, with rope settings in the form that 4.57 reads."""
    folder = checkpoint.folder
    shape = checkpoint.shape
    rope = shape.rope
    rope_type = rope["rope_type"]

    if rope_type not in {"default", *ROPE_INIT_FUNCTIONS}:
        raise ModelError(
            "unsupported-variant", f"unknown rope type {rope_type!r} in {folder}/config.json"
        )
    if checkpoint.config.get("use_sliding_window"):
        raise ModelError(
            "unsupported-variant", f"{folder}: sliding-window attention is not supported"
        )

    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if rope_type == "longrope":  # Phi3Config wants exactly these
        factors = {key: rope.get(key) for key in ("short_factor", "long_factor")}
        scaling = {"type": "longrope", **factors}

    values = dict(checkpoint.transformers_config)
    for key in ("rope_parameters", "quantization_config", "transformers_version"):
        values.pop(key, None)

    values["rope_theta"] = rope["rope_theta"]
    if rope_type != "proportional":  # only transformers 5 has it, and reads rope_parameters
        values["rope_scaling"] = None if rope_type == "default" else scaling
    if checkpoint.family.window.period:  # else transformers 5 takes one theta for both kinds
        values["rope_parameters"] = shape.rope_parameters

    if not shape.is_rotary:  # some configurations know no such settings
        values = {key: value for key, value in values.items() if not key.startswith("rope_")}

    values["head_dim"] = shape.head_dim  # YaRN on Mistral fails where it is null
    try:
        return AutoConfig.for_model(**values)
    except (ValueError, StrictDataclassError) as error:
        raise ModelError(
            "transformers-refuses",
            f"transformers refuses {folder}/config.json: {error}",
            remedy="if heads were cut, prune the dense model again with all of them",
        ) from error
