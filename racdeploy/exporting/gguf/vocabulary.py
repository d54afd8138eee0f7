"""The tokenizer of a GGUF file, as its keys hold it, and how they are written.

Source: llama.cpp ``conversion/base.py`` (get_vocab_base) and ``gguf-py/gguf/vocab.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gguf import GGUFWriter, TokenType

from racdeploy.errors import ModelError
from racdeploy.exporting.gguf.tokens import SpecialTokens


@dataclass(frozen=True)
class Vocabulary:
    """Values of the keys ``tokenizer.ggml.*``; one text for each row of the embedding.

    ``model`` is ``gpt2``, byte-level BPE: byte-mapped texts and merges, ``left right``, best first;
    ``llama``, SentencePiece: scores, and a space in front or not; or ``gemma4``: merges of
    SentencePiece's texts.
    """

    model: str
    texts: tuple[str, ...]
    types: tuple[TokenType, ...]
    special: SpecialTokens
    notes: tuple[str, ...]
    pre_tokenizer: str = "default"
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    add_space_prefix: bool | None = None

    def write(self, writer: GGUFWriter, chat_template: str) -> None:
        """Write the tokenizer's keys into a header."""
        writer.add_tokenizer_model(self.model)
        if self.pre_tokenizer:
            writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.texts)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.add_space_prefix is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)

        for kind, i in self.special.ids.items():
            getattr(writer, f"add_{kind}_token_id")(i)

        writer.add_add_bos_token(self.special.adds["bos"])
        writer.add_add_eos_token(self.special.adds["eos"])
        writer.add_chat_template(chat_template)

    def check_model_name(self, name: str) -> None:
        """Refuse a model name for which llama.cpp expects tokens that the vocabulary lacks.

        Source: llama.cpp ``src/llama-vocab.cpp``, attributes set by the model's name.
        """
        match = re.search("phi-?3", name.lower())
        expected = ("</s>", "<unk>", "<s>", "<|endoftext|>")
        missing = [text for text in expected if text not in self.texts]
        if match and missing:
            raise ModelError(
                "misleading-model-name",
                f"the name {name!r} holds {match[0]!r}, so llama.cpp expects a token {missing[0]!r}"
                " and fails without it",
                remedy="rename the model's folder",
            )
