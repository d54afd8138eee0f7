"""Choice of the weights of a GGUF file that the llama.cpp plug-in runs: those with many zeros."""

from __future__ import annotations

from pathlib import Path

from racdeploy.errors import ArtifactError
from racdeploy.sparse_kernels import KernelChoice
from racdeploy.tensors.gguf_header import read_header
from racdeploy_kernels.ggml_plugin import Plugin, Zeros
from racdeploy_kernels.library import PROVE, pin
from racdeploy_kernels.proof import Proof
from racdeploy_kernels.verdicts import ThreadVerdict, choose_verdict

_NEVER = 2.0  # a share of zeros that no matrix has
_plugins: dict[Path, Plugin] = {}  # by their files: they stay in the process


def enable(path: Path, threads: int, library: Path, proof: Proof) -> KernelChoice | str:
    """Give a file's sparse weights to the kernels when llama.cpp loads it next.

    If that is not possible, return the reason.

    Args:
        threads: number of threads that pack the weights and run the model.
    """
    if not path.is_file():
        raise ArtifactError("no-gguf-file", f"{path} is not a file", remedy="give a .gguf file")

    kernels = proof.instruction_set
    plugin = _load(pin(library, proof.sha256))
    if plugin.instruction_set != kernels:
        return f"the kernels were tried on another processor ({kernels}): {PROVE}"

    verdict = choose_verdict(proof.verdicts, threads) or ThreadVerdict(threads)
    zeros = plugin.zeros(path, read_header(path), threads)
    names = _choose_names(zeros, verdict)
    if not plugin.enable(names, threads):
        return "ggml does not take the kernels"
    if not names:
        tried = f"{kernels} kernels on {verdict.name(threads)}"
        return _explain_none(path, zeros, verdict, tried)

    summary = f"sparse {kernels} kernels for {len(names)} matrices"
    return KernelChoice(path, summary, tensors=tuple(names), count_packed=plugin.packed)


def disable() -> None:
    """Forget the names of an enabled model, which the plug-in keeps until a model is loaded."""
    for plugin in _plugins.values():
        plugin.enable([], 1)


def _load(file: Path) -> Plugin:
    if file not in _plugins:
        _plugins[file] = Plugin(file)
    return _plugins[file]


def _choose_names(shares: Zeros, verdict: ThreadVerdict) -> list[str]:
    """Return the weights with enough zeros for the kernels to be faster."""
    faster_from = verdict.faster_from
    return [
        name for name, (quant, zeros) in shares.items() if zeros >= faster_from.get(quant, _NEVER)
    ]


def _explain_none(path: Path, shares: Zeros, verdict: ThreadVerdict, tried: str) -> str:
    """Return the reason why no weight of a file is faster with the kernels."""
    formats = {quant for quant, _ in shares.values()}
    if not formats:
        return f"{path.name} has no matrix in a number format that they are for"

    enough = [zeros for quant, zeros in verdict.faster_from.items() if quant in formats]
    if not enough:
        named = " or ".join(sorted(formats))
        return f"no share of zeros makes the sparse ones faster for {named} ({tried})"

    minimum = f"{min(enough):.0%} at the least ({tried})"
    return f"no matrix of {path.name} has enough zeros, which is {minimum}"
