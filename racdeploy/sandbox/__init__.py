"""Sandboxed processes that compute with files of strangers: templates, tokenizers, scorers.

The client starts, asks and ends the process. ``worker`` and ``limits`` run in it, with one module
of operations: on texts, or for scoring.
"""
