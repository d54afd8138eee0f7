"""The tokenizer and template files of a model folder or a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError, ModelError
from racdeploy.files.reading import check_size, read_json, read_text
from racdeploy.models import tokenizer_form
from racdeploy.models.foreign_code import name_code
from racdeploy.sandbox.tokenizer import MOST_BYTES, Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
    "vocabulary_ids.json",
)  # fmt: skip
MOST_TEMPLATE_BYTES = 256_000


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder with ``tokenizer.json`` and, as the model came, the files beside it."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``, or an empty dict."""
        return self._read("tokenizer_config.json")

    @cached_property
    def generation(self) -> dict[str, Any]:
        """``generation_config.json``, or an empty dict."""
        return self._read("generation_config.json")

    @cached_property
    def parsed(self) -> dict[str, Any]:
        """``tokenizer.json``, its parts of the kinds that :mod:`tokenizer_form` lists."""
        found = read_json(self.file, MOST_BYTES)
        tokenizer_form.check(found, str(self.file))
        return found

    def _read(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        return read_json(file) if file.is_file() else {}

    @cached_property
    def file(self) -> Path:
        """Path of ``tokenizer.json``; a ModelError says that there is none."""
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            code = name_code(self.config)
            own = f", and code of its own, {code}, is not run" if code else ""
            raise ModelError(
                "no-tokenizer",
                f"{self.folder} has no tokenizer.json{own}",
                remedy="save the fast tokenizer:"
                " AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )

        check_size(file, MOST_BYTES)
        return file

    @cached_property
    def chat_template(self) -> str:
        """The Jinja chat template; a ModelError says that there is none."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return read_text(file, MOST_TEMPLATE_BYTES)

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

        if len(template.encode("utf-8", "replace")) > MOST_TEMPLATE_BYTES:
            raise ArtifactError(
                "template-too-long",
                f"the chat template of {self.folder} has more than {MOST_TEMPLATE_BYTES:,} bytes",
            )
        return template

    def special_token(self, role: str) -> str | None:
        """Return the text of ``bos_token``, ``eos_token``, …, or None where the files name none."""
        named = token_text(self.config.get(role))
        if named is None:
            named = token_text(self._read("special_tokens_map.json").get(role))
        return named


def token_text(entry: object) -> str | None:
    """Return the text of a token that tokenizer_config.json names: plainly, or in a record."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def token_ids(config: Mapping[str, Any], kind: str) -> list[int]:
    """Return the ids of ``bos``, ``eos``, … that a config names: none, one or several."""
    value = config.get(f"{kind}_token_id")
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int]


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; an ArtifactError says that it is none."""
    tokenizer = Tokenizer(file)
    tokenizer.check()
    return tokenizer


def check_ids(file: Path, texts: Iterable[tuple[int, str]], assigned: Mapping[str, int]) -> None:
    """Refuse ids that the tokenizers library does not follow: it counts added tokens itself."""
    for i, text in texts:
        if assigned.get(text) != i:
            raise ModelError(
                "token-ids-differ",
                f"{file} gives the token {text!r} the id {i}, but it loads as {assigned.get(text)}",
                remedy="ids of added tokens must follow the vocabulary without a gap",
            )
