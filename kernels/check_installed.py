"""Prove the installed racdeploy-kernels: the self-test of each engine that it has a library for.

How fast they are is not asked: machines that build are shared.
"""

from __future__ import annotations

import sys

import racdeploy_kernels
from racdeploy_kernels.proof import Proof


def main() -> int:
    """Return 1 where a library is missing, or did not pass its self-test."""
    engines = ["onnxruntime"]
    if sys.platform != "darwin":
        engines.append("llama.cpp")

    failed = False
    for engine in engines:
        kernels = racdeploy_kernels.FINDERS[engine]()
        proof = Proof(kernels, "") if isinstance(kernels, str) else kernels.prove()
        failed |= bool(proof.failure)
        passed = "" if proof.failure else "passed its self-test; "
        print(f"{engine}: {passed}{proof.explain_unused() or 'faster here'}")

    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
