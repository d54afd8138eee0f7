"""Criteria: which units of a structure go, one file per criterion.

A criterion file has ``shrink(units, count)``, which removes units until so many are left, and
``CALIBRATED``, whether the model's traces decide: then blocks may keep different widths, by a
survey, and a linear is solved again for the inputs that stay. What a criterion can ask of units
stands in :mod:`racdeploy.prune.structure.units`.
"""
