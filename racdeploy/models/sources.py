"""Where a model comes from: the embedded one, a local folder, or the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from racdeploy.errors import EnvironmentFailure, MissingExtraError, ModelError

EMBEDDED = "tiny-reasoner"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class ResolvedModel:
    """A local model folder.

    Args:
        name: short name for files and reports.
        folder: where it is.
        origin: what the user typed.
        revision: commit on the Hub, or empty.
    """

    name: str
    folder: Path
    origin: str
    revision: str = ""

    @property
    def on_hub(self) -> bool:
        """Whether it was taken from the Hub."""
        return bool(self.revision)


def resolve(model: str) -> ResolvedModel:
    """Find a model without loading it.

    Raises:
        ModelError: neither a folder nor something that can be a Hub id.
        EnvironmentFailure: the Hub cannot be reached, or does not have it.
    """
    if model == EMBEDDED:
        return ResolvedModel(EMBEDDED, Path(str(files(__package__))) / "tiny_reasoner", EMBEDDED)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return ResolvedModel(folder.resolve().name, folder, model)
    if folder.is_file():
        raise ModelError(
            f"{model} is a file, not a model folder",
            remedy="give the folder that holds config.json",
        )
    looks_local = (
        model.startswith((".", "/", "~"))
        or not _HUB_ID.match(model)
        or (folder.parent.is_dir() and folder.parent != Path())
    )
    if looks_local:
        raise ModelError(
            f"there is no folder {model}", remedy=f"give a model folder, a Hub id, or {EMBEDDED!r}"
        )
    return _download(model)


def _download(model: str) -> ResolvedModel:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
        )
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "prune") from error
    wanted = [
        "*.json",
        "*.safetensors",
        "*.jinja",
        "*.txt",
        "tokenizer.model",
        "LICENSE*",
        "README.md",
    ]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentFailure(
            f"cannot get {model} from the Hub: {first}",
            remedy="check the name and the network, or give a local folder",
        ) from error
    return ResolvedModel(model.partition("/")[2], folder, model, folder.name)
