"""Write the files that other programs need to load an ONNX language model.

Source: transformers.js 4.3 (``getSession``, ``dtypes.js``) for ``config.json``, which optimum reads
too; onnxruntime-genai 0.15 (``make_genai_config`` of its model builder).
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

import onnx

from racdeploy import quant as quants
from racdeploy.files.reading import Json
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape

# transformers.js: name of a number format → suffix of the graph's name.
_NAME_ENDS = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}
_SHARED_CACHE = "GroupQueryAttention"
_INPUTS = ("input_ids", "attention_mask", "position_ids")


def name_graph(quant: str) -> str:
    """Return the file name by which transformers.js finds a graph in a number format."""
    dtype = quants.load(quant).js_dtype
    return f"model{_NAME_ENDS[dtype]}.onnx"


def fix_head_size(model: onnx.ModelProto, head_size: int) -> None:
    """Write the head size into symbolic dimensions of caches, which transformers.js reads as 0."""
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if len(dimensions) == 4 and dimensions[3].dim_param:
            dimensions[3].dim_value = head_size


def companions(manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Return config.json and genai_config.json of a bundle whose artifacts are in ``folder``.

    Args:
        checkpoint: the exported model. For blocks of different widths, its config.json has the
            largest; both programs use it only for the shapes of caches.
    """
    (entry,) = (entry for entry in manifest.artifacts if entry.format == "onnx")
    model = onnx.load(str(folder / entry.path), load_external_data=False)

    main = PurePosixPath(entry.path).name
    described: Json = {"dtype": quants.load(entry.quant).js_dtype}
    if any(name.endswith(f"{main}_data") for name in entry.files):
        described["use_external_data_format"] = {main: 1}

    return {
        "config.json": _to_json({**checkpoint.config, "transformers.js_config": described}),
        "genai_config.json": _to_json(_describe_to_genai(model, entry, manifest, checkpoint.shape)),
    }


def list_client_notes(shape: ModelShape) -> list[str]:
    """Return notes on programs that cannot open the graph of a checkpoint.

    Source: ``ORTModelForCausalLM.__init__`` in optimum-onnx 0.1.0, which computes the head size.
    """
    heads = shape.integer("num_attention_heads")
    computed = shape.hidden_size // heads
    if computed == shape.head_dim:
        return []

    return [
        f"optimum's ORTModelForCausalLM expects a head size of hidden_size / num_attention_heads ="
        f" {computed}; it is {shape.head_dim}, so optimum does not open this graph;"
        " onnxruntime-genai and transformers.js do"
    ]


def _to_json(value: Json) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _describe_caches(model: onnx.ModelProto, shape: ModelShape) -> Json:
    """Return the names of inputs and outputs, and what onnxruntime-genai asks about states."""
    names = {value.name for value in model.graph.input}
    inputs = {name: name for name in _INPUTS if name in names}
    outputs = {"logits": "logits"}
    for part in ("key", "value"):
        inputs[f"past_{part}_names"] = f"past_key_values.%d.{part}"
        outputs[f"present_{part}_names"] = f"present.%d.{part}"

    described: Json = {"inputs": inputs, "outputs": outputs}
    if "conv" in shape.layer_types:
        # past_conv.0 by onnxruntime-genai's builder before 0.16, and past.0.conv since
        past = re.sub(r"\d+", "%d", next(name for name in names if "conv" in name))
        inputs["past_conv_names"] = past
        outputs["present_conv_names"] = past.replace("past", "present")
        described["layer_types"] = shape.layer_types
        described["conv_cache_size"] = shape.integer("conv_L_cache")

    return described


def _describe_to_genai(
    model: onnx.ModelProto, entry: ArtifactEntry, manifest: Manifest, shape: ModelShape
) -> Json:
    generation = manifest.generation
    eos_ids = list(manifest.tokenizer.eos_ids)
    shares_cache = any(node.op_type == _SHARED_CACHE for node in model.graph.node)

    return {
        "model": {
            "bos_token_id": shape.config.get("bos_token_id") or eos_ids[0],
            "context_length": generation.context_tokens,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": entry.path,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                **_describe_caches(model, shape),
                "num_attention_heads": shape.integer("num_attention_heads"),
                "num_hidden_layers": shape.block_count,
                "num_key_value_heads": shape.num_key_value_heads,
            },
            "eos_token_id": eos_ids,
            "pad_token_id": shape.config.get("pad_token_id") or eos_ids[0],
            "type": shape.config["model_type"],
            "vocab_size": shape.vocab_size,
        },
        "search": {
            "do_sample": generation.temperature > 0,
            "max_length": generation.context_tokens,
            "num_beams": 1,
            "past_present_share_buffer": shares_cache,
            "temperature": generation.temperature or 1.0,
            "top_p": generation.top_p,
        },
    }
