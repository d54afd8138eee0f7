"""The releases of ggml that the plug-in for llama.cpp was made for, from ``ggml_releases.toml``.

Compared were what is private, ``sources/ggml_abi.h``, and what becomes of the public headers: the
plug-in's object code is the same with those of each. A library is proven for one version and commit
at a time, whoever compiled it.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_suffix(".toml")
_LEAST_DIGITS = 7  # of a commit: git shortens to no fewer


class Release(NamedTuple):
    """A release of llama-cpp-python, the version of its ggml and its commit of llama.cpp."""

    llama_cpp_python: str
    ggml: str
    commit: str

    def has(self, version: str, commit: str) -> bool:
        """Return whether a ggml that says this of itself is that of this release.

        Args:
            commit: shortened; that of a build by pip ends with ``-dirty``.
        """
        digits = commit.partition("-")[0]
        is_commit = len(digits) >= _LEAST_DIGITS and self.commit.startswith(digits)
        return is_commit and version == self.ggml


def read_table(file: Path = TABLE) -> tuple[Release, ...]:
    """Return the releases of a table, oldest first."""
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    return tuple(Release(**row) for row in content["release"])


def refuse_unknown(version: str, commit: str) -> str:
    """Return why the plug-in is not for a ggml; empty where it is."""
    releases = read_table()
    if any(release.has(version, commit) for release in releases):
        return ""

    first, last = releases[0].llama_cpp_python, releases[-1].llama_cpp_python
    known = f"{len(releases)} releases of llama-cpp-python from {first} to {last}"
    return f"ggml {version} ({commit}) is not one that the kernels were made for: {known}"
