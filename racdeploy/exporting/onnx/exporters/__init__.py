"""Exporters: programs that write a checkpoint as an ONNX graph in float32, one file each.

A module has the members of :class:`Exporter`. None is trusted: a graph is used only after its
weights were compared with the checkpoint and its logits with torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from racdeploy import plugins
from racdeploy.errors import EngineError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.processes import child_process
from racdeploy.tensors.safetensors import write_entries

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
_BASE_BYTES = 8 * 2**30  # torch, its threads and onnx
_BYTES_PER_WEIGHT = 48  # far above the needs of a healthy export: up to 7 float32 copies
_BASE_SECONDS = 3600  # of processor time
_SECONDS_PER_WEIGHT = 8e-6
_DROPPED = {"rope_parameters", "quantization_config", "transformers_version"}


class Exporter(Protocol):
    """An exporter, as a module.

    ``PREFERENCE`` is its position in ``auto``, 1 first: those with faster graphs come first.
    ``TESTED_FAMILIES`` are the families whose graphs passed; others are tried.
    ``check_environment`` raises an EnvironmentFailure with its remedy if its packages are not
    installed, or in versions that do not work together. ``unsupported_reason`` returns why it
    cannot export a checkpoint, or an empty string. ``build`` writes the graph of a folder made by
    :func:`prepare` and returns its path; blocks may differ in width, see
    :mod:`racdeploy.models.widths`.
    """

    PREFERENCE: int
    TESTED_FAMILIES: frozenset[str]

    def check_environment(self) -> None: ...

    def unsupported_reason(self, checkpoint: Checkpoint) -> str: ...

    def build(self, prepared: Path, out: Path) -> Path: ...


def load(name: str) -> Exporter:
    """Import the exporter of that name, or raise UnknownPluginError."""
    return cast(Exporter, plugins.load("onnx_exporters", name))


def prepare(checkpoint: Checkpoint, folder: Path) -> Path:
    """Make a folder that both transformers 4 and 5 read correctly, and return it.

    Its config has the rope settings of both, since each ignores those of the other and would load
    another model. Weights are linked, not copied, unless they are codes.
    """
    folder.mkdir(parents=True)

    shape = checkpoint.shape
    rope = shape.rope
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_plain = rope["rope_type"] == "default"

    written = checkpoint.transformers_config.items()
    kept = {key: value for key, value in written if key not in _DROPPED}
    config = json.dumps(
        kept
        | {
            "dtype": "float32",
            "torch_dtype": "float32",
            "use_cache": True,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if is_plain else scaling,
            "rope_parameters": shape.rope_parameters,
            "architectures": [shape.family.architecture],
            "tie_word_embeddings": checkpoint.tied,
        }
    )

    (folder / "config.json").write_text(config, encoding="utf-8")

    tokenizer_class = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (folder / "tokenizer_config.json").write_text(tokenizer_class, encoding="utf-8")
    (folder / "tokenizer.json").symlink_to(checkpoint.tokenizer.file.resolve())

    if checkpoint.coded and checkpoint.shape.is_uniform:  # transformers reads no codes
        write_entries(checkpoint.entries, folder / "model.safetensors")
        return folder

    files = {entry.file for entry in checkpoint.entries.values()}
    index = checkpoint.folder / "model.safetensors.index.json"
    if index.is_file():
        files.add(index)

    for file in sorted(files):
        (folder / file.name).symlink_to(file.resolve())

    return folder


def run_module(module: str, arguments: Sequence[object], program: str, model: Path) -> Any:
    """Run a module in its own process; return the JSON value of its last line, or None.

    Args:
        program: name of the program in error messages.
        model: folder that it reads; memory and time limits grow with its size.

    Raises:
        EngineError: it failed or died; with the last line that it wrote.
    """
    weights = Checkpoint(model).parameters
    seconds = _BASE_SECONDS + int(_SECONDS_PER_WEIGHT * weights)
    limits = child_process.ProcessLimits(_BASE_BYTES + _BYTES_PER_WEIGHT * weights, seconds)
    outcome = child_process.run_module(module, *arguments, variables=_QUIET, limits=limits)
    if outcome.failure:
        raise EngineError(
            "exporter-failed",
            f"{program} {outcome.failure}",
            remedy="free memory, or update it; try another exporter",
        )
    return outcome.value


def write_graph(
    module: str, program: str, prepared: Path, out: Path, arguments: Sequence[object] = ()
) -> Path:
    """Run an exporter as :func:`run_module` does; return its graph, or raise an EngineError.

    ``arguments``: by default the two folders.
    """
    run_module(module, arguments or (prepared, out), program, prepared)
    graph = out / "model.onnx"
    if not graph.is_file():
        raise EngineError(
            "no-graph-written", f"{program} ended without an error and without a graph"
        )
    return graph
