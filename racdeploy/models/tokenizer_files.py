"""The tokenizer and template files of a model folder or a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from racdeploy.errors import ArtifactError, ModelError
from racdeploy.files.reading import Json, check_size, read_json, read_text
from racdeploy.models import tokenizer_schema
from racdeploy.models.config_schema import Config
from racdeploy.models.remote_code import list_remote_code
from racdeploy.sandbox.tokenizer import MAX_BYTES, Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
    "vocabulary_ids.json",
)  # fmt: skip
MAX_TEMPLATE_BYTES = 256_000


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder with ``tokenizer.json`` and the other tokenizer files of its model."""

    folder: Path

    @cached_property
    def config(self) -> Config:
        """``tokenizer_config.json``, or an empty dict."""
        return self._read("tokenizer_config.json")

    @cached_property
    def generation(self) -> Config:
        """``generation_config.json``, or an empty dict."""
        return self._read("generation_config.json")

    @cached_property
    def tokenizer_json(self) -> Json:
        """``tokenizer.json``, whose parts :mod:`tokenizer_schema` has checked."""
        tokenizer = read_json(self.file, MAX_BYTES)
        tokenizer_schema.check_tokenizer(tokenizer, str(self.file))
        return tokenizer

    def _read(self, name: str) -> Config:
        file = self.folder / name
        return read_json(file) if file.is_file() else {}

    @cached_property
    def file(self) -> Path:
        """Path of ``tokenizer.json``; raises ModelError if there is none."""
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            code = list_remote_code(self.config)
            note = f", and its remote code, {code}, is not run" if code else ""
            raise ModelError(
                "no-tokenizer",
                f"{self.folder} has no tokenizer.json{note}",
                remedy="save the fast tokenizer:"
                " AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )

        check_size(file, MAX_BYTES)
        return file

    @cached_property
    def chat_template(self) -> str:
        """The Jinja chat template; raises ModelError if there is none."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return read_text(file, MAX_TEMPLATE_BYTES)

        # Some models have several templates by name.
        template = self.config.get("chat_template")
        if isinstance(template, list):
            named = (entry for entry in template if isinstance(entry, dict))
            template = next((t.get("template") for t in named if t.get("name") == "default"), None)

        if not isinstance(template, str):
            raise ModelError(
                "no-chat-template",
                f"{self.folder} has no chat template",
                remedy="add chat_template.jinja; reasoning prompts cannot be rendered without it",
            )

        if len(template.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise ArtifactError(
                "template-too-long",
                f"the chat template of {self.folder} has more than {MAX_TEMPLATE_BYTES:,} bytes",
            )
        return template

    def special_token(self, role: str) -> str | None:
        """Return the text of ``bos_token``, ``eos_token``, …, or None if the files name none."""
        named = token_text(self.config.get(role))
        if named is None:
            named = token_text(self._read("special_tokens_map.json").get(role))
        return named


def token_text(entry: object) -> str | None:
    """Return the text of a token in tokenizer_config.json, which may be an object with content."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def find_token_ids(config: Config, kind: str) -> list[int]:
    """Return the ids of ``bos``, ``eos``, … in a config: none, one or several."""
    value = config.get(f"{kind}_token_id")
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int]


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; raises ArtifactError if the tokenizers library cannot."""
    tokenizer = Tokenizer(file)
    tokenizer.check()
    return tokenizer


def check_ids(file: Path, texts: Iterable[tuple[int, str]], assigned: Mapping[str, int]) -> None:
    """Refuse ids that the tokenizers library ignores: it numbers added tokens itself."""
    for i, text in texts:
        if assigned.get(text) != i:
            raise ModelError(
                "token-ids-differ",
                f"{file} gives the token {text!r} the id {i}, but it loads as {assigned.get(text)}",
                remedy="ids of added tokens must follow the vocabulary without a gap",
            )
