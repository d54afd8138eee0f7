"""llama.cpp through llama-cpp-python, in a child process.

llama.cpp throws and aborts through C where a file lies; the child dies then, and the parent raises
EngineError. The parent never imports llama_cpp. Greedy results do not depend on ``parallel``.
"""

from __future__ import annotations

import logging
from pathlib import Path

from racdeploy.decoding.child_engine import ChildEngine
from racdeploy.decoding.engine import EngineSettings
from racdeploy.errors import ArtifactError, EngineError
from racdeploy.packing import racgguf
from racdeploy.plugins import require

__all__ = ["ACCEL", "LlamaCppEngine", "open_engine"]

ACCEL = True
_LOG = logging.getLogger("racdeploy.accel")
_WORKER = "racdeploy.engines.llamacpp.worker"


class LlamaCppEngine(ChildEngine):
    """A GGUF file, loaded by llama.cpp in a child process.

    Args:
        path: GGUF file.
        settings: see :class:`EngineSettings`.
        use_mmap: map the file; False reads it into memory.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        ArtifactError: there is no such file.
        EngineError: llama.cpp refused the file or died of it.
    """

    def __init__(self, path: Path, settings: EngineSettings, *, use_mmap: bool = True) -> None:
        require("llama_cpp")
        if not path.is_file():
            raise ArtifactError(f"{path} is not a file", remedy="give a .gguf file")
        super().__init__(_WORKER, "llama.cpp", path, settings, use_mmap=use_mmap)
        if settings.accel != "off":
            _LOG.info(self.about["kernels"])

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text by llama.cpp's own tokenizer; special tokens are parsed, none
        added.

        Raises:
            EngineError: the text is not Unicode, or the vocabulary is damaged; llama.cpp aborts on
                some.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EngineError(
                f"the text is not Unicode: {error}", remedy="remove lone surrogates"
            ) from error
        return list(self._ask("tokenize", text=text)["ids"])


def open_engine(path: Path, settings: EngineSettings) -> LlamaCppEngine:
    """Load a GGUF file, or a container of one by way of the user's cache; see
    :class:`LlamaCppEngine`.
    """
    return LlamaCppEngine(
        racgguf.unpacked(path) if path.suffix == racgguf.SUFFIX else path, settings
    )
