"""Limits of an engine's process, for models that come from strangers.

Memory is limited in all, and processor time for each step: to load the model, to read a part of a
prompt, to generate a token. The process reads files and devices; it writes to devices and to the
folder in which drivers keep compiled kernels, and starts no program.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from racdeploy.engines.engine import EngineSettings
from racdeploy.processes import landlock, privileges
from racdeploy.processes.cores import available_cores
from racdeploy.processes.landlock import CHANGE_FILE, WRITE, Access

TOKENIZER_STACK_BYTES = 64 * 2**20
"""Stack of llama.cpp's tokenizer, which took up to 14 MB for its longest text, 32,768 bytes."""

_PART = re.compile(r"-\d{5}-of-\d{5}$")
_PACKED = "_packed"

# The number in a comment is the most that models took, real ones and the smallest.
_BASE_BYTES = 256 * 2**20 + TOKENIZER_STACK_BYTES
_FILE_FACTOR = 4  # the weights, and a copy repacked for the processor: 2
_PACKED_FACTOR = 16  # bytes of weights for each byte of a packed file: 8
_TOKEN_BYTES = 8192  # of a token in the cache, in a model of 100 kB: 512
_TOKEN_SHARE = 1e-3  # of the files, for keys and values of a token in float32: 4e-4
_LOGITS_FACTOR = 64  # times the files: a batch's logits, where the vocabulary is most of the model
_LOGITS_BYTES = 2**30
_THREAD_BYTES = 16 * 2**20  # a stack, and the memory that the allocator keeps for the thread

# For each thread in a step. A batch of 512 prompt tokens takes a tenth of it on a slow processor.
_STEP_SECONDS = 20.0
_STEP_SECONDS_PER_BYTE = 2e-7


def step_limit_seconds(path: Path, settings: EngineSettings) -> float:
    """Return the processor seconds, over all threads, after which a step counts as endless."""
    files_bytes = sum(file.stat().st_size for file in _files_of(path))
    threads = settings.threads or available_cores()
    return threads * (_STEP_SECONDS + _STEP_SECONDS_PER_BYTE * files_bytes)


def memory_limit_bytes(path: Path, settings: EngineSettings) -> int:
    """Return the memory limit of a model, in bytes; no healthy model comes near it.

    It grows with the size of the files, and with context and parallel sequences.
    """
    sizes = {file: file.stat().st_size for file in _files_of(path)}
    files_bytes = sum(sizes.values())
    packed_bytes = sum(size for file, size in sizes.items() if file.name.endswith(_PACKED))

    tokens = settings.context_tokens * settings.parallel
    cache_bytes = tokens * (_TOKEN_BYTES + int(_TOKEN_SHARE * files_bytes))
    logits_bytes = settings.parallel * min(_LOGITS_FACTOR * files_bytes, _LOGITS_BYTES)
    threads_bytes = _THREAD_BYTES * (settings.threads or available_cores())

    weights_bytes = _FILE_FACTOR * files_bytes + _PACKED_FACTOR * packed_bytes
    return _BASE_BYTES + weights_bytes + cache_bytes + logits_bytes + threads_bytes


def restrict() -> None:
    """Deny this process new programs, and files but for devices and compiled kernels.

    Without Landlock, nothing is denied.
    """
    compiled_kernels = os.environ.get("CUDA_CACHE_PATH") or Path.home() / ".nv/ComputeCache"
    allowed = {
        Path(compiled_kernels): WRITE,
        Path("/dev"): CHANGE_FILE,
        Path("/dev/shm"): WRITE,
    }
    landlock.restrict(WRITE | Access.EXECUTE, allowed)
    privileges.give_up("engine")


def _files_of(path: Path) -> list[Path]:
    """Return the files of an artifact: all parts of a GGUF, or all data beside an ONNX graph."""
    if path.suffix == ".onnx":
        return [file for file in path.parent.iterdir() if file.is_file()]

    stem = _PART.sub("", path.stem)
    parts = path.parent.glob("*" + path.suffix)
    return [file for file in parts if _PART.sub("", file.stem) == stem]
