"""PyTorch through transformers: the reference for exports, and the source of traces."""

from __future__ import annotations

from racdeploy.engines.backends.transformers.engine import TransformersEngine, chat_prompt_ids

__all__ = ["ACCEL", "TransformersEngine", "chat_prompt_ids", "open_engine"]

ACCEL = False
open_engine = TransformersEngine
