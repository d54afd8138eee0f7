"""Download a bundle from a Hub repository and check every hash of its manifest.

Names and sizes are checked before anything is written. Files are downloaded into a hidden folder
beside the requested one, where an interrupted pull resumes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from racdeploy.bundles.hub.layout import map_remote_files
from racdeploy.bundles.hub.remote import HubRepository
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.ownership import restrict_to_owner
from racdeploy.files.writing import atomic_folder, make_parent, require_space
from racdeploy.manifest import MANIFEST_NAME, Manifest


@dataclass(frozen=True)
class PullResult:
    """A downloaded bundle: its folder, its name in the repository, the commit and its size."""

    folder: Path
    bundle: str
    commit: str
    size_bytes: int


def pull(name: str, out: Path | None = None, *, quant: str = "", revision: str = "") -> PullResult:
    """Download one bundle of a repository and check every hash of its manifest.

    Args:
        out: folder to write; by default the repository's name, in the current folder.
        quant: number format or name of the bundle, where there are several.

    Raises:
        ArtifactError: a file differs from the manifest, or its name is not safe to write.
        EnvironmentFailure: the Hub cannot be reached or is too slow, or the disk is too small.
        UsageError: there is no such bundle, or the folder exists and is not empty.
    """
    remote = HubRepository(name, revision)
    out = out or Path(name.partition("/")[2])
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or (out.exists() and not is_empty):
        raise UsageError(
            "output-exists", f"{out} exists", remedy="name another folder with --out, or remove it"
        )

    bundle = _choose(remote, quant)
    manifest = remote.manifests[bundle]
    paths = map_remote_files(bundle, manifest, remote.files)
    size_bytes = sum(map(remote.size_of, paths.values()))

    make_parent(out)
    require_space(out.resolve().parent, size_bytes, "name another place with --out")
    partial = _open_partial(out)
    remote.download(paths.values(), partial)

    # The folder appears complete or not at all. Reading the manifest again proves that the checked
    # one was downloaded. A file that differs is gone with the scratch folder, and so is downloaded
    # again next time.
    with atomic_folder(out) as scratch:
        for file_name, path in paths.items():
            target = scratch / file_name
            target.parent.mkdir(parents=True, exist_ok=True)
            (partial / path).replace(target)
        if Manifest.read(scratch) != manifest:
            raise ArtifactError(
                "hub-changed", f"{remote.name}: {MANIFEST_NAME} of {bundle} changed meanwhile"
            )
        try:
            manifest.check_files(scratch)
        except ArtifactError as error:
            raise ArtifactError(
                error.code,
                f"{remote.name}: {error.message}",
                remedy="run the same command again; if it fails again, the repository is damaged",
            ) from error

    shutil.rmtree(partial)
    return PullResult(out, bundle, str(remote.info.sha), size_bytes)


def _choose(remote: HubRepository, quant: str) -> str:
    """Return the name of the requested bundle."""
    manifests = remote.manifests
    if not manifests:
        reason = "contains no racdeploy bundle"
        if MANIFEST_NAME in remote.files:
            reason = "was not written by racdeploy push"
        raise UsageError(
            "no-bundle-on-hub",
            f"{remote.name} {reason}",
            remedy=f"hf download {remote.name} --local-dir DIR gets its files",
        )

    # An empty --quant matches every bundle, so a single bundle needs no choice.
    fitting = []
    for name, manifest in manifests.items():
        quants = {entry.quant for entry in manifest.artifacts}
        if quant.lower() in {"", name.lower(), *quants}:
            fitting.append(name)
    if len(fitting) == 1:
        return fitting[0]

    listed = "; ".join(
        f"{name} ({manifests[name].artifacts[0].quant})" for name in fitting or manifests
    )
    which = f"{len(fitting)} bundles" if fitting else f"no bundle {quant!r}"
    raise UsageError(
        "hub-bundle-unclear",
        f"{remote.name} has {which}: {listed}",
        remedy="name one with --quant, by its number format or its name",
    )


def _open_partial(out: Path) -> Path:
    """Return the folder for partial downloads, which may contain those of an interrupted pull.

    Its name is predictable, so it is emptied if another user could have written into it.
    """
    partial = out.resolve().with_name(f".{out.name}.pull")
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    partial.mkdir(0o700, exist_ok=True)

    try:
        is_doubtful = restrict_to_owner(partial)
    except PermissionError as error:
        raise UsageError(
            "folder-not-yours",
            f"the download folder belongs to another user: {error}",
            remedy="name another place with --out",
        ) from error

    if is_doubtful or any(path.is_symlink() for path in partial.rglob("*")):
        shutil.rmtree(partial)
        partial.mkdir(0o700)
    return partial
