"""Traces of a model, and the choice of those that calibrate."""

from __future__ import annotations

import math
import re
import urllib.parse
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from racdeploy.errors import UsageError
from racdeploy.files.toml import TomlTable
from racdeploy.manifest import MAX_TOKENS
from racdeploy.recipe.section import MAX_PROMPTS, MAX_SECONDS, BatchSize, Section
from racdeploy.recipe_settings import TraceSettings
from racdeploy.results.schema import FiniteNonNegative

FIRST_LIMIT = 1024
"""Tokens of an answer, where no longer limit is known yet; a model that thinks longer shows it."""
LEAST_TRACES = 32
"""Fewest traces, however long: some are held out, and each is a sample of one."""
_SERVER_URL = re.compile(r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$")


class Traces(Section):
    """Collection of the model's own chains of thought."""

    count: int = Field(default=256, ge=1, le=MAX_PROMPTS)
    temperature: FiniteNonNegative = 0.6
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)  # 0: as the first answers show
    batch_size: BatchSize = 16  # one shard on disk each, which a killed run loses
    seed: NonNegativeInt = 0
    engine: Literal["auto", "llamacpp", "transformers"] = "auto"
    server: str = ""
    server_model: str = ""
    server_key_env: str = ""
    server_concurrency: BatchSize = 16
    server_timeout_s: float = Field(default=1800.0, gt=0, le=MAX_SECONDS)

    # Not a field validator: its message would quote the address, which may contain a key.
    @model_validator(mode="after")
    def _check_server(self) -> Self:
        if self.server and not _SERVER_URL.match(self.server):
            raise ValueError(
                "server is not http://HOST:PORT/v1, with http or https; "
                "no name, key or query belongs in it"
            )

        changed = [n for n, f in type(self).model_fields.items() if getattr(self, n) != f.default]
        unused = [name for name in changed if name.startswith("server_")]

        if unused and not self.server:
            raise ValueError(f"{', '.join(unused)} without server")
        if self.server and self.engine != "auto":
            raise ValueError("engine and server: one of them answers")

        return self

    @property
    def identity(self) -> TomlTable:
        """Settings that determine the traces: sampling and model, not how the server is reached.

        A server with a named model may change its address; otherwise the address identifies the
        model. The engine that answers here is an input of its own.
        """
        values = self.model_dump(exclude={"engine"})
        sampling = {key: value for key, value in values.items() if not key.startswith("server")}
        if self.server:
            sampling["server"] = self.server_model or self.server
        return sampling

    def check_key_destination(self, trace_options: TraceSettings, allowed: str) -> None:
        """Refuse to send a key of this machine to a host that only a recipe file names.

        Args:
            trace_options: ``traces`` settings from the command line.
            allowed: host that the user permits with ``--key-host``.
        """
        is_typed = trace_options.get("server_key_env") and trace_options.get("server")
        host = urllib.parse.urlsplit(self.server).hostname or ""
        if not self.server_key_env or is_typed or host == allowed.lower():
            return

        raise UsageError(
            "key-not-allowed",
            f"the recipe file sends the environment variable {self.server_key_env} to {host}",
            remedy=f"if you want that: --key-host {host}",
        )


class Calibration(Section):
    """Selection of the trace tokens that the statistics are gathered on.

    Args:
        own_text_tokens: further tokens, which the model writes without a prompt; 0: none. None: see
            :attr:`Recipe.own_text_tokens`.
    """

    source: Literal["rac", "prompt"] = "rac"
    max_tokens: NonNegativeInt = 32_768
    only_correct: bool = False
    keep_truncated: bool | None = None  # those that do not repeat themselves
    held_out_share: float = Field(default=0.125, ge=0, le=0.5)
    own_text_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)

    @property
    def tokens_to_collect(self) -> int:
        """Tokens of traces that are enough to calibrate on, held-out ones included; 0 is all."""
        return math.ceil(self.max_tokens / (1 - self.held_out_share))
