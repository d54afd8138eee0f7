"""Run torch's ONNX export in a process of its own: PREPARED_FOLDER OUT_FOLDER.

The graph takes past keys, values and states, and returns longer keys and values and new states. The
masks of transformers depend on its cache and branch on values, which cannot be traced, so they are
replaced. onnxruntime's operator replaces the recurrences of Qwen3.5 and Mamba 2, loops over tokens.

Opset 23 is the first with Attention and RotaryEmbedding; onnxruntime 1.32 runs both on CPUs.
Source: onnxruntime/docs/ContribOperators.md 1.32, LinearAttention; the builder for Qwen 3.5 of
onnxruntime-genai 0.15, names of states.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface, DynamicCache

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape

_OPSET = 23
_BATCH, _TOKENS, _PAST = 2, 3, 5  # a dimension of 1 in the example would be fixed
_ATTENTION = "racdeploy_graph"
_PAIR = ("key", "value")
_WEIGHTS = (".weight", ".bias", ".dt_bias", ".A_log", ".D")


class _GraphCache(DynamicCache):
    """Cache of a graph, by names of its inputs: keys and values to append to, states to replace."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        for part, new in zip(_PAIR, (key_states, value_states), strict=True):
            name = _name(layer_idx, part)
            self.tensors[name] = torch.cat([self.tensors[name], new], dim=-2)
        return self.tensors[_name(layer_idx, "key")], self.tensors[_name(layer_idx, "value")]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return next(each.shape[-2] for name, each in self.tensors.items() if name.endswith(_PAIR))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.tensors[_name(layer_idx, "conv_state")]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.tensors[_name(layer_idx, "recurrent_state")]

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Return past and new inputs of a convolution; the last ones are the next past."""
        past = self.get_conv_state(layer_idx)
        inputs = torch.cat([past, conv_states], dim=-1)
        self.tensors[_name(layer_idx, "conv_state")] = inputs[:, :, -past.shape[-1] :]
        return inputs

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.tensors[_name(layer_idx, "recurrent_state")] = recurrent_states
        return recurrent_states


def _name(block: int, part: str) -> str:
    return f"past_key_values.{block}.{part}"


class _Decoder(nn.Module):
    """Module with the inputs and outputs of a decoder graph around a model of transformers."""

    def __init__(self, model: nn.Module, pasts: list[str]) -> None:
        super().__init__()
        self.model = model
        self.pasts = pasts
        self.file: Any = sys.modules[type(model).__module__]

        # transformers 5 renames past_key_values, and drops the old name in 5.40.
        parameters = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        cache = _GraphCache(dict(zip(self.pasts, past, strict=True)))
        mask = partial(_mask, attention_mask, cache.get_seq_length(), input_ids.shape[1])
        self.file.create_causal_mask = lambda **_: mask()
        self.file.create_sliding_window_causal_mask = lambda config, **_: mask(
            config.sliding_window
        )
        self.file.create_recurrent_attention_mask = lambda **_: None  # an engine pads no sequence
        self.file.torch_chunk_gated_delta_rule = _delta_rule
        self.file.mamba2_chunk_scan = _state_space

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_name: cache},
        )
        return (outputs.logits, *cache.tensors.values())


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Run Qwen3.5's gated delta rule over heads [batch, token, head, size]."""
    # as transformers' own l2norm
    query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query / query.shape[-1] ** 0.5
    heads = (query, key, value)
    return _linear_attention("gated_delta", heads, initial_state, gates=(g, beta))


def _state_space(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    initial_states: Tensor,
    dt_limit: tuple[float, float],
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Run Mamba 2's recurrence: linear attention with C as queries and B as keys."""
    dt = nn.functional.softplus(dt + dt_bias).clamp(*dt_limit)
    value = hidden_states * dt[..., None]
    heads = (C, B, value)
    outputs, state = _linear_attention("gated", heads, initial_states, gates=(A * dt,))
    return outputs + D[:, None] * hidden_states, state


def _linear_attention(
    rule: str,
    heads: tuple[Tensor, Tensor, Tensor],
    state: Tensor,
    *,
    gates: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Write onnxruntime's operator over heads; return outputs and state.

    Args:
        heads: query, key and value, each [batch, token, head, size].
    """
    query, _, value = heads
    packed = [x.flatten(2) for x in heads]
    outputs, state = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (*packed, state, *gates),
        {
            "q_num_heads": query.shape[2],
            "kv_num_heads": value.shape[2],
            "update_rule": rule,
            "scale": 1.0,
        },
        dtypes=(value.dtype, value.dtype),
        shapes=(packed[2].shape, state.shape),
        version=1,
    )
    return outputs.view(value.shape), state


def _mask(attention_mask: Tensor, past: int, tokens: int, window: int = 0) -> Tensor:
    """Return the attention mask of new tokens over past and new ones, mask_B1TL; True: attends."""
    position_L = torch.arange(past + tokens)
    query_T1 = past + torch.arange(tokens)[:, None]

    mask_TL = position_L <= query_T1
    if window:
        mask_TL = mask_TL & (query_T1 - position_L < window)

    real_BL = attention_mask.bool()
    return mask_TL & real_BL[:, None, None, :]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by one Attention node, which supports groups of query heads without copying keys."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise SystemExit(f"the attention of this model has {name}, which is not traced")

    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def _keep_weights(node: ir.Node) -> bool | None:
    """Return False for a node that reads weights: the optimizer must not fold what is compared."""
    names = [value.name or "" for value in node.inputs if value is not None]
    return False if any(name.endswith(_WEIGHTS) for name in names) else None


def _name_dimensions(graph: onnx.GraphProto) -> None:
    """Name the dynamic dimensions as in optimum's graphs."""
    del graph.value_info[:]
    names = {"past_key_values": "past_sequence_length", "present": "total_sequence_length"}
    for value in (*graph.input, *graph.output):
        dimensions = value.type.tensor_type.shape.dim
        dimensions[0].dim_param = "batch_size"
        kind = value.name.partition(".")[0]
        if kind in names and value.name.endswith(_PAIR):
            dimensions[2].dim_param = names[kind]
        elif kind in names:
            continue  # a state
        elif value.name == "attention_mask":
            dimensions[1].dim_param = "total_sequence_length"
        else:
            dimensions[1].dim_param = "sequence_length"


@torch.no_grad()
def main() -> None:
    """Export one folder."""
    prepared, out = map(Path, sys.argv[1:])
    checkpoint = Checkpoint(prepared)
    model = load_model(checkpoint)

    AttentionInterface.register(_ATTENTION, _attend)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = _ATTENTION

    try:
        program = _trace(model, checkpoint.shape)
    except torch.onnx.OnnxExporterError as error:
        # torch wraps the reason, such as an operator without a translation, in a general error.
        cause = error.__cause__ or error
        first, *_ = [*str(cause).splitlines(), ""]
        raise SystemExit(f"{type(cause).__name__}: {first}") from error

    optimizer.optimize_ir(program.model, should_fold=_keep_weights)
    onnx_fusions.fuse(program.model)
    out.mkdir(parents=True)
    file = out / "model.onnx"
    program.save(file, external_data=True)

    graph = onnx.load(file, load_external_data=False)
    _name_dimensions(graph.graph)
    onnx.save(graph, file)


def _trace(model: nn.Module, shape: ModelShape) -> Any:
    """Return the ONNX program of a model by torch, without any optimization."""
    pasts = _list_pasts(model, shape)
    ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    positions = torch.arange(_PAST, _PAST + _TOKENS).repeat(_BATCH, 1)

    row = {0: Dim.AUTO, 1: Dim.AUTO}
    return torch.onnx.export(
        _Decoder(model, list(pasts)).eval(),
        (ids, mask, positions, [torch.zeros(sizes) for sizes in pasts.values()]),
        dynamo=True,
        opset_version=_OPSET,
        optimize=False,
        verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *pasts],
        output_names=["logits", *(name.replace("past_key_values", "present") for name in pasts)],
        dynamic_shapes=(row, row, row, [_list_dynamic(name) for name in pasts]),
    )


def _list_pasts(model: nn.Module, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the names of past keys, values and states, with sizes of an example."""
    pasts: dict[str, tuple[int, ...]] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "k_proj"):
            for part in _PAIR:
                past = (_BATCH, shape.num_key_value_heads, _PAST, shape.head_dim)
                pasts[_name(module.layer_idx, part)] = past
        elif hasattr(module, "conv1d"):
            channels, _, width = module.conv1d.weight.shape
            if hasattr(module, "num_v_heads"):
                heads = (module.num_v_heads, module.head_k_dim, module.head_v_dim)
            else:
                heads = (module.num_heads, module.ssm_state_size, module.head_dim)
            pasts[_name(module.layer_idx, "conv_state")] = (_BATCH, channels, width - 1)
            pasts[_name(module.layer_idx, "recurrent_state")] = (_BATCH, *heads)
    return pasts


def _list_dynamic(past: str) -> dict[int, Any]:
    """Return the dimensions that may change: of keys and values also the length."""
    return dict.fromkeys((0, 2) if past.endswith(_PAIR) else (0,), Dim.AUTO)


if __name__ == "__main__":
    main()
