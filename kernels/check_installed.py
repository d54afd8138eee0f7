"""Prove the installed racdeploy-kernels: the self-test of each engine that it has a library for.

How fast they are is not asked: machines that build are shared.
"""

from __future__ import annotations

import sys

from racdeploy import accel

_SLOW = "are not faster than"  # the only refusal that is none of the library's


def main() -> int:
    """Return 1 where a library is missing, was compiled here, or did not pass its self-test."""
    engines = ["onnxruntime"]
    if sys.platform != "darwin":
        engines.append("llama.cpp")

    failed = 0
    built = accel.build_installed()
    for engine in engines:
        made = built.get(engine, accel.Built(None, "it is not installed"))
        is_proven = made.library is not None and (not made.refusal or _SLOW in made.refusal)
        failed |= not (is_proven and made.maker.startswith("prebuilt"))
        print(f"{engine}: {made.maker or 'none'}; {made.refusal or 'proven, and faster'}")

    return failed


if __name__ == "__main__":
    sys.exit(main())
