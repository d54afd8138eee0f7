"""Any server with OpenAI's API: vLLM, SGLang, llama-server, llama_cpp.server.

Importing this package imports no HTTP client; opening an engine does.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.decoding.engine import EngineSettings
from racdeploy.engines.openai.engine import OpenAIEngine, Request, derive_seed

__all__ = ["ACCEL", "OpenAIEngine", "Request", "derive_seed", "open_engine"]

ACCEL = False


def open_engine(path: Path | str, settings: EngineSettings) -> OpenAIEngine:
    """Reach a server that returns token ids and needs no key."""
    return OpenAIEngine(str(path), settings)
