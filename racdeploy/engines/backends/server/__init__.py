"""Engine for servers with OpenAI's API: vLLM, SGLang, llama-server, llama_cpp.server.

Importing this package imports no HTTP client; opening an engine does.
"""

from __future__ import annotations

from racdeploy.engines.backends.server.engine import CompletionRequest, ServerEngine, derive_seed

__all__ = ["ACCEL", "CompletionRequest", "ServerEngine", "derive_seed", "open_engine"]

ACCEL = False
open_engine = ServerEngine
