"""Run torch's ONNX export in a process of its own: PREPARED_FOLDER OUT_FOLDER.

The graph takes past keys and values and returns longer ones. The masks of transformers depend on
its cache and branch on values, which cannot be traced, so they are replaced.

Opset 23 is the first with Attention and RotaryEmbedding; onnxruntime 1.32 runs both on CPUs.
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
_WEIGHTS = (".weight", ".bias")


class _AppendedCache(DynamicCache):
    """Cache that appends keys and values of new tokens to those of each block."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.pairs = pairs

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        past_key, past_value = self.pairs[layer_idx]
        pair = (
            torch.cat([past_key, key_states], dim=-2),
            torch.cat([past_value, value_states], dim=-2),
        )
        self.pairs[layer_idx] = pair
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.pairs[layer_idx][0].shape[-2]


class _Decoder(nn.Module):
    """Module with the inputs and outputs of a decoder graph around a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
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
        cache = _AppendedCache(list(zip(past[::2], past[1::2], strict=True)))
        mask = partial(_mask, attention_mask, cache.get_seq_length(), input_ids.shape[1])
        self.file.create_causal_mask = lambda **_: mask()
        self.file.create_sliding_window_causal_mask = lambda config, **_: mask(
            config.sliding_window
        )

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self.cache_name: cache},
        )
        return (outputs.logits, *(tensor for pair in cache.pairs for tensor in pair))


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
        if kind in names:
            dimensions[2].dim_param = names[kind]
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
    blocks = range(shape.block_count)
    pasts = [f"past_key_values.{block}.{part}" for block in blocks for part in _PAIR]
    cache = (_BATCH, shape.num_key_value_heads, _PAST, shape.head_dim)
    ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    positions = torch.arange(_PAST, _PAST + _TOKENS).repeat(_BATCH, 1)

    row = {0: Dim.AUTO, 1: Dim.AUTO}
    return torch.onnx.export(
        _Decoder(model).eval(),
        (ids, mask, positions, [torch.zeros(cache) for _ in pasts]),
        dynamo=True,
        opset_version=_OPSET,
        optimize=False,
        verbose=False,
        input_names=["input_ids", "attention_mask", "position_ids", *pasts],
        output_names=["logits", *(name.replace("past_key_values", "present") for name in pasts)],
        dynamic_shapes=(row, row, row, [{0: Dim.AUTO, 2: Dim.AUTO} for _ in pasts]),
    )


if __name__ == "__main__":
    main()
