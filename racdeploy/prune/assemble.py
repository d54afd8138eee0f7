"""Put pruned blocks and untouched tensors together into one Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.storage.files import atomic_folder
from racdeploy.storage.safetensors import TensorEntry, read_tensor_entries

_COPY_BYTES = 1 << 24  # of a tensor in memory at a time


def assemble(checkpoint: Checkpoint, blocks: Path, out: Path) -> Path:
    """Write ``out``: the checkpoint with pruned weights, and the mean squared inputs, if any."""
    pruned = _read_entries(blocks, "block")
    entries = {name: pruned.get(name, entry) for name, entry in sorted(checkpoint.entries.items())}
    importance = _read_entries(blocks, "importance")

    with atomic_folder(out) as scratch:
        _write(entries, scratch / "model.safetensors")
        if importance:
            _write(importance, scratch / IMPORTANCE_FILE)
        for name in ("config.json", "README.md", "LICENSE", *TOKENIZER_FILES):
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, scratch / name)

    return out


def _read_entries(blocks: Path, kind: str) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in sorted(blocks.glob(f"{kind}-*.safetensors")):
        entries |= read_tensor_entries(file)
    return entries


def _write(entries: Mapping[str, TensorEntry], file: Path) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}

    offset = 0

    for name, entry in entries.items():
        stop = offset + entry.stop - entry.start
        shape = list(entry.shape)
        header[name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes

    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            with entry.file.open("rb") as source:
                source.seek(entry.start)
                left = entry.stop - entry.start

                while left:
                    piece = source.read(min(left, _COPY_BYTES))
                    assert piece, f"{entry.file} shrank while it was read"
                    target.write(piece)
                    left -= len(piece)
