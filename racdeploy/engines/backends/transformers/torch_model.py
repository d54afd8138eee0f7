"""Build transformers models from a checkpoint that racdeploy has read itself.

transformers 4.57 ignores the rope settings that transformers 5 writes, so the config is normalized
first. A skeleton lives on the meta device; blocks are filled one at a time. Where blocks differ in
width, which transformers' configurations cannot say, each is fitted before it is filled.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from racdeploy.engines.backends.transformers import sinks
from racdeploy.engines.backends.transformers.experts import part_experts
from racdeploy.errors import ModelError
from racdeploy.files.reading import refusing
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_tensors
from racdeploy.models.shape import ModelShape

_DECODER = "model"
_ROTARY = ("rotary_emb", "pos_emb")  # LFM2 in transformers 4 uses the second
_COMPARE = "compare the file with the one that the model's authors publish"
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Return the model on the meta device, with sdpa attention and working rotary embeddings."""
    shape = checkpoint.shape
    shape.family.check_transformers()
    has_sinks = "attn_sinks.weight" in shape.family.block_tensors.values()
    attention = sinks.register() if has_sinks else "sdpa"
    with refusing(f"{checkpoint.folder}/config.json", _COMPARE), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _config(checkpoint), attn_implementation=attention, dtype=torch.float32
        )

        part_experts(model)
        _fix_buffers(model)

    _tag_blocks(model, shape)
    if not shape.is_uniform:
        for block in range(shape.block_count):
            _fit_block(model, shape, block)

    # Buffers are computed and not in the file: they need values even while weights have none.
    for name, rotary in _rotary(model).items():
        model.set_submodule(f"{_DECODER}.{name}", _renew(rotary))

    _fill_scales(model, shape)

    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    model_type = shape.config["model_type"]
    assert not empty, f"families/{model_type}.py does not say how to fill {empty}"
    return model.eval()


def _fill_scales(model: nn.Module, shape: ModelShape) -> None:
    """Give the numbers that modules multiply by, and that no file holds, their values."""
    D = shape.hidden_size
    scales = {
        "router_input_scale": 1 / D,
        "per_layer_projection_scale": D**-0.5,
        "per_layer_input_scale": 2**-0.5,
    }

    for module in list(model.modules()):
        own = getattr(module, "scalar_embed_scale", embedding_scale(shape))
        values = {**scales, "embed_scale": own}

        for name, _ in list(module.named_buffers(recurse=False)):
            if name in values:
                module.register_buffer(name, torch.tensor(values[name]), persistent=False)


def _rotary(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that turn positions into rotations, by their names in the decoder."""
    found: dict[str, nn.Module] = {}
    for name, each in model.get_submodule(_DECODER).named_children():
        if name.startswith(_ROTARY):
            inner = {f"{name}.{kind}": module for kind, module in each.named_children()}
            found |= inner or {name: each}
    return found


def _renew(rotary: Any) -> nn.Module:
    """Return a rotary embedding with values in its buffers."""
    takes_kind = "rope_type" in inspect.signature(type(rotary)).parameters
    kind = {"rope_type": rotary.rope_type} if takes_kind else {}
    result: nn.Module = type(rotary)(config=rotary.config, **kind)
    return result


def _round_ramp(rotary: Any) -> nn.Module:
    """Return a rotary embedding whose YaRN begins and ends at whole dimensions."""
    config = copy.deepcopy(rotary.config)
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        settings = getattr(config, key, None)
        if isinstance(settings, dict):
            settings["truncate"] = True

    result: nn.Module = type(rotary)(config=config)
    return result


def _fix_buffers(model: nn.Module) -> None:
    """Make parameters of the buffers that are stored, so that one way fills all that is."""
    stored = model.state_dict().keys()
    for name, buffer in list(model.named_buffers()):
        if name in stored:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            delattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(buffer, requires_grad=False))


def _tag_blocks(model: nn.Module, shape: ModelShape) -> None:
    """Tell each block its kind, as the config lists them; without a list each has a window."""
    config: Any = model.config
    listed: Any = getattr(config, "layer_types", None)
    if shape.family.only:  # whose names differ between releases
        listed = shape.layer_types

    kinds = listed or ["sliding_attention"] * shape.block_count
    for index, kind in enumerate(kinds):
        block: Any = model.get_submodule(f"{shape.family.blocks}.{index}")
        block.attention_type = kind
        block.number = index


def embed_positions(
    model: nn.Module, block: Any, hidden_BTD: torch.Tensor, position_1T: torch.Tensor
) -> dict[str, Any]:
    """Return the arguments of a block that rotate its queries and keys."""
    modules = _rotary(model)
    if not modules:
        return {"position_embeddings": None}

    if "rotary_emb_local" in modules:  # Gemma 3 in transformers 4, whose blocks choose
        return {
            "position_embeddings_global": modules["rotary_emb"](hidden_BTD, position_1T),
            "position_embeddings_local": modules["rotary_emb_local"](hidden_BTD, position_1T),
        }

    own = modules.get(f"rotary_embs.{block.attention_type}")  # OLMo 3 in transformers 4
    rotary = own or modules.get("pos_emb") or modules["rotary_emb"]
    has_kinds = "layer_type" in inspect.signature(rotary.forward).parameters  # in transformers 5
    kind = (block.attention_type,) if has_kinds else ()
    return {"position_embeddings": rotary(hidden_BTD, position_1T, *kind)}


def _fit_block(model: nn.Module, shape: ModelShape, block: int) -> None:
    """Give the linears of a block, on the meta device, its own widths instead of the largest."""
    family = shape.family
    module = model.get_submodule(f"{family.blocks}.{block}")
    sizes = shape.sizes[block]

    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty(widths.shape(family, name, sizes), device="meta")
        module.get_submodule(owner).register_parameter(leaf, nn.Parameter(empty))

    for linear in shape.linears[block]:
        matrix: Any = module.get_submodule(linear)
        matrix.out_features, matrix.in_features = matrix.weight.shape

    fit_attention(module, sizes)


def fit_attention(block: nn.Module, sizes: Mapping[str, int]) -> None:
    """Tell the attention of a block how many heads its linears make, by a family's letters."""
    # Some compute it once, some ask their config as they run.
    attention: Any = getattr(block, "self_attn", None)
    if attention is None:
        return
    attention.num_key_value_groups = sizes["Q"] // sizes["KV"]
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = sizes["Q"] // sizes["K"]
    attention.config.num_key_value_heads = sizes["KV"] // sizes["K"]


def embedding_scale(shape: ModelShape) -> float:
    """Return what the model multiplies token embeddings by."""
    setting = shape.family.embedding_scale
    return float(shape.setting(setting)) if setting else 1.0


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Return the whole model in float32; the file must hold exactly its tensors."""
    model = skeleton(checkpoint)
    expected = dict(model.named_parameters())
    if checkpoint.tied:
        expected.pop("lm_head.weight", None)
    check_tensors(checkpoint, expected.keys())

    for name in expected:
        fill_parameter(model, name, checkpoint)

    if checkpoint.tied:
        head = model.get_submodule("lm_head")
        head.register_parameter("weight", model.get_parameter(checkpoint.family.embedding))

    return model


@contextmanager
def round_as_ggml(model: nn.Module, shape: ModelShape) -> Iterator[None]:
    """Round what ggml looks up in a table as the table does, and the ends of YaRN's ramp.

    Source: ``ggml_vec_gelu_f32`` and ``ggml_table_gelu_f16`` in ggml-cpu/vec.h: GELU of a number
    rounded to half precision, itself rounded to half precision; from -10 down it is 0, and from 10
    up the number itself. ``ggml_rope_yarn_corr_dims`` in ggml.c: the ends are whole dimensions.
    """
    family = shape.family
    rotary = _rotary(model) if shape.rounds_ramp else {}
    for name, module in rotary.items():
        model.set_submodule(f"{_DECODER}.{name}", _round_ramp(module))

    hooks = []
    dropping = _drop_as_llama(model)
    for block in range(shape.block_count):
        for name in family.table_modules:
            module = model.get_submodule(f"{family.blocks}.{block}.{name}")
            hooks.append(module.register_forward_hook(_table_gelu))

    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, share in dropping.items():
            part.activation_sparsity = share
        for name, module in rotary.items():
            model.set_submodule(f"{_DECODER}.{name}", module)


def _drop_as_llama(model: nn.Module) -> dict[Any, float]:
    """Have Gemma 3n's first blocks drop as many activations as llama.cpp; return how many before.

    The spread of F activations is a sum over F here, and over F - 1 there (``gaussian_topk`` in
    llama.cpp's ``src/models/gemma3n.cpp``): the same place between them is another share.
    """
    before = {}
    for each in model.modules():
        part: Any = each
        if getattr(part, "activation_sparsity", 0):
            before[part] = part.activation_sparsity
            F = part.intermediate_size
            normal = NormalDist()
            reach = normal.inv_cdf(part.activation_sparsity) * math.sqrt(F / (F - 1))
            part.activation_sparsity = normal.cdf(reach)
    return before


def _table_gelu(
    _: nn.Module, arguments: tuple[torch.Tensor, ...], __: torch.Tensor
) -> torch.Tensor:
    (x,) = arguments
    rounded = x.half().float()
    value = nn.functional.gelu(rounded, approximate="tanh").half().float()

    value = torch.where(x <= -10, torch.zeros_like(x), value)
    return torch.where(x >= 10, x, value)


def make_cache(model: nn.Module, checkpoint: Checkpoint) -> Any:
    """Return an empty cache of one or several sequences, or None where a model makes its own."""
    if not checkpoint.family.has_state:
        return DynamicCache()

    # transformers 4 makes most caches of models with a state itself, but not this one.
    name = "HybridMambaAttentionDynamicCache"
    make = getattr(sys.modules[type(model).__module__], name, None)
    return make(model.config, batch_size=1, dtype=torch.float32) if make else None


def fill_parameter(model: nn.Module, name: str, checkpoint: Checkpoint) -> None:
    """Read one tensor in float32 and put it in place of the meta parameter of that name."""
    value = torch.from_numpy(checkpoint.read(name))
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)

    expected = module.get_parameter(leaf).shape
    if expected != value.shape:
        raise ModelError(
            "wrong-tensor-shape",
            f"{name} is {tuple(value.shape)} in the file and {tuple(expected)} by config.json",
        )

    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


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

    values = {**checkpoint.config, **checkpoint.family.write(checkpoint.config)}
    for key in ("rope_parameters", "quantization_config", "transformers_version"):
        values.pop(key, None)

    values["rope_theta"] = rope["rope_theta"]
    if rope_type != "proportional":  # which only transformers 5 has, and reads below
        values["rope_scaling"] = None if rope_type == "default" else scaling
    if checkpoint.family.window_period:  # transformers 5 takes one of the two thetas for both
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
