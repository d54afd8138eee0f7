"""Remote code of a model folder: it is reported, and never run.

``auto_map`` in a config names Python files that transformers imports with ``trust_remote_code``.
Weights in torch's older form are a pickle, which calls functions when it is read.
Source: transformers' "Custom models"; the warning in Python's documentation of pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from racdeploy.errors import ModelError
from racdeploy.models.config_schema import Config

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_MAX_NAME_LENGTH = 60
_MAX_NAMES = 3
_CONVERT = (
    "convert it, in a container unless you trust its author: "
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('%s', "
    "torch_dtype='auto').save_pretrained('converted')\", copy the tokenizer's files there too, "
    "and give converted"
)


def list_remote_code(config: Config) -> str:
    """Return the Python files that a config's ``auto_map`` names, or an empty string."""
    mapped = config.get("auto_map")
    if not mapped:
        return ""

    names = list(dict.fromkeys(name[:_MAX_NAME_LENGTH] for name in _list_files(mapped)))
    more = ["…"] if len(names) > _MAX_NAMES else []
    return ", ".join(names[:_MAX_NAMES] + more) or "auto_map"


def _list_files(mapped: object) -> Iterator[str]:
    """Yield ``FILE.py`` of every ``FILE.Class``; a tokenizer has a list of two, None among them."""
    values = mapped.values() if isinstance(mapped, dict) else [mapped]
    for value in values:
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                yield f"{name.rpartition('.')[0] or name}.py"


def no_safetensors_error(folder: Path) -> ModelError:
    """Return the error for a folder without safetensors, with how to convert its weights."""
    missing = f"{folder} has no model.safetensors"
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _PICKLES)
    if not pickles:
        return ModelError(
            "no-weights",
            missing,
            remedy="copy or download it again; weights are read from safetensors only",
        )

    # A pickle is not opened, not even to convert it: that runs the code in it.
    more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
    return ModelError(
        "pickled-weights",
        f"{missing}: its weights are in {pickles[0][:_MAX_NAME_LENGTH]}{more}, a pickle, "
        "which can run code when it is read and is not opened",
        remedy=_CONVERT % folder,
    )
