"""Which weights of a GGUF file go to the plug-in for llama.cpp: those with enough zeros to gain."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from racdeploy.accel import kept_weights
from racdeploy.accel.ggml_plugin import Plugin, Zeros, find_kernels
from racdeploy.accel.library import cache_folder
from racdeploy.accel.proof import Choice, Mode, choose_by_mode, pin, readiness
from racdeploy.accel.verdicts import Verdict, choose_verdict
from racdeploy.errors import ArtifactError, EnvironmentFailure
from racdeploy.storage.checked import file_state
from racdeploy.storage.cores import available_cores
from racdeploy.storage.files import canonical_hash, write_atomic
from racdeploy.storage.gguf_header import read_header
from racdeploy.storage.ownership import make_private, open_own

_READ_AHEAD_BYTES = 16 << 20
_NEVER = 2.0  # a share of zeros that no matrix has


def enable(path: str | Path, mode: Mode = "auto", *, threads: int = 0, keep: bool = True) -> Choice:
    """Give the sparse weights of a GGUF file to the kernels when llama.cpp loads it next.

    Call it before every model that is to be accelerated, and before the first model of the process
    is loaded. Models that are loaded later without it run as ever.

    Args:
        mode: ``auto`` leaves everything to llama.cpp where the kernels cannot be used or are not
            faster; ``require`` makes that an error; ``off`` does nothing.
        threads: that the model will run on, which decide whether the kernels are faster, and that
            pack it now; 0 stands for every core. With llama-cpp-python it is ``n_threads``.
        keep: take the packed weights from a file in the user's cache, written by the first load
            where the system maps it in huge pages. ``RACDEPLOY_ACCEL_KEEP`` 0 never keeps one, 1
            wherever it can be written.

    Raises:
        EngineError: the kernels are required, and not ready or of no use to this file.
        ArtifactError: the file is not a GGUF file, or damaged.
    """
    file = Path(path)
    find = functools.partial(_enable, file, threads, keep)
    return choose_by_mode(
        file,
        mode,
        "llama.cpp's own kernels",
        find,
    )


def forget(path: str | Path) -> None:
    """Delete what is kept of a GGUF file: its packed weights and the counts of its zeros."""
    model = Path(path)
    kept_weights.locate(model).unlink(missing_ok=True)
    _zeros_file(model).unlink(missing_ok=True)


def _enable(path: Path, threads: int, keep: bool) -> Choice | str:
    ready = readiness(find_kernels())
    if isinstance(ready, str):
        return ready
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file", remedy="give a .gguf file")

    library, proof = ready
    kernels = proof.instruction_set
    plugin = _load(pin(library, proof.sha256))
    if plugin.instruction_set != kernels:
        return f"the kernels were tried on another processor ({kernels}): racdeploy accel build"

    threads = threads if threads > 0 else available_cores()
    verdict = choose_verdict(proof.verdicts, threads) or Verdict(threads)
    found = _zeros(plugin, path, threads)
    names = _choose_names(found, verdict)

    if not plugin.enable(names, threads):
        return "a model was loaded in this process before; call racdeploy.accel.enable first"
    if not names:
        return _explain_none(
            path,
            found,
            verdict,
            f"{kernels} kernels on {verdict.name(threads)}",
        )

    threading.Thread(target=_read_ahead, args=(path,), daemon=True).start()
    kept = keep and kept_weights.is_wanted() and _keep(plugin, path, names)
    place = " on a device of ggml" if plugin.is_device else ""
    summary = f"sparse {kernels} kernels{place} for {len(names)} matrices"
    return Choice(
        path,
        summary,
        tensors=tuple(names),
        kept=kept,
        packed=plugin.packed,
    )


def _choose_names(found: Zeros, verdict: Verdict) -> list[str]:
    """Return the weights with enough zeros for the kernels to be faster."""
    faster_from = verdict.faster_from
    return [
        name for name, (quant, zeros) in found.items() if zeros >= faster_from.get(quant, _NEVER)
    ]


def _explain_none(path: Path, found: Zeros, verdict: Verdict, tried: str) -> str:
    """Say why no weight of a file is faster with the kernels."""
    formats = {quant for quant, _ in found.values()}
    if not formats:
        return f"{path.name} has no matrix in a number format that they are for"

    enough = [zeros for quant, zeros in verdict.faster_from.items() if quant in formats]
    if not enough:
        named = " or ".join(sorted(formats))
        return f"no share of zeros makes the sparse ones faster for {named} ({tried})"

    least = f"{min(enough):.0%} at the least ({tried})"
    return f"no matrix of {path.name} has enough zeros, which is {least}"


def _keep(plugin: Plugin, path: Path, names: Sequence[str]) -> bool:
    """Use the model's kept file, after writing it where there is none that fits."""
    use = functools.partial(kept_weights.use, plugin, path, names)
    return use() or (kept_weights.write(plugin, path, names) and use())


def _zeros(plugin: Plugin, path: Path, threads: int) -> Zeros:
    file = _zeros_file(path)
    form = plugin.form  # which matrices are 2:4 is for the kernels to say
    counted = _read_zeros(file, form)
    if counted is not None:
        return counted

    header = read_header(path)
    zeros = plugin.zeros(path, header, threads)

    # A cache that cannot be written: counted again next time.
    with contextlib.suppress(OSError, EnvironmentFailure):
        make_private(file.parent)
        text = json.dumps({"zeros": zeros, "sha256": canonical_hash([zeros, form])})
        write_atomic(file, text, mode=0o600)

    return zeros


def _read_zeros(file: Path, form: Sequence[int | str]) -> Zeros | None:
    """Return what was counted; None where nothing was, or it is damaged or of another user.

    Counts of kernels that pack in another ``form`` are none.
    """
    try:
        with open(open_own(file), "rb") as stream:
            kept = json.load(stream)
        zeros = {name: (str(quant), float(share)) for name, (quant, share) in kept["zeros"].items()}
        is_whole = kept["sha256"] == canonical_hash([zeros, form])
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None
    return zeros if is_whole else None


def _zeros_file(path: Path) -> Path:
    digest = canonical_hash(file_state(path))
    return cache_folder() / "zeros" / f"{digest[:32]}.json"


def _read_ahead(path: Path) -> None:
    """Have the system read a file while weights are packed: llama.cpp reads and packs by turns."""
    if not hasattr(os, "posix_fadvise"):
        return

    size_bytes = path.stat().st_size
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size_bytes > memory_bytes // 2:
        return  # of a file that large, what comes first would be gone when its turn comes

    with contextlib.suppress(OSError), path.open("rb", buffering=0) as stream:
        for start in range(0, size_bytes, _READ_AHEAD_BYTES):
            os.posix_fadvise(
                stream.fileno(),
                start,
                _READ_AHEAD_BYTES,
                os.POSIX_FADV_WILLNEED,
            )


_load = functools.cache(Plugin)  # it stays in the process
