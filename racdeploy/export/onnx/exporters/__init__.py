"""Programs that write a checkpoint as an ONNX graph in float32: one file each, none of them trusted.

A file holds the members of :class:`Exporter`. The programs run in child processes, on a folder whose ``config.json``
says the same thing to every version of transformers. What comes back counts only after its weights were compared
with the checkpoint and its logits with torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from racdeploy import plugins
from racdeploy.errors import EngineError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.storage import child

__all__ = ["Exporter", "load", "prepare", "run_module"]

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
_FIXED_CONFIG = {"dtype": "float32", "torch_dtype": "float32", "use_cache": True}


class Exporter(Protocol):
    """An exporter, as a module.

    ``refusal`` returns why it cannot export a checkpoint, or an empty string. ``build`` writes the graph of a folder
    that :func:`prepare` made and returns its path. ``source_of`` gives the checkpoint's name of an initializer, from
    its own name and those of the nodes that take it, or an empty string for what the exporter computed.
    """

    def refusal(self, checkpoint: Checkpoint) -> str: ...

    def build(self, prepared: Path, out: Path) -> Path: ...

    def source_of(self, initializer: str, consumers: Sequence[str]) -> str: ...


def load(name: str) -> Exporter:
    """Import the exporter of that name.

    Raises:
        UnknownPluginError: there is no such exporter.
    """
    return cast(Exporter, plugins.load("onnx_exporters", name))


def prepare(checkpoint: Checkpoint, folder: Path) -> Path:
    """Make a folder that transformers 4 reads as the checkpoint is meant, weights by reference; return it.

    transformers 4.57 ignores the rope settings that transformers 5 writes, and would load another model.
    """
    folder.mkdir(parents=True)
    rope = checkpoint.rope
    scaling = (
        None
        if rope["rope_type"] == "default"
        else {k: v for k, v in rope.items() if k != "rope_theta"}
    )
    dropped = {"rope_parameters", "quantization_config", "transformers_version"}
    config = {k: v for k, v in checkpoint.config.items() if k not in dropped}
    config |= _FIXED_CONFIG | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    config["architectures"] = [checkpoint.family.architecture]
    config["tie_word_embeddings"] = checkpoint.tied
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8"
    )
    (folder / "tokenizer.json").symlink_to(checkpoint.tokenizer.file.resolve())
    files = {entry.file for entry in checkpoint.entries.values()}
    index = checkpoint.folder / "model.safetensors.index.json"
    for file in sorted(files | ({index} if index.is_file() else set())):
        (folder / file.name).symlink_to(file.resolve())
    return folder


def run_module(module: str, arguments: Sequence[str], what: str) -> Any:
    """Run a module in a process of its own; return the JSON value of its last line, or None where it is none.

    Raises:
        EngineError: it failed or died; the message holds the last line that it wrote.
    """
    outcome = child.run_module(module, *arguments, variables=_QUIET)
    if outcome.failure:
        raise EngineError(
            f"{what} {outcome.failure}", remedy="free memory, or update it; try the other exporter"
        )
    return outcome.value
