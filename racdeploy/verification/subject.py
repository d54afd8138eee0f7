"""A model as it is asked: its file on an engine or server, its tokenizer and its thinking control.

A build asks what it has exported, a search its candidates, a comparison deployed models: all are
subjects of one :class:`~racdeploy.verification.examiner.Examiner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from racdeploy.engines import open_engine
from racdeploy.engines.engine import Engine, EngineSettings, Ids
from racdeploy.manifest import ThinkingControl
from racdeploy.runtime.control import NO_CONTROL
from racdeploy.runtime.deployed import DeployedModel
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to ask.

    Args:
        path: file or folder that its engine opens.
        files: SHA-256 of each file by its path from the main file's folder; empty for a server.
        stop_ids: ids that end an answer.
        control: thinking control, in addition to the budget.
        max_thinking_tokens: its own thinking budget; None or 0 for that of the verification.
        size_bytes: None if it is unknown, as behind a server.
        sparsity: zeros over the prunable weights in the file, 0 to 1; None if not measured.
        url: of a server; empty for a file.
        label: of the progress; empty names the arm.
    """

    backend: str
    path: Path
    files: Mapping[str, str]
    encoder: PromptEncoder
    tags: ThinkingTags | None
    stop_ids: Ids
    control: ThinkingControl = NO_CONTROL
    max_thinking_tokens: int | None = None
    quant: str = ""
    size_bytes: int | None = None
    sparsity: float | None = None
    url: str = ""
    label: str = ""

    @classmethod
    def from_deployed(cls, model: DeployedModel) -> Self:
        """Return a deployed model as a subject; plain files are hashed."""
        generation = model.settings.generation
        return cls(
            backend=model.entry.backend,
            path=model.path,
            files=model.hash_files(),
            encoder=model.encoder,
            tags=model.tags,
            stop_ids=model.settings.tokenizer.eos_ids,
            control=generation.thinking,
            max_thinking_tokens=generation.max_thinking_tokens,
            quant=model.entry.quant,
            size_bytes=model.entry.size_bytes or None,
            url=model.url,
            label=f"ask {model.url or model.entry.path}",
        )

    @property
    def file(self) -> Path:
        """Main file, or the first of a folder."""
        return self.path if self.path.is_file() else self.path / next(iter(self.files), "")

    def open(self, settings: EngineSettings) -> Engine:
        """Load the file on its engine."""
        return open_engine(self.backend, self.path, settings)
