"""Other programs that run an ONNX bundle, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from racdeploy.exporting import onnx as onnx_format
from racdeploy.manifest import Manifest
from racdeploy.models.checkpoint import Checkpoint
from tests.support.tiny_artifacts import write_bundle

GENAI = """
import json, sys
import onnxruntime_genai as og
folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=len(ids) + count)
generator = og.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(i) for i in generator.get_sequence(0)]))
"""


def write_onnx_bundle(checkpoint: Path, graph: Path) -> Path:
    """Write the bundle of a graph with the files that other programs read, and return it."""
    bundle = write_bundle(checkpoint, {"onnx/model.onnx": graph}, "onnxruntime")
    texts = onnx_format.companions(Manifest.read(bundle), Checkpoint(checkpoint), bundle)
    for name, text in texts.items():
        (bundle / name).write_text(text, encoding="utf-8")
    return bundle


def run(*arguments: object, cwd: Path | None = None) -> Any:
    """Return the JSON in the last line that a program prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
