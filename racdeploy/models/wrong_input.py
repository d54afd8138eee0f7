"""Errors for input that is not a model folder: a bundle, an adapter, or a GGUF file.

Source: peft's ``adapter_config.json``; GGUF files begin with the four letters.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.errors import ModelError
from racdeploy.files.reading import read_json

_BUNDLE, _ADAPTER, _CONFIG = "racdeploy.json", "adapter_config.json", "config.json"
_MERGE = (
    "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('%s')"
    ".merge_and_unload().save_pretrained('merged')\", copy the tokenizer's files there too, "
    "and give merged"
)


def is_bundle(folder: Path) -> bool:
    """Return True if ``racdeploy build`` wrote a folder."""
    return (folder / _BUNDLE).is_file()


def wrong_folder_error(path: Path) -> ModelError:
    """Return the error for a file or folder that is not a model, with the next step."""
    if path.is_file():
        return _refuse_file(path)
    if is_bundle(path):
        return ModelError(
            "bundle-not-model",
            f"{path} is a bundle: its model is pruned and exported already",
            remedy=f'racdeploy run {path} "…" asks it, racdeploy verify {path} tests it; '
            "to prune again, give the dense model's folder or Hub id",
        )
    if (path / _ADAPTER).is_file():
        base = read_json(path / _ADAPTER).get("base_model_name_or_path")
        base_note = f" of {base}" if base else ""
        return ModelError(
            "adapter-not-model",
            f"{path} is a LoRA adapter{base_note}, not a whole model",
            remedy=f"merge it first: {_MERGE % path}",
        )

    return _refuse_folder(path)


def _refuse_file(file: Path) -> ModelError:
    with file.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"

    if is_gguf or file.suffix == ".gguf":
        return ModelError(
            "gguf-not-model",
            f"{file} is a GGUF file, which can be run but no longer pruned",
            remedy="give the Hugging Face folder or Hub id that it was made from; "
            f"racdeploy inspect {file} shows what is in it",
        )

    return ModelError(
        "no-model-folder",
        f"{file} is a file, not a model folder",
        remedy=f"give the folder that holds config.json, as {file.parent}/",
    )


def _refuse_folder(folder: Path) -> ModelError:
    remedy = "give the folder that save_pretrained wrote"
    message = f"{folder} is not a model folder: it has no {_CONFIG}"
    if not any(folder.iterdir()):
        message += ", it is empty"
        remedy += ", or a Hub id"
    elif inside := sorted(file.parent for file in folder.glob(f"*/{_CONFIG}")):
        remedy = f"give the folder in it that has one: {inside[-1]}"
    elif any(folder.glob("*.gguf")):
        message += ", but GGUF files, which can be run but no longer pruned"
        remedy = "give the Hugging Face folder or Hub id that they were made from"
    return ModelError("no-config", message, remedy=remedy)
