"""llama.cpp through llama-cpp-python, in a child process.

llama.cpp throws and aborts through C where a file lies; the child dies then, and the parent raises
EngineError. The parent never imports llama_cpp. Greedy results do not depend on ``parallel``.
"""

from __future__ import annotations

import logging
from pathlib import Path

from racdeploy.engines.child_engine import ChildEngine
from racdeploy.engines.engine import EngineSettings
from racdeploy.errors import ArtifactError, EngineError
from racdeploy.packing import racgguf
from racdeploy.plugins import require

ACCEL = True
_NO_CONTEXT = 16  # tokens: none is made
_LOG = logging.getLogger("racdeploy.sparse_kernels")


class LlamaCppEngine(ChildEngine):
    """A GGUF file, loaded by llama.cpp in a child process.

    With ``vocabulary_only``, it tokenizes and does nothing else, and the file needs no tensors.
    """

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        *,
        vocabulary_only: bool = False,
    ) -> None:
        require("llama_cpp")
        if not path.is_file():
            raise ArtifactError("no-gguf-file", f"{path} is not a file", remedy="give a .gguf file")

        native = "racdeploy.engines.backends.llamacpp.native"
        super().__init__(native, "llama.cpp", path, settings, vocabulary_only=vocabulary_only)
        if settings.accel != "off" and not vocabulary_only:
            _LOG.info(self.about["kernels"])

    def tokenize(self, text: str) -> list[int]:
        """Return the ids by llama.cpp's own tokenizer; special tokens are parsed, none is added."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EngineError(
                "text-not-unicode",
                f"the text is not Unicode: {error}",
                remedy="remove lone surrogates",
            ) from error
        return list(self._ask("tokenize", text=text)["ids"])


def open_engine(path: Path, settings: EngineSettings) -> LlamaCppEngine:
    """Load a GGUF file, or what a container holds, unpacked in the user's cache."""
    is_packed = path.suffix == racgguf.SUFFIX
    return LlamaCppEngine(racgguf.unpacked(path) if is_packed else path, settings)


def open_vocabulary(path: Path) -> LlamaCppEngine:
    """Load the tokenizer of a GGUF file, which may hold nothing else."""
    return LlamaCppEngine(path, EngineSettings(_NO_CONTEXT, 1, 1), vocabulary_only=True)
