"""Print the fingerprint of a library for a machine, as racdeploy will: LIBRARY and processor.

It is asked of source_list.py alone, since racdeploy is not installed where the wheel is built.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_SOURCE_LIST = Path(__file__).parents[1] / "racdeploy" / "accel" / "source_list.py"


def main(library: str, machine: str) -> None:
    """Write it to standard output."""
    found = runpy.run_path(str(_SOURCE_LIST))
    print(found["fingerprint"](found["library_sources"](library), machine))


if __name__ == "__main__":
    main(*sys.argv[1:])
