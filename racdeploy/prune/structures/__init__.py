"""Structures: what of a model can be left out as a whole, one file per part.

``check(checkpoint, structure)`` refuses with a UsageError, before any work, what cannot
be. ``STEP`` says when the part is cut:

- ``"width"``: inside every block, with the inputs of the linear that ends a part of it.
  ``layout(checkpoint, block, structure) -> Layout`` says which of them go together.
- ``"experts"``: inside every block, too, once its attention is done.
  ``choose(session, flow, block, count, by_norm) -> list[int]`` returns the experts that stay.
- ``"blocks"``: before that. ``choose(session, count) -> list[int]`` returns the blocks that stay.
- ``"folder"``: last. ``choose(checkpoint, keep, used) -> old_ids`` says what stays, and
  ``rewrite(checkpoint, old_ids, out) -> Path`` makes another model folder of the finished one.
"""
