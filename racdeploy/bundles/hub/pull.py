"""Pull a bundle out of a repository of the Hub: a folder that is whole and as its manifest says.

Names and sizes are looked at before anything is written. Files arrive in a folder beside the one
that is asked for, where an interrupted pull resumes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from racdeploy.bundles.hub.layout import find_files, list_artifacts
from racdeploy.bundles.hub.remote import Remote
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.ownership import shut_off
from racdeploy.files.writing import atomic_folder, file_sha256, make_parent, require_space
from racdeploy.manifest import MANIFEST_NAME, Manifest


@dataclass(frozen=True)
class Pulled:
    """A bundle that was pulled: its folder, its name there, the commit, and how large it is."""

    folder: Path
    bundle: str
    commit: str
    size_bytes: int


def pull(name: str, out: Path | None = None, *, quant: str = "", revision: str = "") -> Pulled:
    """Download one bundle of a repository and check every hash of its manifest.

    Args:
        out: folder to write; by default the repository's name, in the current folder.
        quant: number format or name of the bundle, where there are several.

    Raises:
        ArtifactError: a file is not as its manifest says, or has a name that is not written.
        EnvironmentFailure: the Hub cannot be reached or is too slow, or the disk is too small.
        UsageError: there is no such bundle, or the folder exists.
    """
    remote = Remote(name, revision)
    out = out or Path(name.partition("/")[2])
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or (out.exists() and not is_empty):
        raise UsageError(
            "output-exists", f"{out} exists", remedy="name another folder with --out, or remove it"
        )

    bundle = _choose(remote, quant)
    manifest = remote.manifests[bundle]
    paths = find_files(bundle, manifest, remote.files)
    size_bytes = sum(map(remote.size_of, paths.values()))

    make_parent(out)
    require_space(out.resolve().parent, size_bytes, "name another place with --out")
    partial = _open_partial(out)
    remote.download(paths.values(), partial)
    _check(remote.name, partial, paths, manifest)

    with atomic_folder(out) as scratch:
        for name_there, path in paths.items():
            target = scratch / name_there
            target.parent.mkdir(parents=True, exist_ok=True)
            (partial / path).replace(target)
        if Manifest.read(scratch) != manifest:
            raise ArtifactError(
                "hub-changed", f"{remote.name}: {MANIFEST_NAME} of {bundle} changed meanwhile"
            )

    shutil.rmtree(partial)
    return Pulled(out, bundle, str(remote.info.sha), size_bytes)


def _choose(remote: Remote, quant: str) -> str:
    """Return the name of the bundle that is meant."""
    found = remote.manifests
    if not found:
        why = "holds no bundle of racdeploy"
        if MANIFEST_NAME in remote.files:
            why = "was not written by racdeploy push"
        remedy = f"hf download {remote.name} --local-dir DIR gets its files"
        raise UsageError("no-bundle-on-hub", f"{remote.name} {why}", remedy=remedy)

    fitting = []
    for name, manifest in found.items():
        names = {"", name.lower(), *(entry.quant for entry in manifest.artifacts)}
        if quant.lower() in names:
            fitting.append(name)
    if len(fitting) == 1:
        return fitting[0]

    listed = "; ".join(f"{name} ({found[name].artifacts[0].quant})" for name in fitting or found)
    which = f"{len(fitting)} bundles" if fitting else f"no bundle {quant!r}"
    raise UsageError(
        "hub-bundle-unclear",
        f"{remote.name} has {which}: {listed}",
        remedy="name one with --quant, by its number format or its name",
    )


def _open_partial(out: Path) -> Path:
    """Return the folder in which files arrive, where those of an interrupted pull may lie.

    Anybody can foresee its name, so it counts only if nobody else could have put something there.
    """
    partial = out.resolve().with_name(f".{out.name}.pull")
    if partial.is_symlink() or partial.is_file():
        partial.unlink()
    partial.mkdir(0o700, exist_ok=True)

    try:
        is_doubtful = shut_off(partial)
    except PermissionError as error:
        raise UsageError(
            "folder-not-yours",
            f"files would arrive in a folder that is not yours: {error}",
            remedy="name another place with --out",
        ) from error

    if is_doubtful or any(path.is_symlink() for path in partial.rglob("*")):
        shutil.rmtree(partial)
        partial.mkdir(0o700)
    return partial


def _check(repository: str, folder: Path, paths: dict[str, str], manifest: Manifest) -> None:
    """Compare every file that the manifest names with its hash; what differs is removed."""
    hashes = list_artifacts(manifest)
    for tokenizer in manifest.tokenizers:
        hashes |= tokenizer.files

    for name, sha256 in hashes.items():
        if name not in paths:
            raise ArtifactError(
                "hub-file-missing", f"{repository} lacks {name!r}, which its manifest names"
            )

        file = folder / paths[name]
        if file_sha256(file) != sha256:
            file.unlink()
            raise ArtifactError(
                "hub-file-differs",
                f"{repository}: {paths[name]} differs from its manifest: "
                f"SHA-256 is not {sha256[:16]}…",
                remedy="run the same command again; if it stays so, the repository is damaged",
            )
