"""Push a bundle into a repository of the Hub, beside the ones that are there.

All that will be written is known before anything is: a plan is shown by ``--dry-run``, and refused
where it would change what another bundle or somebody else has put there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.bundles.hub.card import MARK, write_card
from racdeploy.bundles.hub.layout import BUNDLES, lay_out, list_public, name_bundle
from racdeploy.bundles.hub.remote import AbsentError, Remote, UnreachableError
from racdeploy.errors import UsageError
from racdeploy.files.reading import read_bytes
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_CARD = "README.md"


@dataclass(frozen=True)
class Push:
    """What a push will do.

    Args:
        bundle: its name in the repository.
        contents: everything that is written, by its path, the card first: files, or bytes.
        removed: paths of this bundle's last push that are no longer in it.
        card: README.md of the repository; empty where somebody else's stays.
        notes: what a user should know beside it.
    """

    remote: Remote
    bundle: str
    contents: Mapping[str, Path | bytes]
    removed: tuple[str, ...]
    card: str
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of everything that is written, by its path."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.contents.items()
        }


def plan_push(folder: Path, name: str, revision: str, *, blind: bool) -> Push:
    """Return what a push would do; the repository is looked at, and need not exist.

    Args:
        blind: plan also where the Hub cannot be reached, as if the repository were empty.

    Raises:
        ArtifactError: the bundle is damaged.
        UsageError: a path in the repository is another bundle's or somebody else's.
    """
    remote = Remote(name, revision)
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    own = name_bundle(manifest)
    files = lay_out(folder, manifest)

    notes = [] if manifest.verdict == "pass" else [f"the bundle's verdict: {manifest.verdict}"]

    there: Mapping[str, RepoSibling] = {}
    others: dict[str, Manifest] = {}
    try:
        there, others = remote.files, dict(remote.manifests)
    except (AbsentError, UnreachableError) as error:
        if isinstance(error, UnreachableError) and not blind:
            raise
        notes.append(f"{error.message}; planned as if it were empty")

    former = others.pop(own, None)
    mine = list_public(former) if former else set()
    owners = {path: name for name, other in others.items() for path in list_public(other)}
    for path in files.keys() & there.keys():
        is_mine = path.startswith(f"{BUNDLES}/") or path in mine - owners.keys()
        if not is_mine and not _is_same(files[path], there[path]):
            whose = f"bundle {owners[path]}" if path in owners else "somebody else"
            raise UsageError(
                "hub-path-taken",
                f"{name} has another {path}, which belongs to {whose}",
                remedy="push to another repository, or remove the file there first",
            )

    # Of the last push, what no other bundle has too.
    old = mine | {path for path in there if path.startswith(f"{BUNDLES}/{own}/")}
    removed = old & there.keys() - owners.keys() - files.keys()

    card = write_card(name, {own: manifest, **others})
    if _CARD in there and MARK not in _read_card(remote):
        notes.append(f"{_CARD} of the repository is not racdeploy's and stays as it is")
        card = ""
    contents: dict[str, Path | bytes] = {_CARD: card.encode()} if card else {}
    contents |= files
    return Push(remote, own, contents, tuple(sorted(removed)), card, tuple(notes))


def push(planned: Push, *, message: str = "", private: bool = False) -> str:
    """Carry out a plan in one commit; return the commit's address."""
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

    return remote.ask(write, None)


def _read_card(remote: Remote) -> str:
    with remote.open_texts([_CARD]) as folder:
        return read_bytes(folder / _CARD).decode(errors="replace")


def _is_same(source: Path, there: RepoSibling) -> bool:
    if source.stat().st_size != there.size:
        return False
    if there.lfs:
        return file_sha256(source) == there.lfs.sha256

    # Git's own id of a small file: SHA-1 over a header and the bytes.
    content = source.read_bytes()
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == there.blob_id
