"""PyTorch through transformers: what exports are compared with, and the source of traces."""

from __future__ import annotations

from pathlib import Path

from racdeploy.decoding.engine import EngineSettings
from racdeploy.engines.transformers.engine import TransformersEngine, chat_ids

__all__ = ["ACCEL", "TransformersEngine", "chat_ids", "open_engine"]

ACCEL = False


def open_engine(path: Path, settings: EngineSettings) -> TransformersEngine:
    """Load a Hugging Face folder."""
    return TransformersEngine(path, settings)
