"""Write a checkpoint into the file format of an engine: one file per format.

A format file holds the members of :class:`Format`. What could not be stored as asked is in the
result with a reason; nothing is dropped. An artifact is one main file, which an engine opens, and
the files it refers to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

from racdeploy import packing as packings
from racdeploy import plugins, recipe
from racdeploy.errors import UsageError
from racdeploy.files.writing import disk_errors
from racdeploy.manifest import ArtifactEntry, GenerationSettings, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family, generalize

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of the whole file."""
Metadata = Mapping[str, str | int | float | bool]
"""Further keys of a file, ``racdeploy.*`` or ``general.*``."""
_PART = re.compile(r"-\d{5}(-of-\d{5})$")
"""End of the names of a file's parts, without suffix."""


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of an exported file."""

    name: str  # in the file
    # Its name in the checkpoint's state_dict, the first of several that are laid into one; empty
    # where the exporter computed it.
    source: str
    shape: tuple[int, ...]  # as in the checkpoint, outputs first
    quant_asked: str
    quant_real: str
    reason: str  # why the two differ, or empty
    zeros: float  # fraction of zeros in the file, 0 to 1, counted in the dequantized bytes
    size_bytes: int  # as stored, without padding
    packing: str = "plain"
    packing_reason: str = ""  # why that is not the packing that was asked for, or empty

    @property
    def bits(self) -> float:
        """Bits of a weight, as stored."""
        return 8 * self.size_bytes / math.prod(self.shape)


@dataclass(frozen=True)
class Deviation:
    """Something of a whole file that is not as asked, see :class:`results.pruning.DeviationRow`."""

    what: str
    asked: str
    real: str
    reason: str


@dataclass(frozen=True)
class ExportResult:
    """A finished artifact."""

    path: Path  # its main file
    tensors: tuple[ExportedTensor, ...]  # in file order
    size_bytes: int  # of the files that every engine reads
    files: Mapping[str, str]  # SHA-256 of every file by its path from the main one's folder
    notes: tuple[str, ...] = ()  # what the engine will do unlike the checkpoint, in sentences
    unpacked_sha256: str = ""  # of the file that a packed one stands for; else empty
    deviations: tuple[Deviation, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the main file."""
        return self.files[self.path.name]

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Return JSON values, the path as seen from a folder above it."""
        return {
            **asdict(replace(self, path=Path())),
            "path": self.path.relative_to(folder).as_posix(),
        }

    @classmethod
    def from_json(cls, folder: Path, values: Mapping[str, Any]) -> ExportResult:
        """Read back what :meth:`to_json` returned for that folder."""
        tensors = tuple(
            ExportedTensor(**{**t, "shape": tuple(t["shape"])}) for t in values["tensors"]
        )
        rest = {key: values[key] for key in ("size_bytes", "files", "unpacked_sha256")}
        deviations = tuple(Deviation(**each) for each in values["deviations"])
        notes = tuple(values["notes"])
        return cls(folder / values["path"], tensors, notes=notes, deviations=deviations, **rest)


def measure_sparsity(result: ExportResult, sources: Collection[str]) -> float:
    """Return the fraction of zeros in an exported file, over the weights of some sources."""
    wanted = set(map(generalize, sources))
    linears = [tensor for tensor in result.tensors if tensor.source in wanted]
    zeros = sum(tensor.zeros * math.prod(tensor.shape) for tensor in linears)
    return zeros / sum(math.prod(tensor.shape) for tensor in linears)


@dataclass(frozen=True)
class MeasuredTensor:
    """One tensor of a file of any origin, as it was found there."""

    name: str  # in the file
    shape: tuple[int, ...]  # outputs first
    type: str  # its number format
    zeros: float | None  # fraction of zeros, 0 to 1; None where they cannot be counted
    size_bytes: int  # as stored
    packing: str = "plain"


class Format(Protocol):
    """A file format, as a module.

    ``BACKEND`` is the engine that reads it, ``NEEDS`` the packages that both take, with their
    extras, ``LIBRARY`` what the Hub calls it, ``COMPARES_F32`` whether its export compares its
    float32 form with torch, ``OPTIONS`` the keys of the recipe's ``[export]`` beside quant and
    packing that its ``export`` takes; ``check_options`` refuses what cannot be done with them here,
    before any work. ``artifact_path`` is the main file's place in a bundle. ``measure`` returns
    scalar metadata and one row per tensor; ``is_linear`` says whether a row is a prunable linear.
    ``unpack`` writes what a packed artifact stands for, beside it unless told otherwise.
    ``companions`` are the texts of further files that programs want in the bundle, by their path,
    and ``usage`` the lines of the model card that say how to run it.
    """

    BACKEND: str
    NEEDS: Mapping[str, str]
    LIBRARY: str
    COMPARES_F32: bool
    OPTIONS: tuple[str, ...]
    TOKENIZER_PREFIX: str
    """What its metadata keys on the tokenizer begin with; empty where a file holds none."""
    WEIGHT_SUFFIXES: tuple[str, ...]
    """What the names of weight files beside the main one add to its name."""

    def artifact_path(self, name: str, quant: str, packing: str) -> PurePosixPath: ...

    def check_options(self, **options: Any) -> None: ...

    def export(
        self,
        checkpoint: Checkpoint,
        out: Path,
        *,
        quant: str,
        packing: str,
        metadata: Metadata | None,
        progress: Progress | None,
        **options: Any,
    ) -> ExportResult: ...

    def refusal(self, checkpoint: Checkpoint, sizes: Collection[str], uniform: bool) -> str:
        """Return why the format cannot hold a dense model once parts of it are cut, or nothing.

        ``sizes`` are letters, as plugins of the kind ``structures`` say them; ``uniform`` says that
        all blocks get the same widths.
        """
        ...

    def write_approximated(
        self, checkpoint: Checkpoint, out: Path, pre_tokenizer: str | None
    ) -> str:
        """Write a file with the tokenizer alone if the engine may tokenize differently.

        Return its name for what comes nearest; empty, and no file, where it is known to be equal.
        Asked only of a format that has a ``TOKENIZER_PREFIX``.
        """
        ...

    def measure(self, path: Path) -> tuple[dict[str, Any], list[MeasuredTensor]]: ...

    def is_linear(self, family: Family, name: str) -> bool: ...

    def unpack(self, packed: Path, out: Path | None) -> Path: ...

    def companions(
        self, manifest: Manifest, checkpoint: Checkpoint, folder: Path
    ) -> Mapping[str, str]: ...

    def usage(self, entry: ArtifactEntry, settings: GenerationSettings) -> list[str]: ...


def load(name: str) -> Format:
    """Import the format of that name, or raise UnknownPluginError or MissingExtraError."""
    return cast(Format, plugins.load("formats", name))


def format_of(path: Path) -> str:
    """Return the format that a file's suffix names, packed or not, or an empty string."""
    name = path.suffix.removeprefix(".").removeprefix("rac")
    return name if name in plugins.names("formats") else ""


def weight_bytes(path: Path) -> int:
    """Return the bytes of an artifact's weight files: of all parts, and of those beside it."""
    found = _PART.search(path.stem)
    parts = [path]
    if found:
        stem = path.stem[: found.start()]
        parts = sorted(path.parent.glob(f"{stem}-*{found[1]}{path.suffix}"))

    beside = load(format_of(path)).WEIGHT_SUFFIXES
    files = [*parts, *(path.with_name(path.name + suffix) for suffix in beside)]
    return sum(file.stat().st_size for file in files if file.is_file())


def check(settings: recipe.Export) -> None:
    """Refuse a quant, packing or option that the format cannot write.

    Raises:
        UsageError: it never can.
        EnvironmentFailure: what an option asks for cannot run here.
    """
    packings.check(settings.format, settings.quant, settings.packing)
    chosen = load(settings.format)
    general = {"format", "quant", "packing", "allow_losing_zeros"}
    taken = general | {*chosen.OPTIONS}
    for name in sorted(settings.model_fields_set - taken):
        if getattr(settings, name) != type(settings).model_fields[name].get_default(
            call_default_factory=True
        ):
            raise UsageError(
                "unused-setting",
                f"format {settings.format!r} has no use for export.{name}",
                remedy="remove it",
            )

    chosen.check_options(**_options(settings))


def _options(settings: recipe.Export) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in load(settings.format).OPTIONS}


def check_metadata(metadata: Mapping[str, Any], reserved: Collection[str]) -> None:
    """Refuse a metadata key that is reserved, or in nobody's namespace, with a UsageError."""
    for key in metadata:
        if key in reserved or not key.startswith(("racdeploy.", "general.")):
            raise UsageError(
                "reserved-metadata-key",
                f"metadata key {key!r} is the exporter's; give racdeploy.* or general.* keys",
            )


def write(
    checkpoint: Checkpoint,
    out: Path,
    settings: recipe.Export,
    *,
    metadata: Metadata | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a checkpoint as the settings say; the folder of ``out``, the main file, is made.

    Args:
        metadata: further keys, ``racdeploy.*`` or ``general.*``.

    Raises:
        UsageError: see :func:`check`.
        ModelError: the checkpoint is damaged or has something that the engine does not compute.
        EnvironmentFailure: the disk is full or not writable.
    """
    check(settings)
    chosen = load(settings.format)
    if out.is_dir():
        raise UsageError(
            "out-is-folder",
            f"{out} is a folder, and --out names the file to write",
            remedy=f"name a file in it, as --out {out / 'model'}{Path(out.name).suffix or '.gguf'}",
        )

    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return chosen.export(
        checkpoint,
        out,
        quant=settings.quant,
        packing=settings.packing,
        metadata=metadata,
        progress=progress,
        **_options(settings),
    )
