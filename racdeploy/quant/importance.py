"""Importance matrices: the mean square of every input, which is the diagonal of the Hessian.

Pruning writes them as safetensors under the checkpoint's tensor names. llama.cpp's file is GGUF,
with ``NAME.in_sum2`` and ``NAME.counts`` under the names of the GGUF model.
Source: ``common/imatrix-loader.cpp`` and ``tools/imatrix/imatrix.cpp`` of llama.cpp.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.partials import partial_folder
from racdeploy.files.writing import disk_errors
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.quant.grid import Floats
from racdeploy.tensors.ggml_types import GGML_TYPES
from racdeploy.tensors.gguf_header import TensorInfo, read_header
from racdeploy.tensors.safetensors import read_tensor_entries

_SUMS, _COUNTS, _TOKENS = ".in_sum2", ".counts", ".tokens"
# Of the mean: a block of inputs that were never active would otherwise have no scale (NaN).
_MIN_IMPORTANCE = 1e-4
_REMEDY = "make it again with llama-imatrix, or prune again"


@dataclass(frozen=True)
class Importance:
    """Mean squares of inputs and their token counts, by the weight's name in checkpoint or GGUF."""

    file: Path
    means: Mapping[str, Floats]
    tokens: Mapping[str, int]

    @classmethod
    def read(cls, file: Path) -> Importance:
        """Read a file of either format.

        Raises:
            UsageError: there is no such file.
            ArtifactError: it is damaged, empty, or no importance matrix.
        """
        if not file.is_file():
            raise UsageError(
                "no-importance-file",
                f"{file} is not a file",
                remedy="give the path of an importance matrix in export.importance",
            )

        read = _read_imatrix if file.suffix == ".gguf" else _read_statistic
        means, tokens = read(file)

        for name, mean_I in means.items():
            if not np.isfinite(mean_I).all() or (mean_I < 0).any():
                raise ArtifactError(
                    "importance-not-finite",
                    f"{file}: the importance of {name!r} is negative, infinite or not a number",
                    remedy=_REMEDY,
                )

        if not means:
            raise ArtifactError(
                "no-importance-matrix",
                f"{file} holds no importance",
                remedy="give what llama-imatrix or the pruning wrote",
            )

        return cls(file, means, tokens)

    def for_weight(self, name: str, source: str, columns: int) -> Floats | None:
        """Return importance_I of a weight, all above 0, or None if unknown.

        Args:
            name: of the weight in the exported file.
            source: its name in the checkpoint.
            columns: number of inputs, for a check.
        """
        mean_I = self.means.get(name, self.means.get(source))
        if mean_I is None or not mean_I.any():
            return None

        if mean_I.shape != (columns,):
            raise ArtifactError(
                "importance-of-other-model",
                f"{self.file}: {name!r} has {columns} inputs and importances for {mean_I.size}",
                remedy="it was made for another model; leave export.importance out",
            )

        return normalize(mean_I)

    def _sum_experts(self, parts: Sequence[str]) -> tuple[Floats, Floats]:
        """Return the sums of squares and the tokens of each part; zeros if it has no tokens."""
        known_I = next(self.means[part] for part in parts if part in self.means)
        none_I = np.zeros_like(known_I)

        rows = [self.means.get(part, none_I) for part in parts]
        counts = [self.tokens.get(part, 0) for part in parts]
        count_E1 = np.array(counts, dtype=np.float32)[:, None]
        return np.stack(rows) * count_E1, count_E1

    def write_imatrix(self, file: Path, names: Mapping[str, Sequence[str]]) -> None:
        """Write an importance matrix that llama.cpp reads.

        Args:
            names: name in the exported file → names in the checkpoint, one for each expert.
        """
        sources = {}
        for name, parts in names.items():
            if not self.means.keys().isdisjoint(parts):
                sources[name] = parts
        known = self.tokens.keys() & chain.from_iterable(sources.values())
        max_tokens = max(self.tokens[part] for part in known)

        with disk_errors(file), partial_folder(file) as scratch:
            written = scratch / file.name
            with contextlib.closing(GGUFWriter(written, arch="")) as writer:
                writer.add_type("imatrix")
                writer.add_array("imatrix.datasets", ["racdeploy calibration"])
                writer.add_uint32("imatrix.chunk_count", 1)
                writer.add_uint32("imatrix.chunk_size", max_tokens)

                for name, parts in sorted(sources.items()):
                    sum_EI, count_E1 = self._sum_experts(parts)
                    writer.add_tensor(name + _SUMS, sum_EI)
                    writer.add_tensor(name + _COUNTS, count_E1)

                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()

            written.replace(file)


def normalize(mean_I: Floats) -> Floats:
    """Return importance_I for number formats, with mean 1 and above 0, from mean squares."""
    scaled_I: Floats = mean_I / np.float32(mean_I.mean(dtype=np.float64))
    return np.maximum(scaled_I, np.float32(_MIN_IMPORTANCE))


def find_importance(folder: Path, setting: str) -> Importance | None:
    """Return the importance for an export: the file of the setting, or the pruned model's own.

    It is None for the setting ``none`` and for models without a file.
    """
    if setting == "none":
        return None
    if setting:
        return Importance.read(Path(setting))
    file = folder / IMPORTANCE_FILE
    return Importance.read(file) if file.is_file() else None


_Read = tuple[dict[str, Floats], dict[str, int]]


def _read_statistic(file: Path) -> _Read:
    """Read the file that pruning writes: mean_I and a token count for each linear."""
    entries = read_tensor_entries(file)
    means = {}
    tokens = {}

    for name, entry in entries.items():
        if name.endswith(_TOKENS):
            continue

        count = entries.get(name + _TOKENS)
        is_row = entry.dtype == "F32" and len(entry.shape) == 1
        if not is_row or count is None or (count.dtype, count.shape) != ("F64", (1,)):
            raise _refusal(file, f"{name!r} is no importance of one row with its number of tokens")

        means[name] = entry.read()
        tokens[name] = _read_count(file, name, float(count.read()[0]))

    return means, tokens


def _read_imatrix(file: Path) -> _Read:
    """Read llama.cpp's GGUF file; tensors of several experts are skipped."""
    header = read_header(file)
    if header.metadata.get("general.type") != "imatrix":
        raise ArtifactError(
            "no-importance-matrix",
            f"{file} is a GGUF file and no importance matrix",
            remedy="give what llama-imatrix wrote",
        )

    tensors = {tensor.name: tensor for tensor in header.tensors}
    means = {}
    tokens = {}

    for sums in tensors:
        name, end, rest = sums.rpartition(_SUMS)
        if not end or rest:
            continue

        if name + _COUNTS not in tensors:
            raise _refusal(file, f"{name!r} has sums and no counts")

        sum_EI = _read_matrix(file, tensors[name + _SUMS])
        count_E1 = _read_matrix(file, tensors[name + _COUNTS])
        E = len(sum_EI)
        if count_E1.shape != (E, 1):
            raise _refusal(file, f"{name!r} has {E} sums and {len(count_E1)} counts")

        if E == 1 and (count := float(count_E1[0, 0])):
            tokens[name] = _read_count(file, name, count)
            with np.errstate(over="ignore", invalid="ignore"):  # refused with all that is infinite
                means[name] = (sum_EI / count_E1)[0]

    return means, tokens


def _read_matrix(file: Path, tensor: TensorInfo) -> Floats:
    if tensor.ggml_type != GGML_TYPES["f32"].type_id or len(tensor.dimensions) > 2:
        raise _refusal(file, f"{tensor.name!r} is not a matrix of F32")
    values = np.fromfile(file, "<f4", tensor.size_bytes // 4, offset=tensor.position)
    return values.reshape(-1, tensor.dimensions[0])


def _read_count(file: Path, name: str, count: float) -> int:
    if not 0 < count < 2**53:  # NaN is refused, too
        raise _refusal(file, f"{name!r} rests on {count} tokens")
    return max(1, round(count))


def _refusal(file: Path, message: str) -> ArtifactError:
    return ArtifactError("damaged-importance", f"{file}: {message}", remedy=_REMEDY)
