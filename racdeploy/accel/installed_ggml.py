"""The ggml of the installed llama-cpp-python, and the plug-in for it: which way into ggml it takes.

With releases of ggml whose private declarations were compared with ours (:mod:`ggml_releases`), it
is an extra buffer type of the CPU backend, as CPU_REPACK is one. With any other it is a device that
ggml loads itself if their interfaces have one version: llama.cpp cuts its graph at each product.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from racdeploy.accel.ggml_releases import refuse_unknown
from racdeploy.accel.library import Library
from racdeploy.accel.prebuilt import PACKAGE
from racdeploy.accel.source_list import library_sources

_EXTRA, _DEVICE = "llamacpp", "llamacpp-device"


@dataclass(frozen=True)
class Ggml:
    """The ggml of the installed llama-cpp-python: its folders, and what it says of itself.

    Args:
        commit: of llama.cpp; that of a build by pip ends with ``-dirty``.
    """

    libraries: Path
    include: Path
    version: str
    commit: str

    @property
    def is_known(self) -> bool:
        """Whether its private declarations are ours."""
        return not refuse_unknown(self.version, self.commit)

    @property
    def refusal(self) -> str:
        """Why the plug-in is not for it; empty where it is."""
        header = self.include / "ggml-backend.h"
        if not header.is_file():
            return f"llama-cpp-python came without ggml's headers: there is no {header}"

        return ""

    def plugin(self, is_device: bool) -> Library:
        """Return the plug-in for it, built or not, that takes one of the ways into ggml."""
        name = _DEVICE if is_device else _EXTRA
        unknown = refuse_unknown(self.version, self.commit)
        return Library(
            name,
            library_sources(name),
            include=(self.include,),
            links=(self.libraries / "libggml-cpu.so.0", self.libraries / "libggml-base.so.0"),
            key={"ggml": self.version, "commit": self.commit},
            # Nobody compared its headers with those that the package was compiled with: numbers
            # of operations and types move between releases.
            only_compiled=f"{PACKAGE} is for known releases alone: {unknown}" if unknown else "",
        )


def find_ggml() -> Ggml | str:
    """Return llama-cpp-python's ggml, or why it cannot be used; llama.cpp is not loaded."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "llama-cpp-python is not installed"
    if not sys.platform.startswith("linux"):
        return f"the kernels are for Linux, not for {sys.platform}"

    package = Path(spec.origin).parent
    libraries = package / "lib"
    base = libraries / "libggml-base.so.0"
    if not base.is_file() or not (libraries / "libggml-cpu.so.0").is_file():
        return f"llama-cpp-python came without the shared libraries of ggml: there is no {base}"

    loaded = ctypes.CDLL(str(base))

    answers = []
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(loaded, name, None)
        if function is None:
            return f"{base} does not say its version"
        function.restype = ctypes.c_char_p
        answers.append(function().decode())

    ggml = Ggml(libraries, package.parent / "include", *answers)
    return ggml.refusal or ggml
