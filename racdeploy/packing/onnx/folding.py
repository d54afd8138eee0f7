"""Make the nodes that join mask and codes in an ONNX graph, and check that onnxruntime folds them.

The optimized graph of a real session must hold the plain weights and none of these nodes. NonZero
and ScatterElements are not used: onnxruntime never folds them and would run them for every token.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from racdeploy.errors import EngineError
from racdeploy.packing.onnx.file import load_graph, read_array
from racdeploy.packing.onnx.packer import PACKING_PREFIX
from racdeploy.processes import child_process

_BASE_BYTES = 2 * 2**30
_COPIES = 160  # 28 bytes while a weight is unpacked, which may take 1/4 byte in the file
_BASE_SECONDS = 3600  # of processor time
_BITS = f"{PACKING_PREFIX}bits"
_FLAT = f"{PACKING_PREFIX}flat"
_AXIS = f"{PACKING_PREFIX}axis"
# Operator, inputs, output and type of a Cast; ``~`` is the tensor: a boolean for each weight, then
# the index of each kept code, multiplied by the boolean, so that every zero has index 0.
_NODES = (
    ("BitwiseAnd", ("~.mask", _BITS), "~.bits", None),
    ("Cast", ("~.bits",), "~.truths", TensorProto.BOOL),
    ("Cast", ("~.truths",), "~.ones", TensorProto.INT32),
    ("Reshape", ("~.ones", _FLAT), "~.keep", None),
    ("CumSum", ("~.keep", _AXIS), "~.ranks", None),
    ("Mul", ("~.ranks", "~.keep"), "~.places", None),
    ("Gather", ("~.values", "~.places"), "~.flat", None),
)


def list_shared_constants() -> list[onnx.TensorProto]:
    """Return the constants that the nodes of all tensors read."""
    return [
        numpy_helper.from_array((1 << np.arange(8)).astype(np.uint8), _BITS),
        numpy_helper.from_array(np.array([-1], np.int64), _FLAT),
        numpy_helper.from_array(np.array(0, np.int64), _AXIS),
    ]


def make_unpack_nodes(name: str, shape: tuple[int, ...]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that make a tensor of a shape from ``NAME.mask`` and ``NAME.values``."""
    for op, inputs, output, to in _NODES:
        named = [key.replace("~", name) for key in inputs]
        yield _make_node(op, named, output.replace("~", name), to=to)

    extents = helper.make_tensor("shape", TensorProto.INT64, [len(shape)], list(shape))
    yield _make_node("Constant", [], f"{name}.shape", value=extents)
    yield _make_node("Reshape", [f"{name}.flat", f"{name}.shape"], name)


def _make_node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """Return a node; attributes that are None are left out."""
    return helper.make_node(op, inputs, [output], PACKING_PREFIX + output, **attributes)


def check_folding(file: Path, expected: Mapping[str, str]) -> None:
    """Load a packed graph in a real session, and refuse it unless every node is folded.

    Args:
        expected: initializer → SHA-256 of the values that it must have then.

    Raises:
        EngineError: a node stays, or an initializer gets other values.
    """
    with tempfile.TemporaryDirectory(prefix="racdeploy-folding-") as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        _run_session(file, optimized)
        model = load_graph(optimized)

        remaining = [node.name for node in model.graph.node if node.name.startswith(PACKING_PREFIX)]
        if remaining:
            raise EngineError(
                "not-folded",
                "onnxruntime does not fold the packed weights: "
                f"it keeps {len(remaining)} nodes, {remaining[0]!r}",
            )

        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, sha256 in expected.items():
            folded_sha256 = ""
            if name in initializers:
                folded = np.ascontiguousarray(read_array(initializers[name], optimized.parent))
                folded_sha256 = hashlib.sha256(folded.data).hexdigest()
            if folded_sha256 != sha256:
                raise EngineError(
                    "packed-weights-differ",
                    f"onnxruntime folds {name!r} into other weights than the plain ones",
                )


def _run_session(graph: Path, optimized: Path) -> None:
    """Save the graph as optimized by a session, in a child process: it unpacks the whole model.

    The limits are far above the needs of a healthy graph, which unpacks to 8 times its size.
    """
    size_bytes = sum(file.stat().st_size for file in graph.parent.iterdir() if file.is_file())
    seconds = _BASE_SECONDS + size_bytes // 10**5
    limits = child_process.ProcessLimits(_BASE_BYTES + _COPIES * size_bytes, seconds)
    outcome = child_process.run_module(__name__, graph, optimized, limits=limits)
    if outcome.failure:
        raise EngineError(
            "packed-graph-fails",
            f"loading the packed graph {outcome.failure}",
            remedy="free memory, or use packing 'plain'",
        )


def main() -> None:
    """Load GRAPH in a session and save it as OPTIMIZED, with its weights in a file beside it."""
    import onnxruntime

    graph, optimized = sys.argv[1:]
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # The basic optimizations include constant folding.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = optimized

    prefix = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{prefix}file_name", "weights.bin")
    options.add_session_config_entry(f"{prefix}min_size_in_bytes", "1024")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
