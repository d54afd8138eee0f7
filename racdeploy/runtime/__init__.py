"""Run-time library for bundles; imports neither torch nor transformers."""

from racdeploy.runtime.conversation import Conversation
from racdeploy.runtime.loading import load
from racdeploy.runtime.model import Continuation, GenerationOptions, GenerationResult, Model
from racdeploy.runtime.streams import AsyncTextStream, TextChunk, TextStream

__all__ = [
    "AsyncTextStream",
    "Continuation",
    "Conversation",
    "GenerationOptions",
    "GenerationResult",
    "Model",
    "TextChunk",
    "TextStream",
    "load",
]
