"""Sparse kernels for stock engines, compiled on demand and used where they are proven and faster.

``racdeploy accel build`` takes them from racdeploy-kernels, or compiles them, for the installed
engines and tries them in a child process.
:func:`enable` then gives llama.cpp's the weights that have enough zeros, and :func:`choose_graph`
takes the second graph of packing bitmask_op. If they are not used, one line says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from racdeploy.accel import ggml_plugin, ort_operator, prebuilt, proof, verdicts
from racdeploy.accel.ggml_plugin import describe_way_in
from racdeploy.accel.ggml_weights import enable, forget
from racdeploy.accel.kept_weights import kept_files
from racdeploy.accel.library import Library, describe_maker
from racdeploy.accel.ort_operator import choose_graph
from racdeploy.accel.proof import Choice, Mode, Proof
from racdeploy.accel.source_list import SOURCES
from racdeploy.accel.verdicts import Verdict, choose_verdict
from racdeploy.errors import EngineError
from racdeploy.extras import is_installed
from racdeploy.storage.cores import available_cores

__all__ = [
    "SOURCES",
    "STOCK",
    "Built",
    "Choice",
    "Mode",
    "Proof",
    "Verdict",
    "build_installed",
    "can_be_built",
    "choose_graph",
    "describe_built",
    "describe_maker",
    "describe_prebuilt",
    "describe_verdicts",
    "describe_way_in",
    "enable",
    "explain_missing",
    "faster_from",
    "forget",
    "kept_files",
    "kernels",
    "readiness",
]

STOCK = "the engine's own"
_ENGINES = {
    "llama.cpp": ("llama_cpp", ggml_plugin.find_kernels),
    "onnxruntime": ("onnxruntime", ort_operator.find_kernels),
}


@dataclass(frozen=True)
class Built:
    """What ``racdeploy accel build`` made for one engine, if anything; see :class:`Proof`.

    Args:
        way_in: where in llama.cpp the kernels are.
        maker: ``prebuilt`` by whom, or ``compiled``, and why.
    """

    library: Path | None
    refusal: str
    verdicts: tuple[Verdict, ...] = ()
    way_in: str = ""
    maker: str = ""


def build_installed() -> dict[str, Built]:
    """Find or compile the kernels of every engine that is installed, and try them; by its name."""
    built: dict[str, Built] = {}
    for engine, (package, find_kernels) in _ENGINES.items():
        if not is_installed(package):
            continue

        found = find_kernels()
        if isinstance(found, str):
            built[engine] = Built(None, found)
        else:
            library = found.library.build()
            tried = found.prove(library)
            way_in = describe_way_in() if engine == "llama.cpp" else ""
            built[engine] = Built(
                library,
                tried.refusal,
                tried.verdicts,
                way_in,
                _explain_maker(found.library, library),
            )

    if not built:
        raise EngineError(
            "neither llama-cpp-python nor onnxruntime is installed",
            remedy='pip install "racdeploy[llamacpp]" or "racdeploy[ort]"',
        )

    return built


def readiness(engine: str = "llama.cpp") -> tuple[Path, Proof] | str:
    """Return the library that is used with an engine and its proof, or why there is none."""
    _, find_kernels = _ENGINES[engine]
    return proof.readiness(find_kernels())


def can_be_built(engine: str) -> bool:
    """Return whether an engine could have kernels on this machine and has none yet."""
    if engine not in _ENGINES:
        return False

    _, find_kernels = _ENGINES[engine]
    found = find_kernels()
    return not isinstance(found, str) and found.library.find() is None


def describe_prebuilt() -> tuple[bool, str]:
    """Return whether racdeploy-kernels has what is needed here, and what it has, or why nothing."""
    reasons = {}
    for engine, (_, find_kernels) in _ENGINES.items():
        found = find_kernels()
        if not isinstance(found, str):
            content = found.library.find_prebuilt()
            reasons[engine] = content if isinstance(content, str) else ""

    package = prebuilt.describe_package()
    if not package:
        return False, f"accel build compiles them, or: pip install {prebuilt.PACKAGE}"

    refused = sorted(set(filter(None, reasons.values())))
    if refused:
        return False, "; ".join(refused)
    return True, f"{package}, for {' and '.join(reasons) or 'no engine here'}"


def _explain_maker(library: Library, file: Path) -> str:
    content = library.find_prebuilt()
    maker = describe_maker(file)
    return f"{maker}: {content if isinstance(content, str) else prebuilt.describe_package()}"


def kernels(mode: Mode, threads: int = 0) -> str:
    """Return what answers depend on under a mode: sparse kernels and their build, or ``STOCK``.

    Args:
        threads: of the model; 0 stands for every core.
    """
    if mode == "off":
        return STOCK

    used = []
    for engine in _ENGINES:
        ready = readiness(engine)
        if isinstance(ready, str):
            continue

        library, tried = ready
        verdict = choose_verdict(tried.verdicts, threads if threads > 0 else available_cores())
        if verdict is not None and verdict.faster_from:
            used.append(f"sparse {tried.instruction_set} ({library.stem})")

    return ", ".join(used) or STOCK


def faster_from(threads: int = 0) -> dict[str, float]:
    """Return the least share of zeros at which llama.cpp is faster with kernels, by format.

    A format is one of ggml's, or one with a pattern, as ``q8_0 2:4``; those that are not faster on
    so many threads, 0 for every core, are left out: all of them where nothing is built.
    """
    ready = readiness()
    if isinstance(ready, str):
        return {}

    _, tried = ready
    verdict = choose_verdict(tried.verdicts, threads if threads > 0 else available_cores())
    return verdict.faster_from if verdict else {}


def describe_verdicts(engine: str, tried: Proof) -> dict[str, str]:
    """Return by number format from what zeros on an engine's kernels are faster, and how much."""
    dense_bits = ort_operator.DENSE_BITS if engine == "onnxruntime" else {}
    return verdicts.describe(tried.verdicts, dense_bits)


def describe_built(made: Built) -> Iterator[str]:
    """Yield who made an engine's kernels, where they are, and what was measured of them or not."""
    if made.maker:
        yield made.maker
    if made.way_in:
        yield made.way_in

    for verdict in made.verdicts:
        for name, speedups in verdict.speedups.items():
            cells = [f"{speedup:.2f}× at {float(at):.0%} zeros" for at, speedup in speedups.items()]
            yield f"{name}: {', '.join(cells)}, one token on {verdict}"

    if made.verdicts and (missing := explain_missing(made.verdicts)):
        yield missing


def explain_missing(measured: Sequence[Verdict]) -> str:
    """Say which threads have no verdict on this process's cores, and what to do; or nothing."""
    counts = {verdict.threads for verdict in measured}
    missing = [each for each in verdicts.thread_counts(available_cores()) if each not in counts]
    if not missing:
        return ""

    named = ", ".join(map(str, missing))
    return f"not measured on {named} threads: racdeploy accel build while nothing else runs"
