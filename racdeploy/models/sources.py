"""Sources of models: the embedded one, a local folder, or the Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from racdeploy.errors import EnvironmentFailure, MissingExtraError, ModelError
from racdeploy.files.writing import write_atomic
from racdeploy.models.wrong_input import is_bundle, wrong_folder_error

EMBEDDED = "tiny-reasoner"
_DOWNLOADED_FILES = [
    "*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "README.md",
]  # fmt: skip
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GGUF = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.gguf")


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

    folder = _download_snapshot(model)
    return ResolvedModel(model.partition("/")[2], folder, model, folder.name)


def _group_split_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the GGUF files of language models, parts of a split one together by their stem."""
    parts_by_stem: dict[str, list[str]] = {}
    for name in names:
        match = _GGUF.fullmatch(name)
        if match and ".." not in name and "mmproj" not in name:
            parts_by_stem.setdefault(match[1], []).append(name)
    return parts_by_stem


@cache
def fetch_gguf(source: Path) -> Path:
    """Return the downloaded GGUF file of ``ORG/NAME:QUANT``, of a split model the first.

    Any other path is returned as it is. The quant ends the file's name, in any case.

    Raises:
        ModelError: the repository has no such file, or several.
        EnvironmentFailure: the Hub does not answer, or has no such model.
    """
    named = _HUB_FILE.fullmatch(source.as_posix())
    if named is None or source.exists():
        return source

    model, quant = named.groups()
    with _open_hub(model) as hub:
        info = hub.HfApi().model_info(model)
    commit = check_commit(info.sha, model)

    names = sorted(sibling.rfilename for sibling in info.siblings or ())
    parts_by_stem = _group_split_files(names)
    is_wanted = re.compile(rf"(.*[-./])?{re.escape(quant)}", re.IGNORECASE).fullmatch
    fitting = [parts for stem, parts in parts_by_stem.items() if is_wanted(stem)]
    if len(fitting) != 1:
        quants = sorted({re.split(r"[-./]", stem)[-1] for stem in parts_by_stem})
        raise ModelError(
            "no-such-quant",
            f"{model} has {len(fitting) or 'no'} GGUF files of {quant}",
            remedy=f"it has {', '.join(quants) or 'no GGUF file at all'}",
        )

    patterns = [glob.escape(file) for file in fitting[0]]
    with _open_hub(model) as hub:
        folder = hub.snapshot_download(model, revision=commit, allow_patterns=patterns)
    return Path(folder) / fitting[0][0]


def check_commit(sha: object, model: str) -> str:
    """Return the commit that the Hub names for a repository.

    huggingface_hub makes paths of it, so that ``../../x`` would be written outside of its cache.

    Raises:
        EnvironmentFailure: it is no commit.
    """
    if isinstance(sha, str) and _COMMIT.fullmatch(sha):
        return sha
    raise EnvironmentFailure(
        "hub-answers-oddly",
        f"the Hub names {sha!r:.100} as the commit of {model}",
        remedy="check HF_ENDPOINT, or install a newer huggingface_hub",
    )


def _download_snapshot(model: str) -> Path:
    """Return the folder with a model's files."""
    with _open_hub(model) as hub:
        download = partial(hub.snapshot_download, model, allow_patterns=_DOWNLOADED_FILES)
        try:
            info = hub.HfApi().model_info(model)
        except (hub.errors.HTTPError, OSError):
            # The Hub does not answer, or no longer has the model: an earlier download is used.
            with suppress(hub.errors.LocalEntryNotFoundError):
                return Path(download(local_files_only=True))
            raise

        commit = check_commit(info.sha, model)
        folder = Path(download(revision=commit))
        # As the client records what a branch is, so that it is found without the Hub.
        branch = folder.parents[1] / "refs/main"
        branch.parent.mkdir(exist_ok=True)
        write_atomic(branch, commit)
        return folder


@contextmanager
def _open_hub(model: str) -> Iterator[Any]:
    """Yield the Hub's client; its errors become ours."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "hub") from error

    # Of its HTTP client, which depends on its version.
    http_error = errors.HTTPError  # type: ignore[attr-defined]
    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, http_error)
    try:
        yield hub
    except (errors.HfHubHTTPError, *offline, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EnvironmentFailure(
            "no-model-from-hub",
            f"cannot get {model} from the Hub: {reason}",
            remedy="check the name and the network, or give a local folder",
        ) from error
