"""PyTorch through transformers: what exports are compared with, and the source of traces."""

from __future__ import annotations

from racdeploy.engines.backends.transformers.engine import TransformersEngine, chat_ids

__all__ = ["ACCEL", "TransformersEngine", "chat_ids", "open_engine"]

ACCEL = False
open_engine = TransformersEngine
