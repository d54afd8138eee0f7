"""Pull a bundle out of a repository of the Hub: a folder that is whole and as its manifest says.

Names and sizes are looked at before anything is written. Files arrive in a folder beside the one
that is asked for, where an interrupted pull resumes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from racdeploy.bundles.hub.layout import check_repository, list_artifacts, place_in_bundle
from racdeploy.bundles.hub.remote import Remote
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.manifest import MANIFEST_NAME, Manifest
from racdeploy.storage.files import atomic_folder, file_sha256, make_parent, require_space
from racdeploy.storage.ownership import shut_off


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
        UsageError: there is no such bundle, or the folder exists.
    """
    remote = Remote(check_repository(name), revision)
    out = out or Path(name.partition("/")[2])
    _refuse_existing(out)

    bundle = _choose(remote, quant)
    manifest = remote.manifests[bundle]
    places = place_in_bundle(bundle, manifest, remote.files)
    size_bytes = sum(remote.files[path].size_bytes for path in places.values())

    make_parent(out)
    require_space(out.resolve().parent, size_bytes, "name another place with --out")
    arrived = _open_partial(out)
    for path in sorted(places.values()):
        _download(remote, path, arrived)

    _check(remote, arrived, places, manifest)
    with atomic_folder(out) as scratch:
        for place, path in places.items():
            target = scratch / place
            target.parent.mkdir(parents=True, exist_ok=True)
            (arrived / path).replace(target)
        Manifest.read(scratch).check_files(scratch)

    shutil.rmtree(arrived)
    return Pulled(out, bundle, remote.commit, size_bytes)


def _refuse_existing(out: Path) -> None:
    empty = out.is_dir() and not any(out.iterdir())

    if out.is_symlink() or (out.exists() and not empty):
        raise UsageError(f"{out} exists", remedy="name another folder with --out, or remove it")


def _choose(remote: Remote, quant: str) -> str:
    """Return the name of the bundle that is meant."""
    found = remote.manifests
    if not found:
        plain = MANIFEST_NAME in remote.files
        remedy = f"hf download {remote.name} --local-dir DIR gets its files"
        why = "was not written by racdeploy push" if plain else "holds no bundle of racdeploy"
        raise UsageError(f"{remote.name} {why}", remedy=remedy)

    wanted = quant.lower()
    fitting = []
    for name, manifest in found.items():
        quants = {entry.quant for entry in manifest.artifacts}
        if not wanted or wanted == name.lower() or wanted in quants:
            fitting.append(name)

    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"{name} ({found[name].artifacts[0].quant})" for name in fitting or found)
    which = f"{len(fitting)} bundles" if fitting else f"no bundle {quant!r}"
    raise UsageError(
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
            f"files would arrive in a folder that is not yours: {error}",
            remedy="name another place with --out",
        ) from error

    if is_doubtful or any(path.is_symlink() for path in partial.rglob("*")):
        shutil.rmtree(partial)
        partial.mkdir(0o700)
    return partial


def _download(remote: Remote, path: str, folder: Path) -> None:
    """Get a file, and compare its size with the one that was listed."""
    listed = remote.files[path]
    got = remote.download(path, folder)
    if got.stat().st_size != listed.size_bytes:
        size_bytes = got.stat().st_size
        got.unlink()
        raise ArtifactError(
            f"{remote.name}: {path} has {size_bytes:,} bytes, listed are {listed.size_bytes:,}",
            remedy="run the same command again",
        )


def _check(remote: Remote, folder: Path, places: Mapping[str, str], manifest: Manifest) -> None:
    """Compare every file that the manifest names with its hash; what differs is removed."""
    hashes = list_artifacts(manifest)
    for tokenizer in manifest.tokenizers:
        hashes |= tokenizer.files

    for place, sha256 in hashes.items():
        if place not in places:
            raise ArtifactError(f"{remote.name} lacks {place!r}, which its manifest names")

        file = folder / places[place]
        if file_sha256(file) != sha256:
            file.unlink()
            raise ArtifactError(
                f"{remote.name}: {places[place]} differs from its manifest: "
                f"SHA-256 is not {sha256[:16]}…",
                remedy="run the same command again; if it stays so, the repository is damaged",
            )
