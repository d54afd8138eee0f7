"""Print the folder of the installed llama-cpp-python's headers of ggml, or download them: FOLDER.

Those that are downloaded are of the release that pyproject.toml tests the wheels with. Needs pip.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from pathlib import Path

_PROJECT = Path(__file__).with_name("pyproject.toml")
_PACKAGE = "llama-cpp-python"
_HEADERS = "/vendor/llama.cpp/ggml/include/"


def locate() -> Path:
    """Return the folder beside the installed package; it need not exist."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parents[1] / "include"

    # pip keeps installed packages out of a build's imports, but builds with their interpreter.
    return Path(sysconfig.get_path("purelib")) / "include"


def download(folder: Path) -> None:
    """Have pip download the source package, and keep ggml's public headers."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))
    tested = project["tool"]["cibuildwheel"]["linux"]["test-requires"]
    (requirement,) = (each for each in tested if each.startswith(_PACKAGE))
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
    if len(sys.argv) > 1:
        download(Path(sys.argv[1]))
    else:
        print(locate())
