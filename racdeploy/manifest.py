"""The manifest of a bundle, ``racdeploy.json``: all that a device needs, and what was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from racdeploy.errors import ArtifactError
from racdeploy.files.checked import has_sha256
from racdeploy.files.reading import Json, name_problem, read_json
from racdeploy.files.writing import file_sha256
from racdeploy.results.part import Finite, Positive, Share

MANIFEST_NAME = "racdeploy.json"
MOST_MANIFEST_BYTES = 4_000_000
MOST_TOKENS = 1 << 22
"""Longest sequence that anybody may ask for: above any model's of today."""

CONFIGURATIONS = ("genai_config.json", "config.json")
"""Files that say what a graph leaves open: beside it, or in the folder above."""

_MOST_BYTES = 1 << 50  # of an artifact
Name = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A path within a bundle."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Files = Annotated[dict[Name, Sha256], Field(max_length=1024)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


def _check_base(base: Json) -> Json:
    for key in ("model", "name", "revision", "license", "model_type"):
        if not isinstance(base.get(key), str | None):
            raise ValueError(f"{key} is no text")
    if not isinstance(base.get("files", {}), dict):
        raise ValueError("files is no table")
    return base


def _check_pruning(pruning: Json) -> Json:
    for key, value in pruning.items():
        if not key.startswith("sparsity"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{key} is no share")
    return pruning


def _check_headline(headline: Json) -> Json:
    for arm in ("dense", "pruned"):
        if not isinstance(headline.get(arm, {}), dict):
            raise ValueError(f"{arm} is no table")
    return headline


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArtifactEntry(_Entry):
    """One exported artifact of a bundle; ``path`` is its main file, relative to the bundle.

    ``files`` are the hashes of all its files by their path in the bundle; an old manifest has none,
    and means the main file. ``size_bytes`` is of those that every engine opens: not of the second
    graph of packing ``bitmask_op``. ``unpacked_sha256`` is that of the file that a packed one is
    made from, empty where nothing is packed. ``companions`` are the hashes of configurations beside
    it, which are compared where one is used; bundles that were made before have none.
    """

    path: Name
    format: str
    quant: str
    packing: str
    size_bytes: int = Field(ge=0, le=_MOST_BYTES)
    sha256: Sha256
    backend: str
    unpacked_sha256: Sha256 | Literal[""] = ""
    files: Files = Field(default_factory=dict)
    companions: Files = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fill_files(self) -> Self:
        if not self.files:
            object.__setattr__(self, "files", {self.path: self.sha256})
        return self

    def check(self, bundle: Path) -> None:
        """Raise ArtifactError for the first file of the artifact that differs from its hash."""
        _check_hashes(bundle, self.files)

    def check_companion(self, bundle: Path, file: Path) -> None:
        """Raise ArtifactError for a configuration that was used and is not as it is listed."""
        if not self.companions:
            return

        name = file.resolve().relative_to(bundle.resolve()).as_posix()
        if name not in self.companions:
            raise ArtifactError(
                "file-not-listed",
                f"{file} was used, and the manifest does not list it",
                remedy="remove it, or copy the bundle again",
            )
        _check_hashes(bundle, {name: self.companions[name]})

    def check_once(self, bundle: Path) -> None:
        """Do the same, and leave out what has passed and is as it was then."""
        for name, expected in self.files.items():
            if not has_sha256(bundle / name, expected):
                raise _differs(bundle / name, expected)


class TokenDifferences(_Entry):
    """How many hard strings an artifact's engine tokenizes differently from tokenizer.json."""

    strings: Positive
    different: Positive
    accepted: Share
    example: str = Field(max_length=1024)


class TokenizerEntry(_Entry):
    """Tokenizer files with their hashes, thinking tags and end-of-sequence ids.

    ``differences`` are those that the recipe accepts; None where every string has equal ids.
    """

    files: Files
    template_sha256: str
    open_tag: str | None
    close_tag: str | None
    eos_ids: tuple[int, ...] = Field(max_length=1024)
    differences: TokenDifferences | None = None

    @property
    def place(self) -> PurePosixPath:
        """The folder of its files in the bundle."""
        return PurePosixPath(min(self.files, default="")).parent


class ThinkingControl(_Entry):
    """What is done about the thinking besides its budget; by default nothing.

    Args:
        closing: text that is forced before the close tag where the budget ends.
        close_bias: logits that the close tag has gained at the end of the budget.
        hesitation: token ids of words such as "Wait", by the word.
        hesitation_penalty: logits that those tokens lose while the model thinks.
    """

    closing: str = ""
    close_bias: Finite = 0.0
    hesitation: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    hesitation_penalty: Finite = 0.0

    @property
    def hesitation_ids(self) -> tuple[int, ...]:
        """The tokens of all words, sorted."""
        return tuple(sorted({token for ids in self.hesitation.values() for token in ids}))


class GenerationSettings(_Entry):
    """How to run the model: its authors' sampling, and the limits it was verified with.

    Args:
        model_context_tokens: the longest sequence that the model is made for; None in bundles that
            were made before it was kept.
        advised_context_tokens: what other programs should be started with: room for long thoughts,
            within what model and target have.
    """

    temperature: Finite
    top_p: float = Field(gt=0, le=1)
    max_new_tokens: Tokens
    max_thinking_tokens: Tokens | None = None
    thinking: ThinkingControl = Field(default_factory=ThinkingControl)
    context_tokens: Tokens
    model_context_tokens: Tokens | None = None
    advised_context_tokens: Tokens | None = None

    @property
    def context_to_start_with(self) -> int:
        """What other programs should be started with."""
        return self.advised_context_tokens or self.context_tokens


class Manifest(_Entry):
    """``racdeploy.json``: everything a device needs to run a bundle, and what was measured.

    ``base`` has model, revision, licence and file hashes; ``traces`` hash and counts; ``pruning``
    the sparsity and error; ``verdict`` and ``headline`` are the result of the verification.
    ``dense_tokenizer`` is that of the dense model where the pruned one has fewer tokens.
    """

    schema_version: Literal[1] = 1
    racdeploy_version: str
    base: Annotated[Json, AfterValidator(_check_base)]
    recipe: Json
    traces: Json
    pruning: Annotated[Json, AfterValidator(_check_pruning)]
    artifacts: tuple[ArtifactEntry, ...] = Field(min_length=1, max_length=64)
    tokenizer: TokenizerEntry
    dense_tokenizer: TokenizerEntry | None = None
    generation: GenerationSettings
    verdict: str
    headline: Annotated[Json, AfterValidator(_check_headline)]

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Read and check the manifest of a bundle; its paths are inside the bundle and exist.

        Raises:
            ArtifactError: not a bundle, a damaged manifest, or a path that escapes.
        """
        file = bundle / MANIFEST_NAME
        if not file.is_file():
            raise _refuse_place(bundle)

        try:
            manifest = cls.model_validate(read_json(file, MOST_MANIFEST_BYTES, once=True))
        except ValidationError as error:
            raise ArtifactError(
                "invalid-manifest",
                f"{file}: {name_problem(error)}",
                remedy="build the bundle again",
            ) from error

        for entry in manifest.artifacts:
            for name in (entry.path, *entry.files, *entry.companions):
                _check_inside(bundle, name)
            if entry.files.get(entry.path) != entry.sha256:
                raise ArtifactError(
                    "invalid-manifest",
                    f"{file}: the files of {entry.path!r} lack it, or have another hash for it",
                )
            _check_size(bundle, entry)

        for tokenizer in manifest.tokenizers:
            for name in tokenizer.files:
                _check_inside(bundle, name)
        return manifest

    @property
    def tokenizers(self) -> tuple[TokenizerEntry, ...]:
        """The tokenizer, and that of the dense model where it is another one."""
        return tuple(filter(None, (self.tokenizer, self.dense_tokenizer)))

    def check_tokenizer(self, bundle: Path) -> None:
        """Raise ArtifactError for the first tokenizer file that differs from its hash."""
        for entry in self.tokenizers:
            _check_hashes(bundle, entry.files)

    def check_files(self, bundle: Path) -> None:
        """Raise ArtifactError for the first listed file that differs from its hash."""
        for entry in self.artifacts:
            entry.check(bundle)
        self.check_tokenizer(bundle)


def _refuse_place(place: Path) -> ArtifactError:
    """Return the error for a place that is no bundle, which says what it is."""
    remedy = "give the folder that racdeploy build wrote: its last line names it"
    if not place.exists():
        return ArtifactError("no-such-folder", f"there is no folder {place}", remedy=remedy)

    message = f"{place} is not a bundle: it has no {MANIFEST_NAME}"
    if place.suffix == ".gguf":
        message = f"{place} is a GGUF file, not a bundle"
        remedy = f"racdeploy inspect {place} shows it, llama-cli -m {place} runs it; or {remedy}"
    elif (place / "config.json").is_file():
        message = f"{place} is a model folder, not a bundle"
        remedy = f"racdeploy build {place} makes a bundle of it"
    return ArtifactError("not-a-bundle", message, remedy=remedy)


def _check_hashes(bundle: Path, listed: Mapping[str, str]) -> None:
    for name, expected in listed.items():
        if file_sha256(bundle / name) != expected:
            raise _differs(bundle / name, expected)


def _differs(file: Path, expected: str) -> ArtifactError:
    return ArtifactError(
        "differs-from-manifest",
        f"{file} differs from its manifest: SHA-256 is not {expected[:16]}…",
        remedy="copy the bundle again, or build it again",
    )


def _check_size(bundle: Path, entry: ArtifactEntry) -> None:
    there = sum((bundle / name).stat().st_size for name in entry.files)
    if entry.size_bytes > there:
        raise ArtifactError(
            "artifact-cut-off",
            f"{bundle / MANIFEST_NAME} gives {entry.path!r} {entry.size_bytes:,} bytes, its files "
            f"have {there:,}",
            remedy="copy the bundle again, whole",
        )


def _check_inside(bundle: Path, name: str) -> None:
    path = (bundle / name).resolve()
    if not path.is_relative_to(bundle.resolve()):
        raise ArtifactError(
            "path-outside-bundle",
            f"{bundle / MANIFEST_NAME} names a path outside the bundle: {name!r}",
        )
    if not os.path.isfile(path):  # also where the name is too long
        raise ArtifactError(
            "bundle-file-missing",
            f"{path} is listed in the manifest and missing",
            remedy="copy the bundle again",
        )
