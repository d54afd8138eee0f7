"""Quantize a model as one arm of ``quantizers.py`` does, in a process of its own.

    python -m benchmarks._quantizing '{"arm": "importance", "quant": "q4_k", …}'

Prints the file with its cost, in processor seconds without imports and in bytes of peak memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.packing import peak_bytes
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.exporting.gguf.architecture import find_architecture
from racdeploy.exporting.gguf.tensors import GgufTensorPlan, plan_tensors
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pruning.walk.assemble import CutShape, assemble
from racdeploy.quant import presets
from racdeploy.recipe import Recipe
from racdeploy.traces.trace import Trace, TraceSet, hash_ids

FILE_TYPES = {"q2_k": "Q2_K", "q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q4_0": "Q4_0", "q5_0": "Q5_0"}
ONNX = "matmulnbits_4"
Row = dict[str, Any]
Logits = Callable[[Sequence[int]], torch.Tensor]
Importance = Mapping[str, NDArray[np.float32]]


def quantize(job: Mapping[str, Any]) -> Row:
    """Quantize as one arm does; return the file and the folder with its config."""
    torch.set_num_threads(job["threads"])
    checkpoint, folder, arm = Checkpoint(Path(job["model"])), Path(job["folder"]), job["arm"]
    if arm in ("ours", "ours, cut"):
        return round_optimized(job)
    if job["quant"] == ONNX:
        make = quantize_genai if arm == "genai" else quantize_onnxruntime
        return describe(make(job), checkpoint.folder)

    source, out, model = Path(job["source"]), folder / f"{job['quant']}.gguf", checkpoint.folder
    importance: Importance = {}
    blocks: list[int] = []
    if arm == "importance":
        traces = TraceSet(folder).read()
        importance = measure_importance(checkpoint, [trace.ids for trace in traces])
    elif arm == "general importance":
        importance = measure_importance(checkpoint, json.loads(Path(job["rows"]).read_text()))
    elif arm == "prune-layers":
        blocks = find_least_changing(checkpoint, TraceSet(folder).read(), job["cut_blocks"])
        model = remove_blocks(checkpoint, blocks, folder)

    llama_quantize(source, out, job["quant"], importance, blocks)
    return describe(out, model)


def describe(file: Path, model: Path) -> Row:
    """Return a file with what lies beside it, and the folder of its config."""
    files = [each for each in file.parent.iterdir() if each.name.startswith(file.name)]
    size_bytes = sum(each.stat().st_size for each in files)
    names = [each.name for each in files]
    return {"file": str(file), "files": names, "size_bytes": size_bytes, "model": str(model)}


def round_optimized(job: Mapping[str, Any]) -> Row:
    """Choose the codes with racdeploy, and export them."""
    folder = Path(job["folder"])
    traces = TraceSet(folder).read()
    build = Build(Job(Recipe.combine(None, job["recipe"])), folder / "work", job["threads"])
    pruned = build.prune_stage.run(traces, hash_ids(traces))
    return describe(build.export(pruned.folder, job["quant"]).path, pruned.folder)


def llama_quantize(
    source: Path,
    out: Path,
    quant: str,
    importance: Importance | None = None,
    removed_blocks: Sequence[int] = (),
) -> Path:
    """Quantize with llama.cpp: one format for all linears, 8 bits for embedding and head.

    Args:
        importance: mean squares of a linear's inputs, by its name in the file.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{FILE_TYPES[quant]}")
    parameters.nthread, parameters.pure = torch.get_num_threads(), True
    parameters.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    parameters.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0

    known = importance or {}
    entries = (llama_cpp.llama_model_imatrix_data * (len(known) + 1))()  # the last one is empty
    for entry, (name, mean_I) in zip(entries, known.items(), strict=False):
        entry.name, entry.size = name.encode(), mean_I.size
        entry.data = mean_I.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if known:
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))

    ended = (ctypes.c_int32 * (len(removed_blocks) + 1))(*removed_blocks, -1)
    if removed_blocks:
        parameters.prune_layers = ctypes.cast(ended, type(parameters.prune_layers))

    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(parameters)
    )
    if failed:
        raise SystemExit(f"llama.cpp did not quantize {source} to {quant}")
    return out


@torch.inference_mode()
def measure_importance(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> Importance:
    """Return the mean squares of the inputs of each linear of the dense model, as llama-imatrix."""
    model = load_model(checkpoint)
    sums: dict[str, torch.Tensor] = {}
    for tensor in list_linears(checkpoint):

        def add(_: Any, inputs: tuple[torch.Tensor], name: str = tensor.name) -> None:
            squares_I = inputs[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums[name] + squares_I if name in sums else squares_I

        linear = model.get_submodule(tensor.source.removesuffix(".weight"))
        linear.register_forward_pre_hook(add)

    for ids in sequences:
        torch_logits(model)(ids)
    tokens = sum(map(len, sequences))
    return {name: (sum_I / tokens).float().numpy() for name, sum_I in sums.items()}


@torch.inference_mode()
def find_least_changing(checkpoint: Checkpoint, traces: Sequence[Trace], count: int) -> list[int]:
    """Return the blocks whose outputs are most similar to their inputs.

    Source: block influence of ShortGPT, arXiv 2403.03853, equation 1.
    """
    model = load_model(checkpoint)
    similarity = [0.0] * checkpoint.shape.block_count
    for index in range(len(similarity)):

        def add(_: Any, inputs: tuple[torch.Tensor], output: Any, index: int = index) -> None:
            after = output if isinstance(output, torch.Tensor) else output[0]
            cosines = torch.cosine_similarity(inputs[0], after, dim=-1)
            similarity[index] += float(cosines.sum())

        block = model.get_submodule(f"{checkpoint.family.blocks}.{index}")
        block.register_forward_hook(add)

    for trace in traces:
        torch_logits(model)(trace.ids)
    order = sorted(range(len(similarity)), key=lambda index: -similarity[index])
    return sorted(order[:count])


def remove_blocks(checkpoint: Checkpoint, blocks: Sequence[int], folder: Path) -> Path:
    """Write the dense model without some blocks; return its folder."""
    kept = tuple(index for index in range(checkpoint.shape.block_count) if index not in blocks)
    shape = CutShape(kept, [checkpoint.shape.sizes[index] for index in kept])
    return assemble(checkpoint, folder, folder / "model", shape)


def quantize_onnxruntime(job: Mapping[str, Any]) -> Path:
    """Quantize with onnxruntime's default algorithm; the head stays in F32."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(job["source"])
    head = [node.name for node in model.graph.node if "logits" in node.output]
    quantizer = MatMulNBitsQuantizer(
        model, bits=4, block_size=32, is_symmetric=True, nodes_to_exclude=head
    )
    quantizer.process()
    out = Path(job["folder"]) / "model.onnx"
    quantizer.model.save_model_to_file(str(out), use_external_data_format=False)
    return out


def quantize_genai(job: Mapping[str, Any]) -> Path:
    """Quantize with the model builder of onnxruntime-genai; its head has 8 bits."""
    out = Path(job["folder"]) / "genai"
    options = {"-m": "model", "-i": job["model"], "-o": out, "-p": "int4", "-e": "cpu"}
    words = [str(word) for option in {**options, "-c": out / "cache"}.items() for word in option]
    extra = ("int4_algo_config=rtn_last", "int4_accuracy_level=1", "hf_token=false")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*builder, *words, "--extra_options", *extra], check=True, stdout=sys.stderr)
    return out / "model.onnx"


def torch_logits(model: torch.nn.Module) -> Logits:
    """Return a function from token ids to logits_TV."""
    return lambda ids: model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def list_linears(checkpoint: Checkpoint) -> Iterator[GgufTensorPlan]:
    """Yield the prunable linears by their place in a GGUF file."""
    linears = {*checkpoint.shape.prunable_weights}
    family = find_architecture(checkpoint).family
    for tensor in plan_tensors(checkpoint, family, presets.read("f32")):
        if tensor.source in linears:
            if len(tensor.parts) != 1 or tensor.row_split != (0, 1):
                raise SystemExit(f"{tensor.name} is not one linear: not supported here")
            yield tensor


if __name__ == "__main__":
    began = sum(os.times()[:4])
    row = quantize(json.loads(sys.argv[1]))
    children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    cost = {"cpu_s": sum(os.times()[:4]) - began, "peak_bytes": max(peak_bytes(), children)}
    print(json.dumps(row | cost))
