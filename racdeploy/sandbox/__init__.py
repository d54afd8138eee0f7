"""What strangers wrote and we compute: templates, tokenizers, scorers, in a process with limits.

``reader`` is this side of it: it starts, asks and ends the process. ``worker`` and ``limits`` are
the other side, which runs one module of operations: ``texts`` or ``answers``.
"""
