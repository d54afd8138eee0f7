"""Run a bundle: no torch, no transformers, no recipe."""

from racdeploy.runtime.model import Model, Result, load

__all__ = ["Model", "Result", "load"]
