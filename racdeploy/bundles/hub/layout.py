"""Where the files of a bundle lie in a repository, and which names of a repository are accepted.

Artifacts lie where other programs look for them: GGUF files at the top, their number format in the
name, ONNX graphs in ``onnx/``. All else of a bundle is in ``racdeploy/NAME/``, a folder for each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.manifest import MANIFEST_NAME, Manifest

BUNDLES = "racdeploy"
"""Folder of a repository with a folder for each bundle."""
CARD = "README.md"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")
"""End of the name of a file that is one of several."""
_LONGEST_NAME = 255  # bytes of a part, as most file systems have it
_DEEPEST = 8
_RESERVED = set('<>:"\\|?*')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_WITH_GRAPHS = ("config.json", "genai_config.json")  # programs read them beside onnx/


def check_repository(name: str) -> str:
    """Return the name of a repository, or refuse what is none."""
    if not _REPOSITORY.fullmatch(name):
        raise UsageError(
            f"{name!r} is not the name of a repository",
            remedy="write ORGANIZATION/NAME, or USER/NAME",
        )
    return name


def name_bundle(manifest: Manifest) -> str:
    """Return the name of a bundle in a repository; one of the same name takes its place."""
    first = manifest.artifacts[0]
    if first.format == "gguf":
        name = PurePosixPath(first.path).name.removesuffix(".gguf")
        return NUMBERED.sub("", name)
    return f"{first.format}-{first.quant}"


def place_files(bundle: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the files of a bundle by their path in the repository, the repository's card aside."""
    own = f"{BUNDLES}/{name_bundle(manifest)}"
    artifacts = list_artifacts(manifest)
    places: dict[str, Path] = {}

    for file in sorted(bundle.rglob("*")):
        name = file.relative_to(bundle).as_posix()
        if file.is_symlink() or not file.is_file() or refuse_name(name):
            continue

        place = name if name in artifacts else f"{own}/{name}"
        places[place] = file

    if any(entry.format == "onnx" for entry in manifest.artifacts):
        places |= _place_beside_graphs(bundle, manifest)

    # What people look for first.
    ordered = sorted(places, key=lambda place: (place.startswith(own), place))
    return {place: places[place] for place in ordered}


def _place_beside_graphs(bundle: Path, manifest: Manifest) -> dict[str, Path]:
    """Return what transformers.js, optimum and onnxruntime-genai look for beside ``onnx/``."""
    places = {}
    for name in (*_WITH_GRAPHS, *manifest.tokenizer.files):
        if (bundle / name).is_file():
            places[name] = bundle / name
    return places


def list_artifacts(manifest: Manifest) -> dict[str, str]:
    """Return the SHA-256 of every file of the artifacts, by its path in bundle and repository."""
    found: dict[str, str] = {}
    for entry in manifest.artifacts:
        found |= entry.files
    return found


def list_bundles(names: Iterable[str]) -> list[str]:
    """Return the names of the bundles in a repository, by the paths of its files."""
    found = []
    for name in names:
        match name.split("/"):
            case [folder, bundle, file] if (folder, file) == (BUNDLES, MANIFEST_NAME):
                found.append(bundle)
    return sorted(found)


def place_in_bundle(name: str, manifest: Manifest, files: Iterable[str]) -> dict[str, str]:
    """Return the paths in the repository of a bundle's files, by their path in the bundle.

    Args:
        name: the bundle's name in the repository.
        files: every path in the repository.

    Raises:
        ArtifactError: a name that leaves the folder, that some system does not have, or that is
            another one's in other letters; or an artifact that is not there.
    """
    prefix = f"{BUNDLES}/{name}/"
    there = set(files)
    places = {path.removeprefix(prefix): path for path in there if path.startswith(prefix)}

    for path in list_artifacts(manifest):
        if path not in there:
            raise ArtifactError(
                f"the repository lacks {path!r}, which bundle {name} consists of",
                remedy="push the bundle again, or pull an earlier --revision",
            )
        places[path] = path

    _check_names(places)
    return places


def refuse_name(name: str) -> str:
    """Return why a path is not written to a disk, or an empty string."""
    parts = name.split("/")
    if len(parts) > _DEEPEST:
        return f"has more than {_DEEPEST} parts"

    for part in parts:
        if not part or part.startswith(".") or part != part.strip() or part.endswith("."):
            return "has a part that is empty, hidden, or ends in a dot or a space"
        if _RESERVED & {*part} or not part.isprintable():
            return "has characters that a file system does not take"
        if len(part.encode(errors="surrogatepass")) > _LONGEST_NAME:
            return f"has a part of more than {_LONGEST_NAME} bytes"
        if _DEVICES.fullmatch(part):
            return "names a device of Windows"
    return ""


def _check_names(places: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for name in sorted(places):
        if reason := refuse_name(name):
            raise ArtifactError(f"the repository has a file {name!r}: its name {reason}")

        # Where letters are compared without their case, one would replace the other.
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen:
            raise ArtifactError(f"the repository has both {seen[folded]!r} and {name!r}")
        seen[folded] = name
