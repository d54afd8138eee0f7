"""Fetch the headers of ggml that the plug-in is compiled with: FOLDER to write them to.

They are those of the newest release in ``ggml_releases.toml``: tests/support/ggml_releases.py adds
a release only if the plug-in's object code is the same with its headers. Needs pip and the index.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

_TABLE = Path(__file__).parents[1] / "racdeploy" / "accel" / "ggml_releases.toml"
_PACKAGE = "llama-cpp-python"
_HEADERS = "/vendor/llama.cpp/ggml/include/"


def main(folder: Path) -> None:
    """Have pip download the source package, and keep ggml's public headers."""
    releases = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["release"]
    requirement = f"{_PACKAGE}=={releases[-1]['llama_cpp_python']}"
    folder.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", _PACKAGE]
        subprocess.run([*pip, "--dest", downloads, requirement], check=True)

        (sdist,) = Path(downloads).glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            for member in archive:
                if _HEADERS in member.name and member.isfile():
                    member.name = Path(member.name).name
                    archive.extract(member, folder, filter="data")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
