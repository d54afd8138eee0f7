"""Prove the installed racdeploy-kernels: the self-test of each engine that it has a library for.

How fast they are is not asked: machines that build are shared.
"""

from __future__ import annotations

import sys

import racdeploy_kernels

_SLOW = "are not faster than"  # the only refusal that is none of the library's


def main() -> int:
    """Return 1 where a library is missing, or did not pass its self-test."""
    engines = ["onnxruntime"]
    if sys.platform != "darwin":
        engines.append("llama.cpp")

    failed = 0
    for engine in engines:
        kernels = racdeploy_kernels.FINDERS[engine]()
        refusal = kernels if isinstance(kernels, str) else kernels.prove().refusal
        failed |= bool(refusal) and _SLOW not in refusal
        print(f"{engine}: {refusal or 'proven, and faster'}")

    return failed


if __name__ == "__main__":
    sys.exit(main())
