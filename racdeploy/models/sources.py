"""Sources of models: the embedded one, a local folder, or the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from racdeploy.errors import EnvironmentFailure, MissingExtraError, ModelError
from racdeploy.models.wrong_input import is_bundle, wrong_folder_error

EMBEDDED = "tiny-reasoner"
_DOWNLOADED_FILES = [
    "*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "README.md",
]  # fmt: skip
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class ResolvedModel:
    """A local model folder; ``origin`` is what the user typed, ``revision`` the Hub's commit."""

    name: str
    folder: Path
    origin: str
    revision: str = ""

    @property
    def is_from_hub(self) -> bool:
        """True if it was downloaded from the Hub."""
        return bool(self.revision)


def resolve_model(model: str) -> ResolvedModel:
    """Find a model by name, folder or Hub id, without loading it.

    Raises:
        ModelError: there is no such folder, or it is a bundle.
        EnvironmentFailure: the Hub does not answer, or has no such model.
    """
    if model == EMBEDDED:
        return ResolvedModel(EMBEDDED, Path(str(files(__package__))) / "tiny_reasoner", EMBEDDED)

    folder = Path(model).expanduser()
    if folder.is_file() or (folder.is_dir() and is_bundle(folder)):
        raise wrong_folder_error(folder)
    if folder.is_dir():
        return ResolvedModel(folder.resolve().name, folder, model)

    # A Hub id is OWNER/NAME, which a mistyped path can be too.
    parent_exists = folder.parent != Path() and folder.parent.is_dir()
    if model.startswith((".", "/", "~")) or not _HUB_ID.match(model) or parent_exists:
        raise ModelError(
            "no-model-folder",
            f"there is no folder {model}",
            remedy=f"give a model folder, a Hub id, or {EMBEDDED!r}",
        )

    return _download(model)


def _download(model: str) -> ResolvedModel:
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "hub") from error

    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    try:
        folder = Path(snapshot_download(model, allow_patterns=_DOWNLOADED_FILES))
    except (errors.HfHubHTTPError, *offline, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EnvironmentFailure(
            "no-model-from-hub",
            f"cannot get {model} from the Hub: {reason}",
            remedy="check the name and the network, or give a local folder",
        ) from error

    return ResolvedModel(model.partition("/")[2], folder, model, folder.name)
