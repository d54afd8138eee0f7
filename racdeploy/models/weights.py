"""The tensors that a model folder stores: in one file of safetensors, or in shards by an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from racdeploy.errors import ModelError
from racdeploy.files.reading import read_json
from racdeploy.models.foreign_code import refuse_weights
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries


def read_entries(folder: Path) -> Mapping[str, TensorEntry]:
    """Return every tensor of a folder by name, without its values.

    Raises:
        ModelError: there is none, or the index names what is not there.
    """
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if not index.is_file():
        if not whole.is_file():
            raise refuse_weights(folder)
        return read_tensor_entries(whole)

    weight_map = read_json(index, once=True).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ModelError(
            "damaged-index", f"{index} has no weight_map", remedy="copy or download it again"
        )

    entries: dict[str, TensorEntry] = {}

    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise ModelError(
                "shard-outside-folder", f"{index} names a file outside the folder: {name!r}"
            )
        if not name.endswith(".safetensors"):
            raise ModelError(
                "damaged-index",
                f"{index} names {name!r}, and weights are read from safetensors alone",
                remedy="copy or download the model again",
            )
        entries.update(read_tensor_entries(folder / name))

    if missing := sorted(set(weight_map) - set(entries)):
        raise ModelError(
            "missing-tensors", f"{index} names tensors that no shard holds: {missing[:3]}"
        )

    return entries
