"""Criteria that choose which units of a structure are removed, one file per criterion.

A criterion file has ``remove_units(units, count)``, which removes units until ``count`` are
left, and ``USES_TRACES``, whether it uses the model's traces. If it does, a survey may give
blocks different widths, and a linear is solved again for the inputs that stay. The interface of
units is in :mod:`racdeploy.pruning.structure.prunable_units`.
"""
