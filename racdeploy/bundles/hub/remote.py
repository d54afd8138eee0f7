"""Access to a Hub repository through huggingface_hub, pinned to one commit.

huggingface_hub finds the access token itself (``hf auth login`` or HF_TOKEN); it is not read here.
"""

from __future__ import annotations

import glob
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import thread as executors
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from racdeploy import __version__
from racdeploy.bundles.hub.layout import BUNDLES_FOLDER
from racdeploy.errors import ArtifactError, EnvironmentFailure, RacdeployError, UsageError
from racdeploy.files.reading import Json
from racdeploy.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from racdeploy.models.sources import check_commit
from racdeploy.plugins import require_package
from racdeploy.runtime.streams import DaemonThreadPool

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

T = TypeVar("T")
_MAX_FILES = 10_000
_MAX_BUNDLES = 100
_MAX_ANSWER = 200  # characters of the Hub's message in an error
# A server that trickles bytes never triggers the client's timeouts, so limit the whole call.
_MAX_WAIT_S = 300.0
_MIN_BYTES_PER_S = 50_000
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MANIFEST = re.compile(rf"{BUNDLES_FOLDER}/([^/]+)/{re.escape(MANIFEST_NAME)}")
_LOG_IN = "hf auth login, or set HF_TOKEN to a token of https://huggingface.co/settings/tokens"


class HubNotFoundError(UsageError):
    """The repository or revision does not exist, or this user may not see it."""


class HubUnreachableError(EnvironmentFailure):
    """The Hub cannot be reached."""


@dataclass(frozen=True)
class HubRepository:
    """A model repository at a revision; an empty revision is the main branch."""

    name: str
    revision: str

    def __post_init__(self) -> None:
        if not _REPOSITORY.fullmatch(self.name):
            raise UsageError(
                "bad-repository-name",
                f"{self.name!r} is not the name of a repository",
                remedy="write ORGANIZATION/NAME, or USER/NAME",
            )

    @property
    def url(self) -> str:
        """URL of the repository for a browser."""
        address = f"{self.api.endpoint}/{self.name}"
        return f"{address}/tree/{self.revision}" if self.revision else address

    @cached_property
    def api(self) -> HfApi:
        """Client of huggingface_hub, which reads HF_ENDPOINT and the user's token."""
        require_package("huggingface_hub")
        import huggingface_hub

        return huggingface_hub.HfApi(library_name="racdeploy", library_version=__version__)

    @cached_property
    def info(self) -> ModelInfo:
        """Listing of the repository; all later reads use its commit."""
        revision = self.revision or None
        options: Json = {"revision": revision, "files_metadata": True}
        info = self.call(lambda: self.api.model_info(self.name, **options))
        check_commit(info.sha, self.name)
        return info

    @cached_property
    def files(self) -> dict[str, RepoSibling]:
        """Files of the repository by path."""
        listed = self.info.siblings or []
        if len(listed) > _MAX_FILES:
            raise ArtifactError("hub-too-large", f"{self.name} has more than {_MAX_FILES:,} files")
        return {str(each.rfilename): each for each in listed}

    def size_of(self, path: str) -> int:
        """Return the listed size of a file in bytes; 0 if the listing has none."""
        size_bytes = self.files[path].size
        return size_bytes if isinstance(size_bytes, int) else 0

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """Manifests of all bundles, by the bundle's name in the repository."""
        paths = {match[1]: match[0] for match in map(_MANIFEST.fullmatch, self.files) if match}
        if len(paths) > _MAX_BUNDLES:
            raise ArtifactError(
                "hub-too-large", f"{self.name} has more than {_MAX_BUNDLES} bundles"
            )

        manifests = {}
        with self.open_small_files(paths.values()) as folder:
            for name, path in paths.items():
                manifests[name] = Manifest.parse(folder / path, f"{self.name}: {path}")
        return manifests

    @contextmanager
    def open_small_files(self, paths: Collection[str]) -> Iterator[Path]:
        """Download small files and yield their temporary folder."""
        for path in paths:
            if self.size_of(path) > MAX_MANIFEST_BYTES:
                raise ArtifactError(
                    "hub-too-large", f"{self.name}: {path} has {self.size_of(path):,} bytes"
                )

        with tempfile.TemporaryDirectory() as folder:
            self.download(paths, Path(folder))
            yield Path(folder)

    def download(self, paths: Collection[str], folder: Path) -> None:
        """Download files into a folder; files of an earlier call are not downloaded again.

        Raises:
            ArtifactError: a file does not have its listed size.
        """
        if not paths:
            return

        # The client takes patterns, and file names may contain wildcards.
        patterns = [glob.escape(path) for path in paths]
        options: Json = {"local_dir": folder, "allow_patterns": patterns}
        commit = self.info.sha
        self.call(
            lambda: self.api.snapshot_download(self.name, revision=commit, **options),
            sum(map(self.size_of, paths)),
        )

        for path in paths:
            file = folder / path
            if not file.is_file() or file.stat().st_size != self.size_of(path):
                file.unlink(missing_ok=True)
                raise ArtifactError(
                    "download-incomplete",
                    f"{self.name}: {path} does not have its listed size of "
                    f"{self.size_of(path):,} bytes",
                    remedy="run the same command again",
                )

    def call(self, call: Callable[[], T], size_bytes: int | None = 0) -> T:
        """Return the result of a client call, with a time limit.

        Args:
            size_bytes: size of the download, which extends the limit; None sets no limit.

        Raises:
            UsageError: the Hub refuses the request.
            EnvironmentFailure: the Hub does not answer in time, or cannot be reached.
        """
        errors = _import_errors()
        limit_s = None if size_bytes is None else _MAX_WAIT_S + size_bytes / _MIN_BYTES_PER_S
        answer = DaemonThreadPool(1).submit(call)
        try:
            return answer.result(limit_s)
        except (errors.HTTPError, errors.EntryNotFoundError, OSError) as error:
            if not answer.done():
                raise EnvironmentFailure(
                    "hub-too-slow",
                    f"the Hub is too slow: {self.name} took more than {limit_s:,.0f} s",
                    remedy="run the same command again: finished files are kept",
                ) from error
            if getattr(error, "errno", None) is not None:  # an error of the disk, not of the Hub
                raise
            raise self._explain(error) from error
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise EnvironmentFailure(
                "hub-answers-oddly",
                f"the Hub at {self.api.endpoint} sent an answer of unknown form",
                remedy="check HF_ENDPOINT, or install a newer huggingface_hub",
            ) from error
        finally:
            if not answer.done():  # too slow, or Ctrl-C
                _leave_threads()

    def _explain(self, raised: BaseException) -> RacdeployError:
        """Return the error that explains a refused or failed request to the user."""
        errors = _import_errors()

        # The HTTP response may be attached to a cause of the raised error.
        error: Any = raised
        while error is not None and getattr(error, "response", None) is None:
            error = error.__cause__
        if error is None:
            return HubUnreachableError(
                "hub-unreachable",
                f"the Hub at {self.api.endpoint} cannot be reached: {type(raised).__name__}",
                remedy="check the network; HF_HUB_OFFLINE must not be set, "
                "HF_ENDPOINT names a mirror",
            )

        status = error.response.status_code
        words = " ".join((error.server_message or "").split())
        answer = "".join(filter(str.isprintable, words))[:_MAX_ANSWER]
        message = f"the Hub answers {status} for {self.name}: {answer}"

        if isinstance(error, errors.GatedRepoError):
            remedy = f"ask for access at {self.api.endpoint}/{self.name}, then {_LOG_IN}"
            return UsageError("hub-gated", message, remedy=remedy)
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            message = f"the Hub has no {self.name}, or does not show it to you: {answer}"
            remedy = f"check the name and --revision; for a private one: {_LOG_IN}"
            return HubNotFoundError("hub-not-found", message, remedy=remedy)
        if status == 401:
            return EnvironmentFailure("hub-login-needed", message, remedy=_LOG_IN)
        if status == 403:
            remedy = "use another token, or a name of your own; hf auth whoami says who you are"
            return UsageError("hub-forbidden", message, remedy=remedy)
        return EnvironmentFailure("hub-failed", message, remedy="try again later")


def _leave_threads() -> None:
    """Let Python end without the client's threads: it waits for those of every executor."""
    queues: dict[threading.Thread, Any] = executors._threads_queues  # type: ignore[assignment]
    for thread in [each for each in queues if each.daemon]:
        del queues[thread]


def _import_errors() -> Any:
    """Return the client's error module; the base of its HTTPError depends on the version."""
    require_package("huggingface_hub")
    import huggingface_hub.errors

    return huggingface_hub.errors
