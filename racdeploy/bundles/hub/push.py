"""Upload a bundle to a Hub repository, beside other bundles.

The whole commit is planned first: ``--dry-run`` shows the plan, and a plan that would overwrite
files of another bundle or of other origin is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.bundles.hub.card import CARD_MARK, write_card
from racdeploy.bundles.hub.layout import (
    BUNDLES_FOLDER,
    list_public_paths,
    map_local_files,
    name_bundle,
)
from racdeploy.bundles.hub.remote import HubNotFoundError, HubRepository, HubUnreachableError
from racdeploy.errors import UsageError
from racdeploy.files.reading import read_bytes
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_CARD = "README.md"


@dataclass(frozen=True)
class PushPlan:
    """Plan of a push.

    Args:
        bundle: name of the bundle in the repository.
        contents: files or bytes to write, by path in the repository, the model card first.
        removed: paths of this bundle's previous push that it no longer contains.
        card: README.md of the repository; empty if an existing one of other origin is kept.
        notes: remarks for the user.
    """

    remote: HubRepository
    bundle: str
    contents: Mapping[str, Path | bytes]
    removed: tuple[str, ...]
    card: str
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each file to write in bytes, by path."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.contents.items()
        }


def plan_push(folder: Path, name: str, revision: str, *, ignore_unreachable: bool) -> PushPlan:
    """Plan a push; the repository is read if it exists.

    Args:
        ignore_unreachable: if the Hub cannot be reached, plan as if the repository were empty.

    Raises:
        ArtifactError: the bundle is damaged.
        UsageError: a path in the repository belongs to another bundle or is of other origin.
    """
    remote = HubRepository(name, revision)
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    bundle_name = name_bundle(manifest)
    files = map_local_files(folder, manifest)

    notes = [] if manifest.verdict == "pass" else [f"the bundle's verdict: {manifest.verdict}"]

    remote_files: Mapping[str, RepoSibling] = {}
    other_bundles: dict[str, Manifest] = {}
    try:
        remote_files, other_bundles = remote.files, dict(remote.manifests)
    except (HubNotFoundError, HubUnreachableError) as error:
        if isinstance(error, HubUnreachableError) and not ignore_unreachable:
            raise
        notes.append(f"{error.message}; planned as if it were empty")

    former = other_bundles.pop(bundle_name, None)
    former_paths = list_public_paths(former) if former else set()
    owners = {
        path: name for name, other in other_bundles.items() for path in list_public_paths(other)
    }
    for path in files.keys() & remote_files.keys():
        is_replaceable = (
            path.startswith(f"{BUNDLES_FOLDER}/") or path in former_paths - owners.keys()
        )
        if not is_replaceable and not _is_same(files[path], remote_files[path]):
            whose = f"bundle {owners[path]}" if path in owners else "somebody else"
            raise UsageError(
                "hub-path-taken",
                f"{name} has another {path}, which belongs to {whose}",
                remedy="push to another repository, or remove the file there first",
            )

    # Delete files of the previous push, except those that another bundle shares.
    old = former_paths | {
        path for path in remote_files if path.startswith(f"{BUNDLES_FOLDER}/{bundle_name}/")
    }
    removed = old & remote_files.keys() - owners.keys() - files.keys()

    card = write_card(name, {bundle_name: manifest, **other_bundles})
    if _CARD in remote_files and CARD_MARK not in _read_card(remote):
        notes.append(f"{_CARD} of the repository was not written by racdeploy and is kept")
        card = ""
    contents: dict[str, Path | bytes] = {_CARD: card.encode()} if card else {}
    contents |= files
    return PushPlan(remote, bundle_name, contents, tuple(sorted(removed)), card, tuple(notes))


def push(planned: PushPlan, *, message: str = "", private: bool = False) -> str:
    """Execute a plan in one commit; return the URL of the commit."""
    remote, api = planned.remote, planned.remote.api
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    changes: list[CommitOperationAdd | CommitOperationDelete] = []
    changes += [CommitOperationAdd(path, source) for path, source in planned.contents.items()]
    changes += [CommitOperationDelete(path) for path in planned.removed]
    message = message or f"Add {planned.bundle} with racdeploy"

    def write() -> str:
        api.create_repo(remote.name, private=private, exist_ok=True)
        if remote.revision:
            api.create_branch(remote.name, branch=remote.revision, exist_ok=True)
        branch = remote.revision or None
        made = api.create_commit(remote.name, changes, commit_message=message, revision=branch)
        return str(made.commit_url)

    return remote.call(write, None)


def _read_card(remote: HubRepository) -> str:
    with remote.open_small_files([_CARD]) as folder:
        return read_bytes(folder / _CARD).decode(errors="replace")


def _is_same(source: Path, remote_file: RepoSibling) -> bool:
    if source.stat().st_size != remote_file.size:
        return False
    if remote_file.lfs:
        return file_sha256(source) == remote_file.lfs.sha256

    # A file outside LFS has only its git blob id: SHA-1 over a header and the bytes.
    content = source.read_bytes()
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == remote_file.blob_id
