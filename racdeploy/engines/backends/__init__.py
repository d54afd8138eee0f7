"""Engines: one package each, with ``open_engine(path, settings)``."""
