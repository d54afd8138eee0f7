"""Layout of bundles in a Hub repository, and validation of file names.

Artifacts are where other programs look for them: GGUF files at the top with the number format in
the name, ONNX graphs in ``onnx/``. The other files of a bundle are in ``racdeploy/NAME/``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from racdeploy.errors import ArtifactError
from racdeploy.manifest import Manifest

BUNDLES_FOLDER = "racdeploy"
"""Folder of a repository that contains one folder per bundle."""
SPLIT_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
"""Suffix of a split GGUF file, as ``-00001-of-00003``."""
_MAX_NAME = 255  # bytes of a part, as most file systems have it
_MAX_DEPTH = 8
_RESERVED = set('<>:"\\|?*')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def name_bundle(manifest: Manifest) -> str:
    """Return the name of a bundle in a repository; a bundle of the same name is replaced."""
    first = manifest.artifacts[0]
    if first.format == "gguf":
        return SPLIT_SUFFIX.sub("", PurePosixPath(first.path).name.removesuffix(".gguf"))
    return f"{first.format}-{first.quant}"


def list_artifacts(manifest: Manifest) -> dict[str, str]:
    """Return the SHA-256 of every file of the artifacts, by its path in bundle and repository."""
    return {path: sha256 for entry in manifest.artifacts for path, sha256 in entry.files.items()}


def list_public_paths(manifest: Manifest) -> set[str]:
    """Return the paths that other programs read: artifacts, and configurations beside graphs."""
    paths = set(list_artifacts(manifest))
    if any(entry.format == "onnx" for entry in manifest.artifacts):
        paths |= {"config.json", "genai_config.json", *manifest.tokenizer.files}
    return paths


def map_local_files(bundle: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the files of a bundle by their path in the repository, without its model card."""
    artifacts, public = list_artifacts(manifest), list_public_paths(manifest)
    prefix = f"{BUNDLES_FOLDER}/{name_bundle(manifest)}/"

    files = {}
    for file in bundle.rglob("*"):
        name = file.relative_to(bundle).as_posix()
        if file.is_symlink() or not file.is_file() or explain_bad_name(name):
            continue
        if name in public:
            files[name] = file
        if name not in artifacts:
            files[prefix + name] = file

    # Sort public files before the bundle's folder, as users look for them first.
    return dict(sorted(files.items(), key=lambda item: (item[0].startswith(prefix), item[0])))


def map_remote_files(name: str, manifest: Manifest, remote_paths: Iterable[str]) -> dict[str, str]:
    """Return the paths in the repository of a bundle's files, by their path in the bundle.

    Args:
        name: the bundle's name in the repository.
        remote_paths: every path in the repository.

    Raises:
        ArtifactError: an artifact is missing, or a name leaves the folder, is invalid on some file
            system, or differs from another only in case.
    """
    prefix = f"{BUNDLES_FOLDER}/{name}/"
    paths = {path.removeprefix(prefix): path for path in remote_paths if path.startswith(prefix)}
    artifacts = {path: path for path in list_artifacts(manifest)}
    if missing := sorted(artifacts.keys() - set(remote_paths)):
        raise ArtifactError(
            "hub-file-missing",
            f"the repository lacks {missing[0]!r}, a file of bundle {name}",
            remedy="push the bundle again, or pull an earlier --revision",
        )

    seen: dict[str, str] = {}
    for path in sorted(paths | artifacts):
        if reason := explain_bad_name(path):
            raise ArtifactError(
                "hub-name-refused", f"the repository has a file {path!r}: its name {reason}"
            )

        # On a case-insensitive file system one would overwrite the other.
        folded = unicodedata.normalize("NFKC", path).casefold()
        if folded in seen:
            raise ArtifactError(
                "hub-names-collide", f"the repository has both {seen[folded]!r} and {path!r}"
            )
        seen[folded] = path
    return paths | artifacts


def explain_bad_name(name: str) -> str:
    """Return the reason why a path is not safe to write on every system, or an empty string."""
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
