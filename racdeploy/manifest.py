"""Manifest of a bundle, ``racdeploy.json``: run-time settings, file hashes and measured results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from racdeploy.errors import ArtifactError
from racdeploy.files.reading import Json, check_version, describe_validation_error, read_json
from racdeploy.files.sha256_cache import has_sha256
from racdeploy.files.writing import file_sha256
from racdeploy.results.pruning import KeptStructure, LinearRow, StructureRow
from racdeploy.results.schema import FiniteNonNegative, PositiveCount, Share

MANIFEST_NAME = "racdeploy.json"
MAX_MANIFEST_BYTES = 4_000_000
MAX_TOKENS = 1 << 22
"""Maximum length of a sequence in a recipe or manifest: above that of any current model."""

CONFIG_FILES = ("genai_config.json", "config.json")
"""Configuration files of an ONNX graph, in its folder or the one above."""

_MAX_BYTES = 1 << 50  # of an artifact
BundlePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A path within a bundle."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Files = Annotated[dict[BundlePath, Sha256], Field(max_length=1024)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
_Zeros = Annotated[float, Field(ge=0, le=1, strict=True)]
_DIFFERENCES = ("drop", "length_ratio")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArtifactEntry(_Entry):
    """One exported artifact of a bundle; ``path`` is its main file, relative to the bundle.

    ``files`` maps the path of each file in the bundle to its SHA-256; if empty, it becomes the main
    file alone. ``size_bytes`` counts the files that every engine opens, so not the second graph of
    packing ``bitmask_op``. ``unpacked_sha256`` is the hash of the plain file in a container, empty
    without one. ``companions`` maps configuration files to their hashes; each is compared when an
    engine uses it.
    """

    path: BundlePath
    format: str
    quant: str
    packing: str
    size_bytes: int = Field(ge=0, le=_MAX_BYTES)
    sha256: Sha256 | Literal[""] = ""  # empty: a plain model, not hashed
    backend: str
    unpacked_sha256: Sha256 | Literal[""] = ""
    files: Files = {}
    companions: Files = {}

    @model_validator(mode="after")
    def _fill_files(self) -> Self:
        if not self.files:
            object.__setattr__(self, "files", {self.path: self.sha256})
        return self

    def check_changed_files(self, bundle: Path) -> None:
        """Check the files again, except those that passed before and have not changed since."""
        for name, expected in self.files.items():
            if not has_sha256(bundle / name, expected):
                raise hash_error(bundle / name, expected)


class AcceptedTokenDifferences(_Entry):
    """Hard strings that an artifact's engine tokenizes differently from tokenizer.json."""

    strings: PositiveCount
    different: PositiveCount
    accepted: Share
    example: str = Field(max_length=1024)


class TokenizerEntry(_Entry):
    """Tokenizer files with their hashes, thinking tags and end-of-sequence ids.

    ``differences`` counts the strings that the recipe accepts as different; None if all are equal.
    """

    files: Files
    template_sha256: str
    open_tag: str | None
    close_tag: str | None
    eos_ids: tuple[int, ...] = Field(max_length=1024)
    differences: AcceptedTokenDifferences | None = None

    @property
    def folder(self) -> PurePosixPath:
        """Folder of the tokenizer files in the bundle."""
        return PurePosixPath(min(self.files, default="")).parent


class ThinkingControl(_Entry):
    """Control of the thinking besides its budget; off by default.

    Args:
        closing: text forced before the close tag when the budget ends.
        hesitation: words such as "Wait" and their token ids.
        hesitation_penalty: logits subtracted from those tokens while the model thinks.
    """

    closing: str = ""
    hesitation: dict[str, tuple[int, ...]] = {}
    hesitation_penalty: FiniteNonNegative = 0.0

    @property
    def hesitation_ids(self) -> tuple[int, ...]:
        """Token ids of all hesitation words, sorted."""
        return tuple(sorted({token for ids in self.hesitation.values() for token in ids}))


class GenerationSettings(_Entry):
    """Sampling recommended by the model's authors, and the limits that it was verified with.

    Args:
        model_context_tokens: longest sequence that the model supports; None if unknown.
        advised_context_tokens: context to start other programs with: room for long thoughts, within
            the limits of model and target.
    """

    temperature: FiniteNonNegative
    top_p: float = Field(gt=0, le=1)
    max_new_tokens: Tokens
    max_thinking_tokens: Tokens | None = None
    thinking: ThinkingControl = ThinkingControl()
    context_tokens: Tokens
    model_context_tokens: Tokens | None = None
    advised_context_tokens: Tokens | None = None

    def without_control(self) -> Self:
        """Return the settings without thinking budget and control."""
        free = {"max_thinking_tokens": None, "thinking": ThinkingControl()}
        return self.model_copy(update=free)

    @property
    def default_context_tokens(self) -> int:
        """Context to start other programs with, such as llama-server."""
        return self.advised_context_tokens or self.context_tokens

    def advise_context(self, prompt_tokens: int) -> str:
        """Return how to load the bundle for a prompt, on the command line and in Python."""
        needed = prompt_tokens + self.max_new_tokens
        most = self.model_context_tokens or needed
        if prompt_tokens >= most:
            return f"shorten it: the model supports {most:,} tokens, thinking and answer included"
        tokens = min(needed, most)
        how = f"--context-tokens {tokens} for run, chat and serve, context_tokens={tokens} for load"
        return f"shorten it, or allow more: {how}"


@dataclass(frozen=True)
class RunTimeSettings:
    """Settings to ask a model with: part of a bundle's manifest, else read from the model.

    Args:
        name: of the model in reports.
    """

    name: str
    artifact: ArtifactEntry
    tokenizer: TokenizerEntry
    generation: GenerationSettings


class _OpenEntry(BaseModel):
    """Entry that may have keys which this release does not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class BaseEntry(_OpenEntry):
    """Dense model of a bundle.

    Args:
        model: name or folder that the user gave.
        name: of the model in every report.
        revision: the Hub's commit; empty for a local folder.
        files: SHA-256 of each file of the model.
    """

    model: str | None = None
    name: str = Field(min_length=1)
    revision: str | None = None
    license: str | None = None
    architecture: str | None = None
    model_type: str | None = None
    files: dict[str, str] = {}


class _KeptShares(_Entry):
    keep: dict[str, float]
    uniform: bool


# Fields are written in this order: those of the last class first.
class StructureEntry(KeptStructure, _KeptShares):
    """Structured pruning: kept shares of the recipe, and kept sizes."""

    block_rows: tuple[StructureRow, ...]


class PruningEntry(_OpenEntry):
    """Zeros and cuts of the pruned model; None where the manifest does not say it.

    Args:
        sparsity: of the pruned model's linears.
        sparsity_file: of the first artifact; rounding adds zeros or loses them.
        structure: None if nothing was cut.
    """

    method: str | None = None
    pattern: str | None = None
    sparsity: _Zeros | None = None
    requested_sparsity: _Zeros | None = None
    sparsity_file: _Zeros | None = None
    linears: tuple[LinearRow, ...] = ()
    structure: StructureEntry | None = None

    # In the file, an empty object stands for no cut.
    @field_validator("structure", mode="before")
    @classmethod
    def _read_structure(cls, value: Any) -> Any:
        return value or None

    @field_serializer("structure")
    def _write_structure(self, value: StructureEntry | None) -> StructureEntry | dict[str, Any]:
        return value or {}


class HeadlineArm(_OpenEntry):
    """Main figures of a model; those that were not measured are None.

    Args:
        parameters: only where structure was cut.
    """

    accuracy: float | None = None
    thinking_tokens_mean: float | None = None
    unclosed: int | None = None
    size_bytes: int | None = None
    tokens_per_s: float | None = None
    prompts: int | None = None
    parameters: int | None = None


class Headline(_Entry):
    """Main figures of the verification, for programs that read only the manifest.

    Args:
        arms: figures by the name of the model; ``dense`` and ``pruned`` are the compared ones.
        drop, length_ratio: differences of the compared models, as in the report.
    """

    arms: dict[str, HeadlineArm] = {}
    drop: float | None = None
    length_ratio: float | None = None

    @property
    def dense(self) -> HeadlineArm:
        """Figures of the dense model, all None if it has none."""
        return self.arms.get("dense", HeadlineArm())

    @property
    def pruned(self) -> HeadlineArm:
        """Figures of the pruned model, all None if it has none."""
        return self.arms.get("pruned", HeadlineArm())

    # In the file, the models stand beside the differences.
    @model_validator(mode="before")
    @classmethod
    def _read_arms(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "arms" in values:
            return values
        differences = {key: values[key] for key in _DIFFERENCES if key in values}
        arms = {key: value for key, value in values.items() if key not in differences}
        return {"arms": arms, **differences}

    @model_serializer
    def _write_arms(self) -> dict[str, Any]:
        arms = {name: arm.model_dump(exclude_unset=True) for name, arm in self.arms.items()}
        given = [key for key in _DIFFERENCES if key in self.model_fields_set]
        return arms | {key: getattr(self, key) for key in given}


class Manifest(_Entry):
    """Contents of ``racdeploy.json``.

    ``traces`` has hash and counts; ``verdict`` and ``headline`` are the verification's result.
    ``dense_tokenizer`` is set if the pruned model has a smaller vocabulary.
    """

    schema_version: Literal[2] = 2
    racdeploy_version: str
    base: BaseEntry
    recipe: Json
    traces: Json
    pruning: PruningEntry
    artifacts: tuple[ArtifactEntry, ...] = Field(min_length=1, max_length=64)
    tokenizer: TokenizerEntry
    dense_tokenizer: TokenizerEntry | None = None
    generation: GenerationSettings
    verdict: str
    headline: Headline

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Read and validate the manifest of a bundle; its paths exist and are inside the bundle.

        Raises:
            ArtifactError: not a bundle, a damaged manifest or one of another version, or a path
                outside the bundle.
        """
        file = bundle / MANIFEST_NAME
        if not file.is_file():
            raise _explain_not_a_bundle(bundle)

        manifest = cls.parse(file, str(file))

        # A manifest may come from a stranger: check all its paths before any file is opened.
        for entry in manifest.artifacts:
            for name in (entry.path, *entry.files, *entry.companions):
                _check_inside(bundle, name)
            if entry.files.get(entry.path) != entry.sha256:
                raise ArtifactError(
                    "invalid-manifest",
                    f"{file}: {entry.path!r} is not among its own files, or has another hash",
                )
            _check_size(bundle, entry)

        for tokenizer in manifest.tokenizers:
            for name in tokenizer.files:
                _check_inside(bundle, name)
        return manifest

    @classmethod
    def parse(cls, file: Path, where: str) -> Self:
        """Read and validate a manifest alone; ``where`` is its file in messages."""
        values = read_json(file, MAX_MANIFEST_BYTES, strict=True)
        check_version(cls, values, where)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ArtifactError(
                "invalid-manifest",
                f"{where}: {describe_validation_error(error)}",
                remedy="build the bundle again",
            ) from error

    @property
    def tokenizers(self) -> tuple[TokenizerEntry, ...]:
        """Tokenizer of the pruned model, then the dense model's if it differs."""
        return tuple(filter(None, (self.tokenizer, self.dense_tokenizer)))

    @property
    def listed(self) -> tuple[Files, ...]:
        """Files of each artifact and tokenizer, with their SHA-256."""
        artifacts = tuple(entry.files for entry in self.artifacts)
        return artifacts + tuple(entry.files for entry in self.tokenizers)

    def run_time(self, artifact: ArtifactEntry) -> RunTimeSettings:
        """Return what is needed to ask one of the artifacts."""
        return RunTimeSettings(self.base.name, artifact, self.tokenizer, self.generation)

    def of_dense_model(self) -> Self:
        """Return the manifest with the dense model's tokenizer, and without thinking control."""
        changed = {
            "tokenizer": self.dense_tokenizer or self.tokenizer,
            "generation": self.generation.without_control(),
        }
        return self.model_copy(update=changed)

    def check_tokenizer(self, bundle: Path) -> None:
        """Raise ArtifactError for the first tokenizer file that differs from its hash."""
        for entry in self.tokenizers:
            _check_hashes(bundle, entry.files)

    def check_files(self, bundle: Path) -> None:
        """Raise ArtifactError for the first listed file that differs from its hash."""
        for files in self.listed:
            _check_hashes(bundle, files)


def _explain_not_a_bundle(path: Path) -> ArtifactError:
    """Return the error for a path that is not a bundle; its remedy depends on what was found."""
    remedy = "give the folder that racdeploy build wrote: its last line names it"
    if not path.exists():
        return ArtifactError("no-such-folder", f"there is no folder {path}", remedy=remedy)

    message = f"{path} is not a bundle: it has no {MANIFEST_NAME}"
    if path.suffix == ".gguf":
        message = f"{path} is a GGUF file, not a bundle"
        remedy = f"racdeploy run, serve, inspect and compare take it as it is; or {remedy}"
    elif (path / "config.json").is_file():
        message = f"{path} is a model folder, not a bundle"
        remedy = f"racdeploy build {path} makes a bundle of it"
    return ArtifactError("not-a-bundle", message, remedy=remedy)


def _check_hashes(bundle: Path, listed: Mapping[str, str]) -> None:
    for name, expected in listed.items():
        if file_sha256(bundle / name) != expected:
            raise hash_error(bundle / name, expected)


def hash_error(file: Path, expected: str) -> ArtifactError:
    """Return the error for a file that does not have its hash."""
    return ArtifactError(
        "differs-from-manifest",
        f"{file} differs from its manifest: SHA-256 is not {expected[:16]}…",
        remedy="copy the bundle again, or build it again",
    )


def _check_size(bundle: Path, entry: ArtifactEntry) -> None:
    found_bytes = sum((bundle / name).stat().st_size for name in entry.files)
    if entry.size_bytes > found_bytes:
        raise ArtifactError(
            "artifact-cut-off",
            f"{bundle / MANIFEST_NAME} gives {entry.path!r} {entry.size_bytes:,} bytes, its files "
            f"have {found_bytes:,}",
            remedy="copy the bundle again, whole",
        )


def _check_inside(bundle: Path, name: str) -> None:
    path = Path(os.path.realpath(bundle / name))  # Path.resolve() raises for a loop of links
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
