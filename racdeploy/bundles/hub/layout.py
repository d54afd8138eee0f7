"""Where the files of a bundle lie in a repository, and which names of a repository are accepted.

Artifacts lie where other programs look for them: GGUF files at the top, their number format in the
name, ONNX graphs in ``onnx/``. All else of a bundle is in ``racdeploy/NAME/``, a folder for each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from racdeploy.errors import ArtifactError
from racdeploy.manifest import Manifest

BUNDLES = "racdeploy"
"""Folder of a repository with a folder for each bundle."""
NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")
"""End of the name of a file that is one of several."""
_MAX_NAME = 255  # bytes of a part, as most file systems have it
_MAX_DEPTH = 8
_RESERVED = set('<>:"\\|?*')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def name_bundle(manifest: Manifest) -> str:
    """Return the name of a bundle in a repository; one of the same name takes its place."""
    first = manifest.artifacts[0]
    if first.format == "gguf":
        return NUMBERED.sub("", PurePosixPath(first.path).name.removesuffix(".gguf"))
    return f"{first.format}-{first.quant}"


def list_artifacts(manifest: Manifest) -> dict[str, str]:
    """Return the SHA-256 of every file of the artifacts, by its path in bundle and repository."""
    return {path: sha256 for entry in manifest.artifacts for path, sha256 in entry.files.items()}


def list_public(manifest: Manifest) -> set[str]:
    """Return the paths that other programs read: artifacts, and what belongs beside graphs."""
    paths = set(list_artifacts(manifest))
    if any(entry.format == "onnx" for entry in manifest.artifacts):
        paths |= {"config.json", "genai_config.json", *manifest.tokenizer.files}
    return paths


def lay_out(bundle: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the files of a bundle by their path in the repository, the repository's card aside."""
    artifacts, public = list_artifacts(manifest), list_public(manifest)
    own = f"{BUNDLES}/{name_bundle(manifest)}/"

    files: dict[str, Path] = {}
    for file in bundle.rglob("*"):
        name = file.relative_to(bundle).as_posix()
        if file.is_symlink() or not file.is_file() or refuse_name(name):
            continue
        if name in public:
            files[name] = file
        if name not in artifacts:
            files[own + name] = file

    # What people look for first.
    return dict(sorted(files.items(), key=lambda item: (item[0].startswith(own), item[0])))


def find_files(name: str, manifest: Manifest, there: Iterable[str]) -> dict[str, str]:
    """Return the paths in the repository of a bundle's files, by their path in the bundle.

    Args:
        name: the bundle's name in the repository.
        there: every path in the repository.

    Raises:
        ArtifactError: a name that leaves the folder, that some system does not have, or that is
            another one's in other letters; or an artifact that is not there.
    """
    prefix = f"{BUNDLES}/{name}/"
    paths = {path.removeprefix(prefix): path for path in there if path.startswith(prefix)}
    artifacts = {path: path for path in list_artifacts(manifest)}
    if missing := sorted(artifacts.keys() - set(there)):
        raise ArtifactError(
            "hub-file-missing",
            f"the repository lacks {missing[0]!r}, which bundle {name} consists of",
            remedy="push the bundle again, or pull an earlier --revision",
        )

    seen: dict[str, str] = {}
    for path in sorted(paths | artifacts):
        if reason := refuse_name(path):
            raise ArtifactError(
                "hub-name-refused", f"the repository has a file {path!r}: its name {reason}"
            )

        # Where letters are compared without their case, one would replace the other.
        folded = unicodedata.normalize("NFKC", path).casefold()
        if folded in seen:
            raise ArtifactError(
                "hub-names-collide", f"the repository has both {seen[folded]!r} and {path!r}"
            )
        seen[folded] = path
    return paths | artifacts


def refuse_name(name: str) -> str:
    """Return why a path is not written to a disk, or an empty string."""
    parts = name.split("/")
    if len(parts) > _MAX_DEPTH:
        return f"has more than {_MAX_DEPTH} parts"

    for part in parts:
        if not part or part.startswith(".") or part != part.strip() or part.endswith("."):
            return "has a part that is empty, hidden, or ends in a dot or a space"
        if _RESERVED & {*part} or not part.isprintable():
            return "has characters that a file system does not take"
        if len(part.encode(errors="surrogatepass")) > _MAX_NAME:
            return f"has a part of more than {_MAX_NAME} bytes"
        if _DEVICES.fullmatch(part):
            return "names a device of Windows"
    return ""
