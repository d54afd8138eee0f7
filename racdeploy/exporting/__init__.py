"""Write a checkpoint into the file format of an engine: one file per format.

A format module has the members of :class:`Format`. Whatever is not stored as requested is in the
result with a reason; nothing is dropped. An artifact is one main file, which an engine opens, and
the files that it refers to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

from pydantic import TypeAdapter

from racdeploy import packing as packings
from racdeploy import plugins, recipe
from racdeploy.errors import UsageError
from racdeploy.files.reading import Json
from racdeploy.files.writing import disk_errors
from racdeploy.manifest import ArtifactEntry, GenerationSettings, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family, generalize_expert
from racdeploy.results.pruning import DeviationRow

WriteProgress = Callable[[int, int], None]
"""Called with the bytes (ONNX: weights) written so far, and their total."""
Metadata = Mapping[str, str | int | float | bool]
"""Additional metadata keys of a file, ``racdeploy.*`` or ``general.*``."""
_PART = re.compile(r"-\d{5}(-of-\d{5})$")
"""End of the file names of a split model, without suffix."""


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor of an exported file."""

    name: str  # in the file
    # Its name in the checkpoint's state_dict, the first of several that are fused; empty if the
    # exporter computed it.
    source: str
    shape: tuple[int, ...]  # as in the checkpoint, outputs first
    requested_quant: str
    actual_quant: str
    reason: str  # why the two quants differ, or empty
    zeros: float  # fraction of zeros in the file, 0 to 1, counted in the dequantized bytes
    size_bytes: int  # as stored, without padding
    packing: str = "plain"
    packing_reason: str = ""  # why it is not the requested packing, or empty

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.size_bytes / math.prod(self.shape)


@dataclass(frozen=True)
class ExportResult:
    """A finished artifact: its files, its tensors, and how it differs from the request."""

    path: Path  # its main file
    tensors: tuple[ExportedTensor, ...]  # in file order
    size_bytes: int  # of the files that every engine reads
    files: Mapping[str, str]  # path from the main file's folder → SHA-256, of all files
    notes: tuple[str, ...] = ()  # sentences: how the engine will differ from the checkpoint
    unpacked_sha256: str = ""  # of the plain file, if this one is a container
    deviations: tuple[DeviationRow, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the main file."""
        return self.files[self.path.name]

    def to_json(self, folder: Path) -> Json:
        """Return the result as JSON values; its path is relative to ``folder``."""
        values = TypeAdapter(type(self)).dump_python(replace(self, path=Path()))
        return {**values, "path": self.path.relative_to(folder).as_posix()}

    @classmethod
    def from_json(cls, folder: Path, values: Mapping[str, Any]) -> ExportResult:
        """Return the result of which :meth:`to_json` returned these values for that folder."""
        path = folder / values["path"]
        return TypeAdapter(cls).validate_python({**values, "path": path})


def measure_sparsity(result: ExportResult, sources: Collection[str]) -> float:
    """Return the fraction of zeros, 0 to 1, in an exported file over some of its tensors.

    Args:
        sources: names of these tensors in the checkpoint.
    """
    names = set(map(generalize_expert, sources))
    linears = [tensor for tensor in result.tensors if tensor.source in names]
    zeros = sum(tensor.zeros * math.prod(tensor.shape) for tensor in linears)
    return zeros / sum(math.prod(tensor.shape) for tensor in linears)


@dataclass(frozen=True)
class MeasuredTensor:
    """A tensor of a file of any origin, as it was read from there."""

    name: str  # in the file
    shape: tuple[int, ...]  # outputs first
    type: str  # number format
    zeros: float | None  # fraction of zeros, 0 to 1; None if they cannot be counted
    size_bytes: int  # as stored
    packing: str = "plain"


class Format(Protocol):
    """A file format, as a module.

    ``BACKEND``: the engine that reads it. ``REQUIRED_PACKAGES``: the packages that export and
    engine need → their extras. ``HUB_LIBRARY``: its library_name on the Hub. ``COMPARES_F32``: its
    export compares a float32 graph with torch. ``OPTIONS``: keys of the recipe's ``[export]``,
    other than quant and packing, that its ``export`` takes.

    ``check_options`` refuses options that cannot work here, before any work. ``artifact_path`` is
    the path of the main file in a bundle. ``measure`` returns scalar metadata and one row per
    tensor. ``companions`` returns
    the texts of additional files that programs expect in the bundle, by path, and ``usage`` the
    lines of the model card on how to run it.
    """

    BACKEND: str
    COMMON_QUANTS: tuple[str, str]
    """What people download: a dense model without loss, the reference, and a narrow one."""
    REQUIRED_PACKAGES: Mapping[str, str]
    HUB_LIBRARY: str
    COMPARES_F32: bool
    OPTIONS: tuple[str, ...]
    TOKENIZER_PREFIX: str
    """Prefix of its metadata keys about the tokenizer; empty if its files have none."""
    WEIGHT_SUFFIXES: tuple[str, ...]
    """Suffixes that weight files beside the main one add to its name."""

    def artifact_path(self, name: str, quant: str, packing: str) -> PurePosixPath: ...

    def check_options(self, settings: recipe.Export) -> None: ...

    def export(
        self,
        checkpoint: Checkpoint,
        out: Path,
        *,
        quant: str,
        packing: str,
        metadata: Metadata | None,
        progress: WriteProgress | None,
        **options: Any,
    ) -> ExportResult: ...

    def unsupported_reason(
        self, checkpoint: Checkpoint, sizes: Collection[str], uniform: bool
    ) -> str:
        """Return why the format cannot hold a model that is cut like this, or an empty string.

        Args:
            checkpoint: the dense model.
            sizes: letters of the sizes that are cut: ``SIZE_LETTER`` of structure plugins.
            uniform: all blocks get the same widths.
        """
        ...

    def write_approximate_tokenizer(
        self, checkpoint: Checkpoint, out: Path, pre_tokenizer: str | None
    ) -> str:
        """Write a file with only the tokenizer if the engine may tokenize differently.

        Called only for a format with a ``TOKENIZER_PREFIX``.

        Returns:
            The engine's name of the nearest pre-tokenizer; empty, and no file is written, if the
            engine is known to tokenize equally.
        """
        ...

    def measure(self, path: Path) -> tuple[Json, list[MeasuredTensor]]: ...

    def list_linears(
        self, family: Family, metadata: Json, tensors: Iterable[MeasuredTensor]
    ) -> frozenset[str]:
        """Return the names of the tensors of a file that are prunable linears.

        Args:
            metadata, tensors: of the file, from ``measure``.
        """
        ...

    def companions(
        self, manifest: Manifest, checkpoint: Checkpoint, folder: Path
    ) -> Mapping[str, str]: ...

    def usage(self, entry: ArtifactEntry, settings: GenerationSettings) -> list[str]: ...


def load(name: str) -> Format:
    """Import the format of that name, or raise UnknownPluginError or MissingExtraError."""
    return cast(Format, plugins.load("formats", name))


def find_format(path: Path) -> str:
    """Return the format of a file by its suffix, packed or not, or an empty string."""
    name = path.suffix.removeprefix(".").removeprefix("rac")
    return name if name in plugins.list_names("formats") else ""


def count_weight_bytes(path: Path) -> int:
    """Return the bytes of all weight files of an artifact: its parts, and files beside them."""
    match = _PART.search(path.stem)
    parts = [path]
    if match:
        stem = path.stem[: match.start()]
        parts = sorted(path.parent.glob(f"{stem}-*{match[1]}{path.suffix}"))

    suffixes = load(find_format(path)).WEIGHT_SUFFIXES
    files = [*parts, *(path.with_name(path.name + suffix) for suffix in suffixes)]
    return sum(file.stat().st_size for file in files if file.is_file())


def check(settings: recipe.Export) -> None:
    """Refuse a quant, packing or option that the format cannot write.

    Raises:
        UsageError: the format does not support it.
        EnvironmentFailure: it needs something that cannot run here.
    """
    packings.check(settings.format, settings.quant, settings.packing)
    form = load(settings.format)
    general = {"format", "quant", "packing", "rounding", "allow_losing_zeros"}
    supported = general | {*form.OPTIONS}

    # An option that is set to its default is harmless: a recipe may have been written in full.
    for name in sorted(settings.model_fields_set - supported):
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise UsageError(
                "unused-setting",
                f"format {settings.format!r} has no use for export.{name}",
                remedy="remove it",
            )

    form.check_options(settings)


def check_metadata(metadata: Mapping[str, Any], reserved: Collection[str]) -> None:
    """Raise a UsageError for a metadata key that is reserved, or has another prefix."""
    for key in metadata:
        if key in reserved or not key.startswith(("racdeploy.", "general.")):
            raise UsageError(
                "reserved-metadata-key",
                f"metadata key {key!r} is reserved; give racdeploy.* or general.* keys",
            )


def write(
    checkpoint: Checkpoint,
    out: Path,
    settings: recipe.Export,
    *,
    metadata: Metadata | None = None,
    progress: WriteProgress | None = None,
) -> ExportResult:
    """Export a checkpoint with the recipe's ``[export]`` settings.

    Args:
        out: the main file to write; its folder is created.
        metadata: additional keys, ``racdeploy.*`` or ``general.*``.

    Raises:
        UsageError: see :func:`check`.
        ModelError: the checkpoint is damaged, or needs something that the engine does not compute.
        EnvironmentFailure: the disk is full or not writable.
    """
    check(settings)
    form = load(settings.format)
    if out.is_dir():
        raise UsageError(
            "out-is-folder",
            f"{out} is a folder, and --out names the file to write",
            remedy=f"name a file in it, as --out {out / 'model'}{Path(out.name).suffix or '.gguf'}",
        )

    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(settings, name) for name in form.OPTIONS}
    return form.export(
        checkpoint,
        out,
        quant=settings.quant,
        packing=settings.packing,
        metadata=metadata,
        progress=progress,
        **options,
    )
