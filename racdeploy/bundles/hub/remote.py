"""A repository of the Hub, through huggingface_hub: listed and read at one commit.

Tokens are found by huggingface_hub alone (``hf auth login`` or HF_TOKEN) and never seen here.
"""

from __future__ import annotations

import glob
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from racdeploy import __version__
from racdeploy.bundles.hub.layout import BUNDLES
from racdeploy.errors import ArtifactError, EnvironmentFailure, RacdeployError, UsageError
from racdeploy.files.reading import Json, read_json
from racdeploy.manifest import MANIFEST_NAME, MOST_MANIFEST_BYTES, Manifest
from racdeploy.plugins import require

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

T = TypeVar("T")
_MAX_FILES = 10_000
_MAX_BUNDLES = 100
_MAX_ANSWER = 200  # characters of the Hub's own words in an error
# A Hub that sends a byte now and then never runs into the client's timeouts.
_MAX_WAIT_S = 300.0
_MIN_BYTES_PER_S = 50_000
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MANIFEST = re.compile(rf"{BUNDLES}/([^/]+)/{re.escape(MANIFEST_NAME)}")
_LOG_IN = "hf auth login, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"


class AbsentError(UsageError):
    """There is no such repository or revision, or it is not shown to this user."""


class UnreachableError(EnvironmentFailure):
    """The Hub does not answer."""


@dataclass(frozen=True)
class Remote:
    """A repository of models at a revision; empty is the main branch."""

    name: str
    revision: str = ""

    def __post_init__(self) -> None:
        if not _REPOSITORY.fullmatch(self.name):
            raise UsageError(
                "bad-repository-name",
                f"{self.name!r} is not the name of a repository",
                remedy="write ORGANIZATION/NAME, or USER/NAME",
            )

    @property
    def url(self) -> str:
        """Where a browser shows it."""
        address = f"{self.api.endpoint}/{self.name}"
        return f"{address}/tree/{self.revision}" if self.revision else address

    @cached_property
    def api(self) -> HfApi:
        """The client, which reads HF_ENDPOINT and the user's token."""
        require("huggingface_hub")
        import huggingface_hub

        return huggingface_hub.HfApi(library_name="racdeploy", library_version=__version__)

    @cached_property
    def info(self) -> ModelInfo:
        """The listing at one commit, at which everything is read."""
        revision = self.revision or None
        options: Json = {"revision": revision, "files_metadata": True}
        return self.ask(lambda: self.api.model_info(self.name, **options))

    @cached_property
    def files(self) -> dict[str, RepoSibling]:
        """Every file by its path."""
        listed = self.info.siblings or []
        if len(listed) > _MAX_FILES:
            raise ArtifactError("hub-too-large", f"{self.name} has more than {_MAX_FILES:,} files")
        return {str(each.rfilename): each for each in listed}

    def size_of(self, path: str) -> int:
        """Return the bytes that a file is listed with; 0 where that is no number."""
        size_bytes = self.files[path].size
        return size_bytes if isinstance(size_bytes, int) else 0

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of every bundle, by its name in the repository."""
        paths = {match[1]: match[0] for match in map(_MANIFEST.fullmatch, self.files) if match}
        if len(paths) > _MAX_BUNDLES:
            raise ArtifactError(
                "hub-too-large", f"{self.name} has more than {_MAX_BUNDLES} bundles"
            )

        manifests = {}
        with self.open_texts(paths.values()) as folder:
            for name, path in paths.items():
                content = read_json(folder / path, MOST_MANIFEST_BYTES, once=True)
                try:
                    manifests[name] = Manifest.model_validate(content)
                except ValidationError as error:
                    first = error.errors()[0]["msg"]
                    message = f"{self.name}: {path} is no manifest: {first}"
                    raise ArtifactError("invalid-manifest", message) from error
        return manifests

    @contextmanager
    def open_texts(self, paths: Collection[str]) -> Iterator[Path]:
        """Yield a folder with small files of the repository."""
        for path in paths:
            if self.size_of(path) > MOST_MANIFEST_BYTES:
                raise ArtifactError(
                    "hub-too-large", f"{self.name}: {path} has {self.size_of(path):,} bytes"
                )

        with tempfile.TemporaryDirectory() as folder:
            self.download(paths, Path(folder))
            yield Path(folder)

    def download(self, paths: Collection[str], folder: Path) -> None:
        """Write files below a folder, where what an earlier call has left is not asked for again.

        Raises:
            ArtifactError: a file has not the size that is listed.
        """
        if not paths:
            return

        patterns = [glob.escape(path) for path in paths]
        options: Json = {"local_dir": folder, "allow_patterns": patterns}
        commit = self.info.sha
        self.ask(
            lambda: self.api.snapshot_download(self.name, revision=commit, **options),
            sum(map(self.size_of, paths)),
        )

        for path in paths:
            file = folder / path
            if not file.is_file() or file.stat().st_size != self.size_of(path):
                file.unlink(missing_ok=True)
                raise ArtifactError(
                    "download-incomplete",
                    f"{self.name}: {path} did not arrive with the {self.size_of(path):,} bytes "
                    "that are listed",
                    remedy="run the same command again",
                )

    def ask(self, call: Callable[[], T], size_bytes: int | None = 0) -> T:
        """Return what a call of the client gives, in a limited time.

        Args:
            size_bytes: what is downloaded; None waits for ever.

        Raises:
            UsageError: the Hub refuses it.
            EnvironmentFailure: the Hub does not answer, in time or at all.
        """
        errors = _import_errors()
        limit_s = None if size_bytes is None else _MAX_WAIT_S + size_bytes / _MIN_BYTES_PER_S
        answer: Future[T] = Future()

        def settle() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                answer.set_exception(error)

        threading.Thread(target=settle, daemon=True).start()
        try:
            return answer.result(limit_s)
        except (errors.HTTPError, errors.EntryNotFoundError, OSError) as error:
            if not answer.done():
                raise EnvironmentFailure(
                    "hub-too-slow",
                    f"the Hub is too slow: {self.name} took more than {limit_s:,.0f} s",
                    remedy="run the same command again: what has arrived is kept",
                ) from error
            if getattr(error, "errno", None) is not None:  # the disk's
                raise
            raise self._explain(error) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise EnvironmentFailure(
                "hub-answers-oddly",
                f"the Hub at {self.api.endpoint} answers in an unknown form",
                remedy="check HF_ENDPOINT, or install a newer huggingface_hub",
            ) from error

    def _explain(self, raised: BaseException) -> RacdeployError:
        """Return what a refusal of the Hub, or its silence, means for a user."""
        errors = _import_errors()

        # The Hub's answer is that of the error, or of what it came of.
        error: Any = raised
        while error is not None and getattr(error, "response", None) is None:
            error = error.__cause__
        if error is None:
            return UnreachableError(
                "hub-unreachable",
                f"the Hub at {self.api.endpoint} cannot be reached: {type(raised).__name__}",
                remedy="check the network; HF_HUB_OFFLINE must not be set, "
                "HF_ENDPOINT names a mirror",
            )

        status = error.response.status_code
        words = " ".join((error.server_message or "").split())
        said = "".join(filter(str.isprintable, words))[:_MAX_ANSWER]
        message = f"the Hub answers {status} for {self.name}: {said}"

        if isinstance(error, errors.GatedRepoError):
            remedy = f"ask for access at {self.api.endpoint}/{self.name}, then {_LOG_IN}"
            return UsageError("hub-gated", message, remedy=remedy)
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            message = f"the Hub has no {self.name}, or does not show it to you: {said}"
            remedy = f"check the name and --revision; for a private one: {_LOG_IN}"
            return AbsentError("hub-not-found", message, remedy=remedy)
        if status == 401:
            return EnvironmentFailure("hub-login-needed", message, remedy=_LOG_IN)
        if status == 403:
            remedy = "use another token, or a name of your own; hf auth whoami says who you are"
            return UsageError("hub-forbidden", message, remedy=remedy)
        return EnvironmentFailure("hub-failed", message, remedy="try again later")


def _import_errors() -> Any:
    """Return the client's errors: which of them HTTPError is depends on its version."""
    require("huggingface_hub")
    import huggingface_hub.errors

    return huggingface_hub.errors
