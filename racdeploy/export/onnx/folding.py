"""Load a graph in a session of onnxruntime and save what it optimized: GRAPH OPTIMIZED."""

from __future__ import annotations

import sys

import onnxruntime


def main() -> None:
    """Save one optimized graph, its weights in a file beside it."""
    graph, optimized = sys.argv[1:]
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    )  # folding is part of it
    options.optimized_model_filepath = optimized
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "weights.bin"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
    )
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
