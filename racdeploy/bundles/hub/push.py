"""Push a bundle into a repository of the Hub, beside the ones that are there.

All that will be written is known before anything is: a plan is shown by ``--dry-run``, and refused
where it would change what another bundle or somebody else has put there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from racdeploy.bundles.hub.card import MARK, write_card
from racdeploy.bundles.hub.layout import (
    BUNDLES,
    CARD,
    check_repository,
    list_artifacts,
    name_bundle,
    place_files,
)
from racdeploy.bundles.hub.remote import AbsentError, Remote, RemoteFile, UnreachableError
from racdeploy.errors import UsageError
from racdeploy.manifest import Manifest
from racdeploy.storage.files import file_sha256


@dataclass(frozen=True)
class Push:
    """What a push will do.

    Args:
        bundle: its name in the repository.
        files: where each file comes from, by its path in the repository; the card is not among
            them.
        removed: paths of this bundle's last push that are no longer in it.
        card: README.md of the repository; empty where somebody else's stays.
        notes: what a user should know beside it.
    """

    remote: Remote
    bundle: str
    files: Mapping[str, Path]
    removed: tuple[str, ...]
    card: str
    notes: tuple[str, ...]

    @property
    def contents(self) -> dict[str, Path | bytes]:
        """Everything that is written, by its path, the card first."""
        contents: dict[str, Path | bytes] = {}
        if self.card:
            contents[CARD] = self.card.encode()

        contents.update(self.files)
        return contents

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of everything that is written, by its path."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.contents.items()
        }


def plan_push(folder: Path, name: str, revision: str = "", *, blind: bool = False) -> Push:
    """Return what a push would do; the repository is looked at, and need not exist.

    Args:
        blind: plan also where the Hub cannot be reached, as if the repository were empty.

    Raises:
        ArtifactError: the bundle is damaged.
        UsageError: a path in the repository is another bundle's or somebody else's.
    """
    remote = Remote(check_repository(name), revision)
    manifest = Manifest.read(folder)
    manifest.check_files(folder)

    own = name_bundle(manifest)
    files = place_files(folder, manifest)

    notes = []
    if manifest.verdict != "pass":
        notes.append(f"the verdict of this bundle: {manifest.verdict}")

    there, others, note = _look(remote, blind)
    if note:
        notes.append(note)

    former = others.pop(own, None)
    _refuse_others(remote, files, there, others, former)
    removed = _find_old(own, there, others, former) - set(files)

    card = write_card(name, {own: manifest, **others})
    if CARD in there and MARK not in remote.read_text(CARD):
        notes.append(f"{CARD} of the repository is not racdeploy's and stays as it is")
        card = ""

    return Push(remote, own, files, tuple(sorted(removed)), card, tuple(notes))


def push(planned: Push, *, message: str = "", private: bool = False, collection: str = "") -> str:
    """Carry out a plan in one commit; return the commit's address."""
    remote = planned.remote
    remote.create(private)

    message = message or f"Add {planned.bundle} with racdeploy"
    commit = remote.write(planned.contents, planned.removed, message)
    if collection:
        remote.collect(collection)
    return commit


def _look(remote: Remote, blind: bool) -> tuple[Mapping[str, RemoteFile], dict[str, Manifest], str]:
    """Return files and manifests of the repository, and a note where it cannot be seen."""
    try:
        return remote.files, dict(remote.manifests), ""
    except AbsentError:
        return {}, {}, f"{remote.name} is new, or not shown to you"
    except UnreachableError as error:
        if not blind:
            raise
        return {}, {}, f"{error.message}: what is in the repository is not known"
    except UsageError:
        if not remote.revision:
            raise
        return {}, {}, f"branch {remote.revision} is new"


def _find_old(
    own: str,
    there: Mapping[str, RemoteFile],
    others: Mapping[str, Manifest],
    former: Manifest | None,
) -> set[str]:
    """Return the paths of this bundle's last push; none that another bundle has too."""
    old = {path for path in there if path.startswith(f"{BUNDLES}/{own}/")}
    if former:
        old |= set(list_artifacts(former)) & set(there)

    for other in others.values():
        old -= set(list_artifacts(other))
    return old


def _refuse_others(
    remote: Remote,
    files: Mapping[str, Path],
    there: Mapping[str, RemoteFile],
    others: Mapping[str, Manifest],
    former: Manifest | None,
) -> None:
    """Refuse to change a file that is not this bundle's own of an earlier push."""
    owners = {path: name for name, other in others.items() for path in list_artifacts(other)}
    ours = set(list_artifacts(former)) if former else set()
    shared = any(path.endswith(".onnx") for path in owners)

    for path, source in files.items():
        if path not in there or path.startswith(f"{BUNDLES}/"):
            continue

        # What programs read beside graphs belongs to every bundle that has some.
        if path not in owners and (path in ours or (former and not shared)):
            continue

        if not _is_same(source, there[path]):
            known = f"bundle {owners[path]}" if path in owners else ""
            owner = known or ("other bundles" if shared else "somebody else")
            raise UsageError(
                f"{remote.name} has another {path}, which belongs to {owner}",
                remedy="push to another repository, or remove the file there first",
            )


def _is_same(source: Path, there: RemoteFile) -> bool:
    if source.stat().st_size != there.size_bytes:
        return False
    if there.sha256:
        return file_sha256(source) == there.sha256

    # Git's own id of a small file: SHA-1 over a header and the bytes.
    content = source.read_bytes()
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == there.git_id
