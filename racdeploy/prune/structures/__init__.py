"""Structures: what of a model can be left out as a whole, one file per part.

A file says with ``STEP`` when the part is cut:

- ``"width"``: inside every block, by the inputs of the linear that ends a part of it. ``LETTER`` is
  the size that shrinks (see :mod:`racdeploy.models.decoder`), ``layout(checkpoint) -> Layout`` what
  goes together.
- ``"blocks"``: ``choose(session, count) -> list[int]`` returns the blocks that stay, rising.
- ``"folder"``: ``rewrite(checkpoint, old_ids, out) -> Path`` makes another model folder of the
  finished one; ``choose(checkpoint, keep, used) -> old_ids`` says what stays.

``check(checkpoint, keep, settings)`` refuses with a UsageError, before any work, what cannot be.
"""
