"""Tokenizer and chat template inside a GGUF file, as llama.cpp itself reads them.

No ``tokenizer.json`` is needed, and none is guessed: texts are encoded by the code that encodes
them on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.errors import ArtifactError, EngineError, PromptError
from racdeploy.files.sha256_cache import file_state
from racdeploy.runtime.template import ChatTemplate, Message, PromptEncoder, Tools
from racdeploy.sandbox.client import Sandbox
from racdeploy.sandbox.tokenizer import Tokenizer, VocabularyFacts


class GgufTokenizer(Tokenizer):
    """The vocabulary of a GGUF file, in an engine that has read nothing else of it.

    An engine that dies, for example of a text that takes it too long, is replaced at once.

    Attributes:
        engine: the engine that runs now.
        info: special tokens and template, see ``llamacpp.native``.
        sandbox: renders the templates.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._state = file_state(file)
        self.engine = _open_vocabulary(file)
        self._is_closed = False
        self._lock = threading.Lock()
        self.info = self.engine.info
        self.sandbox = Sandbox("racdeploy.sandbox.text_operations")
        self._pieces = [bytes.fromhex(piece) for piece in self.info["pieces"]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.engine.refuse_fork()  # where the lock may be held for ever
        with self._lock:
            self._replace_dead_engine()
            return [self._tokenize(text) for text in texts]

    def is_alive(self) -> bool:
        # Who has the lock is encoding a text, or replaces the engine.
        return self._lock.locked() or self.engine.is_alive()

    def _tokenize(self, text: str) -> list[int]:
        try:
            return list(self.engine.tokenize(text))
        except EngineError as error:
            if self._is_closed or self.engine.is_alive():
                raise
            self._replace_dead_engine()
            raise PromptError(
                "text-ends-tokenizer",
                f"llama.cpp's tokenizer ended at a text of {len(text):,} characters: {error}",
                remedy="shorten the text, or break up its longest words and numbers",
            ) from error

    def _replace_dead_engine(self) -> None:
        if self._is_closed or self.engine.is_alive():
            return

        self.engine.close()
        self.engine = _open_vocabulary(self._file)
        if file_state(self._file) != self._state:
            self.engine.close()
            raise ArtifactError(
                "artifact-changed",
                f"{self._file} changed while it was in use",
                remedy="load the model again",
            )

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        joined = (b"".join(map(self._pieces.__getitem__, ids)) for ids in sequences)
        return [data.decode("utf-8", "replace") for data in joined]

    def write_special(self, token: int) -> str | None:
        """Return the text of a special token, None for -1: the file has no such token."""
        return self.decode([token]) if token >= 0 else None

    @cached_property
    def _facts(self) -> VocabularyFacts:
        controls = self.decode_batch([[token] for token in self.info["control_ids"]])
        longest = max(map(len, self._pieces), default=1)
        leading_ids = [self.info["bos_id"]] if self.info["add_bos"] else []
        return VocabularyFacts(len(self._pieces), longest, controls, leading_ids)

    def blank_ids(self, characters: Collection[str], texts: Collection[str]) -> list[int]:
        """Return the ids of white space, which llama.cpp knows whatever the vocabulary writes."""
        return [token for token, piece in enumerate(self._pieces) if not piece.strip(b" \n\r\t")]

    def count_at_least(self, text: str) -> int:
        """Return a number of tokens that a text surely has: llama.cpp bounds the text itself."""
        return 0

    def tokens_to_ids(self, texts: Sequence[str]) -> list[int | None]:
        """Return the id of each text that is one token, else None."""
        single_ids: list[int | None] = []
        for ids in self.encode_batch(texts):
            single_ids.append(ids[0] if len(ids) == 1 else None)
        return single_ids

    def check(self) -> None:
        """The file was read when this was made."""

    def close(self) -> None:
        super().close()
        self._is_closed = True
        self.engine.close()


def _open_vocabulary(file: Path) -> Any:
    return plugins.load("engines", "llamacpp").open_vocabulary(file)


class GgufEncoder(PromptEncoder):
    """Tokenizer and chat template of a GGUF file."""

    tokenizer: GgufTokenizer

    @classmethod
    def from_file(cls, file: Path) -> GgufEncoder:
        """Read both; raise ArtifactError for a file without a chat template."""
        tokenizer = GgufTokenizer(file)
        info = tokenizer.info
        if not info["template"]:
            raise ArtifactError(
                "no-template-in-file",
                f"{file} has no chat template, so no question can be asked",
                remedy="convert a model that has one, not a base model",
            )

        bos = tokenizer.write_special(info["bos_id"])
        eos = tokenizer.write_special(info["eos_id"])
        template = ChatTemplate(info["template"], bos, eos, sandbox=tokenizer.sandbox)
        return cls(tokenizer, template, add_bos=info["add_bos"])

    def _encode_marked(self, messages: Sequence[Message], tools: Tools, mark: str) -> list[int]:
        text = self.render(messages, tools)
        pieces = text.split(mark) if mark else [text]
        return [token for ids in self.tokenizer.encode_batch(pieces) for token in ids]
