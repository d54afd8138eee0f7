"""Prove the installed racdeploy-kernels on this machine: the self-test of each engine that is here.

How fast they are is not asked: machines that build are shared.
"""

from __future__ import annotations

import sys

from racdeploy import accel


def main() -> int:
    """Return 1 where a library was compiled here, or did not pass its self-test."""
    failed = 0
    for engine, made in accel.build_installed().items():
        if made.library is None:
            print(f"{engine}: {made.refusal}")
            continue

        is_good = made.maker.startswith("prebuilt") and "self-test" not in made.refusal
        failed |= not is_good
        print(f"{engine}: {made.maker}; {made.refusal or 'proven, and faster'}")

    return failed


if __name__ == "__main__":
    sys.exit(main())
