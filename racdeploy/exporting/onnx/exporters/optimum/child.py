"""Run optimum's export in a process of its own: PREPARED_FOLDER OUT_FOLDER.

The loader of transformers supports one width for all blocks. If they differ, racdeploy loads the
model, and optimum traces it like any other.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimum.exporters.onnx import main_export, onnx_export_from_model

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint

_TASK = "text-generation-with-past"


def main() -> None:
    """Export one folder."""
    prepared, out = sys.argv[1:]
    checkpoint = Checkpoint(Path(prepared))
    if not checkpoint.shape.is_uniform:
        model = load_model(checkpoint)
        onnx_export_from_model(model, output=out, task=_TASK, do_validation=False, device="cpu")
        return

    main_export(
        prepared,
        output=out,
        task=_TASK,
        framework="pt",
        device="cpu",
        dtype="fp32",
        do_validation=False,
        local_files_only=True,
    )


if __name__ == "__main__":
    main()
