"""What a stranger's model may take in its engine's process, beside the engine itself, and do there.

Memory in all; and processor time of a step, after which there must be a token, or a part of a
prompt: loading is one step. It reads files and devices; it writes to devices, and where drivers
keep what they compile, and starts no program.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from racdeploy.engines.engine import EngineSettings
from racdeploy.processes import landlock
from racdeploy.processes.cores import available_cores
from racdeploy.processes.landlock import CHANGE_FILE, WRITE, Access

_PART = re.compile(r"-\d{5}-of-\d{5}$")
_PACKED = "_packed"

# Beside each: what real models and the smallest take at most, by their sizes.
_BASE_BYTES = 256 * 2**20
_FILE_FACTOR = 4  # weights as they are, and packed again for a processor: 2
_PACKED_FACTOR = 16  # bytes of weights for each of a packed file: 8
_TOKEN_BYTES = 8192  # of a model of 100 kB: 512
_TOKEN_SHARE = 1e-3  # of the files, keys and values of a token in float32: 4e-4
_LOGITS_FACTOR = 64  # a batch's logits, of a model with little but a vocabulary
_LOGITS_BYTES = 2**30
_THREAD_BYTES = 16 * 2**20  # a stack, and what the allocator keeps for it

# Of a step, on each thread. A prompt's batch of 512 tokens takes a tenth of it on a slow processor.
_STEP_SECONDS = 20.0
_STEP_SECONDS_PER_BYTE = 2e-7


def step_seconds(path: Path, settings: EngineSettings) -> float:
    """Return the processor time after which a step will never end."""
    files_bytes = sum(file.stat().st_size for file in _files_of(path))
    threads = settings.threads or available_cores()
    return threads * (_STEP_SECONDS + _STEP_SECONDS_PER_BYTE * files_bytes)


def memory_bytes(path: Path, settings: EngineSettings) -> int:
    """Return a limit that no healthy model comes near; it grows with the files and the context."""
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
    """Keep this process within that, where the system can."""
    compiled = os.environ.get("CUDA_CACHE_PATH") or Path.home() / ".nv/ComputeCache"
    allowed = {
        Path(compiled): WRITE,
        Path("/dev"): CHANGE_FILE,
        Path("/dev/shm"): WRITE,
    }
    landlock.restrict(WRITE | Access.EXECUTE, allowed)


def _files_of(path: Path) -> list[Path]:
    """Return the files that an artifact may consist of: parts of a GGUF, data beside a graph."""
    if path.suffix == ".onnx":
        return [file for file in path.parent.iterdir() if file.is_file()]

    stem = _PART.sub("", path.stem)
    parts = path.parent.glob("*" + path.suffix)
    return [file for file in parts if _PART.sub("", file.stem) == stem]
