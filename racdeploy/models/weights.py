"""The tensors of a model folder, in one safetensors file or in shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from racdeploy.errors import ModelError
from racdeploy.files.reading import read_json
from racdeploy.models.remote_code import no_safetensors_error
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries


def read_entries(folder: Path) -> Mapping[str, TensorEntry]:
    """Return every tensor of a folder by name, without its values.

    Raises:
        ModelError: there is no safetensors file, or the index names missing files or tensors.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise no_safetensors_error(folder)
        return read_tensor_entries(single)

    weight_map = read_json(index, strict=True).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ModelError(
            "damaged-index", f"{index} has no weight_map", remedy="copy or download it again"
        )

    # Names in the index come from a stranger: no path may lead out of the folder.
    entries: dict[str, TensorEntry] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise ModelError(
                "shard-outside-folder", f"{index} names a file outside the folder: {name!r}"
            )
        if not name.endswith(".safetensors"):
            raise ModelError(
                "damaged-index",
                f"{index} names {name!r}, and weights are read from safetensors only",
                remedy="copy or download the model again",
            )
        entries.update(read_tensor_entries(folder / name))

    if missing := sorted(set(weight_map) - set(entries)):
        raise ModelError(
            "missing-tensors", f"{index} names tensors that no shard holds: {missing[:3]}"
        )

    return entries
