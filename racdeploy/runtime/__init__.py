"""Run a bundle: no torch, no transformers, no recipe."""

from racdeploy.runtime.conversation import Conversation
from racdeploy.runtime.loading import load
from racdeploy.runtime.model import Continuation, Model, Options, Result
from racdeploy.runtime.streams import AsyncTextStream, Piece, TextStream

__all__ = [
    "AsyncTextStream",
    "Continuation",
    "Conversation",
    "Model",
    "Options",
    "Piece",
    "Result",
    "TextStream",
    "load",
]
