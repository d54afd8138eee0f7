"""Any server with OpenAI's API: vLLM, SGLang, llama-server, llama_cpp.server.

Importing this package imports no HTTP client; opening an engine does.
"""

from __future__ import annotations

from racdeploy.engines.backends.openai.engine import OpenAIEngine, Request, derive_seed

__all__ = ["ACCEL", "OpenAIEngine", "Request", "derive_seed", "open_engine"]

ACCEL = False
open_engine = OpenAIEngine
