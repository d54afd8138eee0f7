"""Does an ONNX export above 2 GB work, and how much memory does it take?

    python -m benchmarks.onnx_large --out build/onnx-large

Writes a Qwen2-shaped bfloat16 checkpoint of random weights (each block is 47M parameters, the
embedding 233M), exports it to ONNX in a process of its own, opens the file with racdeploy's engine
and lets it generate. Prints sizes, seconds, and the highest peak of resident memory of any process
that took part.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._setup import QWEN2_1_5B, write_random_model
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import onnx as onnx_format
from racdeploy.models.checkpoint import Checkpoint


def main() -> None:
    """Export in a child, open here, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--quant", default="f32")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, graph = arguments.out / "model", arguments.out / "export" / "model.onnx"
    if arguments.child:
        onnx_format.export(Checkpoint(model), graph, quant=arguments.quant)
        return
    shutil.rmtree(arguments.out, ignore_errors=True)
    graph.parent.mkdir(parents=True)
    from tests.support.tiny_models import write_tokenizer

    write_random_model(model, [QWEN2_1_5B["intermediate_size"]] * arguments.blocks)
    write_tokenizer(model)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.onnx_large", *sys.argv[1:], "--child"], check=True
    )
    seconds = time.perf_counter() - started
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    shutil.copyfile(model / "config.json", graph.parent / "config.json")
    files = {file.name: file.stat().st_size for file in sorted(graph.parent.iterdir())}
    print(f"{files}\nexported in {seconds:.0f} s, peak of one process {peak_bytes / 1e6:.0f} MB")
    with open_engine(
        "onnxruntime", graph, EngineSettings(64, parallel=1, cache_dtype="f32")
    ) as engine:
        (completion,) = engine.generate([[1, 2, 3]], Sampling(8, stop_ids=()))
    assert len(completion.ids) == 8, completion
    print(f"the engine continues with {completion.ids}")


if __name__ == "__main__":
    main()
