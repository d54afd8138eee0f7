"""A repository of the Hub, through huggingface_hub: listed, read, written, and its refusals.

Tokens are found by huggingface_hub alone (``hf auth login`` or HF_TOKEN) and never seen here.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from racdeploy import __version__
from racdeploy.bundles.hub.layout import BUNDLES, list_bundles
from racdeploy.errors import (
    ArtifactError,
    EnvironmentFailure,
    RacdeployError,
    UsageError,
)
from racdeploy.manifest import MANIFEST_NAME, MOST_MANIFEST_BYTES, Manifest
from racdeploy.plugins import require
from racdeploy.storage.reading import read_bytes, read_json

_MOST_FILES = 10_000
_MOST_BUNDLES = 100
_LARGEST_TEXT = 16 << 20  # bytes of a manifest or a card
_LONGEST_ANSWER = 200  # characters of the Hub's own words in an error
_LOG_IN = "hf auth login, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"


class AbsentError(UsageError):
    """There is no such repository, or it is not shown to this user."""


class UnreachableError(EnvironmentFailure):
    """The Hub does not answer."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and the SHA-256 of a large one or the id that git has."""

    size_bytes: int
    sha256: str
    git_id: str


@dataclass(frozen=True)
class Remote:
    """A repository of models at a revision; empty is the main branch."""

    name: str
    revision: str = ""

    @property
    def url(self) -> str:
        """Where a browser shows it."""
        address = f"{self.api.endpoint}/{self.name}"
        if not self.revision:
            return address
        return f"{address}/tree/{self.revision}"

    @cached_property
    def api(self) -> Any:
        """The client, which reads HF_ENDPOINT and the user's token."""
        hub = _import_hub()
        return hub.HfApi(library_name="racdeploy", library_version=__version__)

    @cached_property
    def commit(self) -> str:
        """The commit that the revision is at; everything is read there."""
        revision = self.revision or None
        with self._refusals("read"):
            info = self.api.repo_info(self.name, revision=revision)

        return str(info.sha)

    @cached_property
    def files(self) -> dict[str, RemoteFile]:
        """Every file by its path; what a repository has no use for is refused."""
        found: dict[str, RemoteFile] = {}
        commit = self.commit

        with self._refusals("read"):
            for entry in self.api.list_repo_tree(self.name, revision=commit, recursive=True):
                if not hasattr(entry, "size"):
                    continue  # a folder

                sha256 = entry.lfs.sha256 if entry.lfs else ""
                found[entry.path] = RemoteFile(int(entry.size), sha256, entry.blob_id)
                if len(found) > _MOST_FILES:
                    raise ArtifactError(f"{self.name} has more than {_MOST_FILES:,} files")
        return found

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of every bundle, by its name in the repository."""
        names = list_bundles(self.files)
        if len(names) > _MOST_BUNDLES:
            raise ArtifactError(f"{self.name} has more than {_MOST_BUNDLES} bundles")

        found = {}
        for name in names:
            path = f"{BUNDLES}/{name}/{MANIFEST_NAME}"
            with self._text(path) as file:
                try:
                    found[name] = Manifest.model_validate(
                        read_json(file, MOST_MANIFEST_BYTES, once=True)
                    )
                except ValidationError as error:
                    first = error.errors()[0]["msg"]
                    raise ArtifactError(f"{self.name}: {path} is no manifest: {first}") from error
        return found

    def read_text(self, path: str) -> str:
        """Return a small text; what is not UTF-8 is replaced."""
        with self._text(path) as file:
            return read_bytes(file).decode("utf-8", errors="replace")

    def download(self, path: str, folder: Path) -> Path:
        """Write a file below a folder, resuming what an interrupted call has left there."""
        with self._refusals("read"):
            return Path(
                self.api.hf_hub_download(self.name, path, revision=self.commit, local_dir=folder)
            )

    def create(self, private: bool) -> None:
        """Make the repository and the branch where there are none."""
        with self._refusals("write"):
            self.api.create_repo(self.name, private=private, exist_ok=True)
            if self.revision:
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)

    def write(self, files: Mapping[str, Path | bytes], removed: Sequence[str], message: str) -> str:
        """Add and remove files in one commit; return its address."""
        hub = _import_hub()
        changes = [
            hub.CommitOperationAdd(path, str(source) if isinstance(source, Path) else source)
            for path, source in files.items()
        ]
        changes += [hub.CommitOperationDelete(path) for path in removed]

        with self._refusals("write"):
            revision = self.revision or None
            made = self.api.create_commit(
                self.name, changes, commit_message=message, revision=revision
            )
        return str(made.commit_url)

    def collect(self, slug: str) -> None:
        """Put the repository into a collection."""
        with self._refusals("write", f"collection {slug}"):
            self.api.add_collection_item(slug, self.name, "model", exists_ok=True)

    @contextlib.contextmanager
    def _text(self, path: str) -> Iterator[Path]:
        size_bytes = self.files[path].size_bytes
        if size_bytes > _LARGEST_TEXT:
            raise ArtifactError(f"{self.name}: {path} has {size_bytes:,} bytes, which is too much")

        with tempfile.TemporaryDirectory() as folder:
            yield self.download(path, Path(folder))

    @contextlib.contextmanager
    def _refusals(self, purpose: str, what: str = "") -> Iterator[None]:
        """Turn what the Hub answers, or that it does not, into our errors."""
        errors = _import_hub().errors
        what = what or self.name
        try:
            yield
        except errors.LocalTokenNotFoundError as error:
            raise EnvironmentFailure("nobody is logged in to the Hub", remedy=_LOG_IN) from error
        except (errors.HTTPError, errors.EntryNotFoundError, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's
                raise
            raise self._explain(error, purpose, what) from error

    def _explain(self, raised: BaseException, purpose: str, what: str) -> RacdeployError:
        error = _find_answer(raised)
        if error is None:
            return UnreachableError(
                f"the Hub at {self.api.endpoint} cannot be reached: {type(raised).__name__}",
                remedy="check the network; HF_HUB_OFFLINE must not be set, "
                "HF_ENDPOINT names a mirror",
            )

        status = error.response.status_code
        said = _one_line(error.server_message or "")
        why = f": {said}" if said else ""
        errors = _import_hub().errors

        if isinstance(error, errors.GatedRepoError):
            remedy = f"ask for access at {self.api.endpoint}/{self.name}, then {_LOG_IN}"
            return UsageError(f"{what} is gated, and you have no access{why}", remedy=remedy)
        if isinstance(error, errors.RevisionNotFoundError):
            return UsageError(f"{what} has no revision {self.revision!r}")

        if status == 401 and purpose == "write":
            return EnvironmentFailure(f"the Hub does not accept your token{why}", remedy=_LOG_IN)
        if status in (401, 404):
            return AbsentError(
                f"the Hub has no {what}, or does not show it to you{why}",
                remedy=f"check the name; for a private one: {_LOG_IN}",
            )
        if status == 403:
            remedy = (
                "use a token that may write, or a name of your own; hf auth whoami says who you are"
            )
            return UsageError(f"you may not {purpose} {what}{why}", remedy=remedy)

        remedy = "try again later" if status >= 500 or status == 429 else "see the Hub's answer"
        return EnvironmentFailure(f"the Hub answers {status} for {what}{why}", remedy=remedy)


def _import_hub() -> ModuleType:
    require("huggingface_hub")
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub


def _find_answer(error: BaseException | None) -> Any:
    """Return the error that has the Hub's answer: this one, or what it came of; None without."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error
        error = error.__cause__
    return None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    letters = filter(str.isprintable, line)
    return "".join(letters)[:_LONGEST_ANSWER]
