"""Upload a bundle to a Hub repository, beside other bundles.

The whole commit is planned first: ``--dry-run`` shows the plan, and a plan that would overwrite
files of another bundle or of other origin is refused. The repository's model card has metadata, a
table of files, and commands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from racdeploy import plugins
from racdeploy.bundles.hub.layout import (
    BUNDLES_FOLDER,
    SPLIT_SUFFIX,
    list_public_paths,
    map_local_files,
    name_bundle,
)
from racdeploy.bundles.hub.remote import HubNotFoundError, HubRepository, HubUnreachableError
from racdeploy.errors import UsageError
from racdeploy.files.reading import read_bytes
from racdeploy.files.templates import render_text
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.report.tables import format_bytes

CARD_MARK = "<!-- written by racdeploy push -->"
"""Marker of cards that racdeploy wrote and may overwrite."""
_SPARSE_FROM = 0.1  # zeros in the file
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(repository: str, bundles: Mapping[str, Manifest]) -> str:
    """Return the README.md of a repository; ``bundles`` maps their names there to manifests."""
    ordered = dict(sorted(bundles.items()))
    manifests = ordered.values()
    entries = [entry for manifest in manifests for entry in manifest.artifacts]
    formats = sorted({entry.format for entry in entries})
    zeros = max(manifest.pruning.sparsity_file or 0.0 for manifest in manifests)

    return render_text(
        "racdeploy.bundles.hub",
        "card.jinja",
        licenses=[each.base.license for each in manifests if each.base.license],
        base_models=sorted({name for each in manifests if (name := _find_base_model(each))}),
        library=plugins.read_constants("formats", formats[0])["HUB_LIBRARY"],
        tags=["racdeploy", *(["sparse"] if zeros >= _SPARSE_FROM else []), "reasoning", *formats],
        repository=repository,
        names=sorted({_plain(each.base.name) for each in manifests}),
        bundles=ordered,
        has_commands=any(map(_is_stock, entries)),
        mark=CARD_MARK,
        as_json=json.dumps,
        plain=_plain,
        number=_number,
        readable_bytes=format_bytes,
        is_stock=_is_stock,
        quant_tag=_quant_tag,
    )


def _find_base_model(manifest: Manifest) -> str:
    """Return the Hub id of the base model; empty if it was a local folder."""
    name = manifest.base.model or ""
    return name if manifest.base.revision and _HUB_ID.fullmatch(name) else ""


def _is_stock(entry: ArtifactEntry) -> bool:
    """Return True if unmodified llama.cpp and Ollama run the file."""
    return entry.format == "gguf" and entry.packing == "plain"


def _quant_tag(entry: ArtifactEntry) -> str:
    """Return the number format from the file name, by which llama.cpp and Ollama select it."""
    stem = PurePosixPath(entry.path).name.removesuffix(".gguf")
    return SPLIT_SUFFIX.sub("", stem).rpartition("-")[2]


def _number(value: object, form: str = ".2f") -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _plain(value: object) -> str:
    """Return a text that is safe inside a cell or link: it comes from a stranger's manifest."""
    line = " ".join(str(value).split())
    return re.sub(r"[|<>\[\]`]", "", line)[:200]


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
        sizes = {}
        for path, source in self.contents.items():
            sizes[path] = len(source) if isinstance(source, bytes) else source.stat().st_size
        return sizes


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
    other_bundles = {}
    try:
        remote_files, other_bundles = remote.files, dict(remote.manifests)
    except (HubNotFoundError, HubUnreachableError) as error:
        if isinstance(error, HubUnreachableError) and not ignore_unreachable:
            raise
        notes.append(f"{error.message}; planned as if it were empty")

    former = other_bundles.pop(bundle_name, None)
    former_paths = list_public_paths(former) if former else set()
    owners = _find_owners(other_bundles)
    own_paths = former_paths - owners.keys()
    for path in files.keys() & remote_files.keys():
        is_replaceable = path in own_paths or path.startswith(f"{BUNDLES_FOLDER}/")
        if not is_replaceable and not _is_same(files[path], remote_files[path]):
            raise _refuse_taken(name, path, owners.get(path))

    # Delete files of the previous push, except those that another bundle shares.
    own_folder = f"{BUNDLES_FOLDER}/{bundle_name}/"
    old = former_paths | {path for path in remote_files if path.startswith(own_folder)}
    removed = old & remote_files.keys() - owners.keys() - files.keys()

    card = write_card(name, {bundle_name: manifest, **other_bundles})
    if _CARD in remote_files and not _is_own_card(remote):
        notes.append(f"{_CARD} of the repository was not written by racdeploy and is kept")
        card = ""
    contents: dict[str, Path | bytes] = {_CARD: card.encode()} if card else {}
    contents |= files
    return PushPlan(
        remote,
        bundle_name,
        contents,
        removed=tuple(sorted(removed)),
        card=card,
        notes=tuple(notes),
    )


def _find_owners(bundles: Mapping[str, Manifest]) -> dict[str, str]:
    """Return the name of the bundle that has a path in the repository, by path."""
    owners: dict[str, str] = {}
    for name, manifest in bundles.items():
        owners |= dict.fromkeys(list_public_paths(manifest), name)
    return owners


def _is_own_card(remote: HubRepository) -> bool:
    """Return True if racdeploy wrote the repository's model card."""
    with remote.open_small_files([_CARD]) as opened:
        return CARD_MARK in read_bytes(opened / _CARD).decode(errors="replace")


def _refuse_taken(repository: str, path: str, owner: str | None) -> UsageError:
    """Return the error for a file of other origin; ``owner`` is the bundle that has it, if any."""
    whose = f"bundle {owner}" if owner else "somebody else"
    return UsageError(
        "hub-path-taken",
        f"{repository} has another {path}, which belongs to {whose}",
        remedy="push to another repository, or remove the file there first",
    )


def push(planned: PushPlan, *, private: bool = False) -> str:
    """Execute a plan in one commit; return the URL of the commit."""
    remote, api = planned.remote, planned.remote.api
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    changes: list[CommitOperationAdd | CommitOperationDelete] = []
    changes += [CommitOperationAdd(path, source) for path, source in planned.contents.items()]
    changes += [CommitOperationDelete(path) for path in planned.removed]
    message = f"Add {planned.bundle} with racdeploy"

    def write() -> str:
        api.create_repo(remote.name, private=private, exist_ok=True)
        if remote.revision:
            api.create_branch(remote.name, branch=remote.revision, exist_ok=True)
        branch = remote.revision or None
        made = api.create_commit(remote.name, changes, commit_message=message, revision=branch)
        return str(made.commit_url)

    return remote.call(write, None)


def _is_same(source: Path, remote_file: RepoSibling) -> bool:
    if source.stat().st_size != remote_file.size:
        return False
    if remote_file.lfs:
        return file_sha256(source) == remote_file.lfs.sha256

    # A file outside LFS has only its git blob id: SHA-1 over a header and the bytes.
    content = source.read_bytes()
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == remote_file.blob_id
