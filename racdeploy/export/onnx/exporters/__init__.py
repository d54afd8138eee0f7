"""Programs that write a checkpoint as an ONNX graph in float32: one file each, none trusted.

A file holds the members of :class:`Exporter`. What comes back counts only after its weights were
compared with the checkpoint and its logits with torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from racdeploy import plugins
from racdeploy.errors import EngineError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.processes import child

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
_BASE_BYTES = 8 * 2**30  # torch, its threads and onnx
_COPIES = 24  # weights of 2 bytes each, in float32
_BASE_SECONDS = 3600  # of processor time
_SECONDS_PER_BYTE = 4e-6
_DROPPED = {"rope_parameters", "quantization_config", "transformers_version"}


class Exporter(Protocol):
    """An exporter, as a module.

    ``PREFERENCE`` is its place in ``auto``, 1 first: the faster its graph, the smaller.
    ``PROVEN`` are the families of which graphs passed; others are tried.
    ``check_environment`` raises an EnvironmentFailure, with its remedy, where what it runs is not
    installed, or not in versions that go together. ``refusal`` returns why it cannot export a
    checkpoint, or an empty string. ``build`` writes the graph of a folder that :func:`prepare`
    made and returns its path; blocks may differ in width, as :mod:`racdeploy.models.widths` says.
    ``source_of`` gives the checkpoint's name of an initializer, from its own name and those of the
    nodes that take it, or an empty string for what the exporter computed.
    """

    PREFERENCE: int
    PROVEN: frozenset[str]

    def check_environment(self) -> None: ...

    def refusal(self, checkpoint: Checkpoint) -> str: ...

    def build(self, prepared: Path, out: Path) -> Path: ...

    def source_of(self, initializer: str, consumers: Sequence[str]) -> str: ...


def load(name: str) -> Exporter:
    """Import the exporter of that name, or raise UnknownPluginError."""
    return cast(Exporter, plugins.load("onnx_exporters", name))


def prepare(checkpoint: Checkpoint, folder: Path) -> Path:
    """Make a folder that transformers 4 and 5 read as the checkpoint is meant; return it.

    Each ignores rope settings of the other's, and would load another model: it has both. Weights
    are linked.
    """
    folder.mkdir(parents=True)
    config = json.dumps(_translate_config(checkpoint))
    (folder / "config.json").write_text(config, encoding="utf-8")

    tokenizer_class = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (folder / "tokenizer_config.json").write_text(tokenizer_class, encoding="utf-8")
    (folder / "tokenizer.json").symlink_to(checkpoint.tokenizer.file.resolve())

    files = {entry.file for entry in checkpoint.entries.values()}
    index = checkpoint.folder / "model.safetensors.index.json"
    if index.is_file():
        files.add(index)

    for file in sorted(files):
        (folder / file.name).symlink_to(file.resolve())

    return folder


def _translate_config(checkpoint: Checkpoint) -> dict[str, Any]:
    shape = checkpoint.shape
    rope = shape.rope
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_plain = rope["rope_type"] == "default"

    kept = {key: value for key, value in shape.config.items() if key not in _DROPPED}
    return kept | {
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if is_plain else scaling,
        "rope_parameters": shape.rope_parameters,
        "architectures": [shape.family.architecture],
        "tie_word_embeddings": checkpoint.tied,
    }


def run_module(module: str, arguments: Sequence[str], what: str, model: Path) -> Any:
    """Run a module in its own process; return the JSON value of its last line, if it is one.

    An EngineError says that it failed or died, with the last line that it wrote. ``model`` is the
    folder that it reads, by whose size its limits grow.
    """
    # What no healthy export comes near: it takes up to 7 float32 copies of the weights.
    size_bytes = sum(file.stat().st_size for file in model.iterdir() if file.is_file())
    seconds = _BASE_SECONDS + int(_SECONDS_PER_BYTE * size_bytes)
    limits = child.Limits(_BASE_BYTES + _COPIES * size_bytes, seconds)
    outcome = child.run_module(module, *arguments, variables=_QUIET, limits=limits)
    if outcome.failure:
        raise EngineError(
            "exporter-failed",
            f"{what} {outcome.failure}",
            remedy="free memory, or update it; try another exporter",
        )
    return outcome.value


def write_graph(
    module: str, arguments: Sequence[str], what: str, prepared: Path, out: Path
) -> Path:
    """Run an exporter as :func:`run_module` does; return its graph, without which it failed."""
    run_module(module, arguments, what, prepared)
    graph = out / "model.onnx"
    if not graph.is_file():
        raise EngineError("no-graph-written", f"{what} ended without an error and without a graph")
    return graph
