"""llama.cpp through llama-cpp-python, in a child process.

A damaged file can make llama.cpp abort: the child dies, and the parent raises EngineError. The
parent never imports llama_cpp. Greedy results do not depend on ``parallel``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from racdeploy.engines.engine import EngineSettings
from racdeploy.engines.sequence import measure_text
from racdeploy.engines.subprocess_engine import SubprocessEngine
from racdeploy.errors import ArtifactError, PromptError
from racdeploy.packing import racgguf
from racdeploy.plugins import require_package

ACCEL = True
_FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")
MAX_TEXT_BYTES = 32_768
_NO_CONTEXT = 16  # tokens; without weights, no context is made
# To load a vocabulary, or to tokenize a text: both take up to 0.3 s, but expressions of some
# pre-tokenizers would need years for a long number.
_VOCABULARY_STEP_S = 10.0
_LOG = logging.getLogger("racdeploy.sparse_kernels")


class LlamaCppEngine(SubprocessEngine):
    """A GGUF file in a llama.cpp child process.

    With ``vocabulary_only``, it can only tokenize, and the file needs no tensors.
    """

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        *,
        vocabulary_only: bool = False,
    ) -> None:
        require_package("llama_cpp")
        if not path.is_file():
            raise ArtifactError("no-gguf-file", f"{path} is not a file", remedy="give a .gguf file")

        native = "racdeploy.engines.backends.llamacpp.native"
        super().__init__(
            native,
            "llama.cpp",
            path,
            settings,
            step_seconds=_VOCABULARY_STEP_S if vocabulary_only else None,
            vocabulary_only=vocabulary_only,
        )
        if self.info.get("sparse_weights"):
            _LOG.info(self.info["kernels"])

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text by llama.cpp; special tokens are parsed, none are added.

        llama.cpp copies the text for each special token in it, so a long one is refused.
        """
        if measure_text(text) > MAX_TEXT_BYTES:
            raise PromptError(
                "text-too-long",
                f"llama.cpp's tokenizer gets at most {MAX_TEXT_BYTES:,} bytes of text here",
                remedy="use the bundle's tokenizer: model.encode_text(text)",
            )
        return list(self._ask("tokenize", text=text)["ids"])


def open_engine(path: Path, settings: EngineSettings) -> LlamaCppEngine:
    """Load a GGUF file; a packed one is unpacked in the user's cache first."""
    is_packed = path.suffix == racgguf.SUFFIX
    return LlamaCppEngine(racgguf.unpack_to_cache(path) if is_packed else path, settings)


def find_parts(path: Path) -> set[str]:
    """Return the names of all files of a split model, which llama.cpp derives from the first."""
    first = _FIRST_PART.search(path.name)
    if first is None:
        return set()
    stem, count = path.name[: first.start()], first[1]
    return {f"{stem}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1)}


def open_vocabulary(path: Path) -> LlamaCppEngine:
    """Load the tokenizer of a GGUF file, which needs no tensors."""
    return LlamaCppEngine(path, EngineSettings(_NO_CONTEXT, 1, 1), vocabulary_only=True)
