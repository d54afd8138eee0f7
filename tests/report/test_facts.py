"""Facts of the headline: what made a model, and nothing that did not."""

from __future__ import annotations

from typing import Any

import pytest

from racdeploy.pipeline.naming import name_method
from racdeploy.recipe import Recipe
from racdeploy.report.facts import list_facts
from racdeploy.results.pruning import KeptStructure
from racdeploy.results.report import Report
from tests.support.sample_report import build_report

WHOLE = {"structure": {"keep": {"ffn": 1.0}}}
CUT = {"structure": {"keep": {"ffn": 0.75}}}
ZEROS = {"prune": {"sparsity": 0.5, "method": "magnitude"}}
KEPT = KeptStructure(
    parameters=9,
    parameters_dense=10,
    blocks=4,
    blocks_dense=4,
    key_value_heads=2,
    key_value_heads_dense=2,
    vocabulary=8,
    vocabulary_dense=8,
)


def _method(values: dict[str, Any]) -> str:
    report = build_report()
    kept = KEPT if values["structure"] == CUT["structure"] else None
    recipe = Recipe.combine(None, values).model_dump(mode="json")
    changed = report.model_copy(update={"recipe": recipe, "kept_structure": kept})
    facts = {
        fact.name: fact.text for fact in list_facts(Report.model_validate(changed.model_dump()))
    }
    return facts.get("Method", "")


@pytest.mark.parametrize(
    ("values", "named", "shown"),
    [
        (CUT, "cut by error", "cut by error, calibrated on its own chain of thought"),
        (WHOLE, "none", ""),
        (WHOLE | ZEROS, "magnitude", "magnitude"),
        (
            WHOLE | {"prune": {"sparsity": 0.6}},
            "sparsegpt",
            "sparsegpt, calibrated on its own chain",
        ),
        (CUT | ZEROS, "magnitude", "magnitude, cut by error, calibrated on"),
    ],
)
def test_a_method_is_named_where_it_chose_zeros(
    values: dict[str, Any], named: str, shown: str
) -> None:
    """A model that was only cut, or only rounded, was not pruned with sparsegpt."""
    assert name_method(Recipe.combine(None, values)) == named
    assert _method(values).startswith(shown)
    assert bool(_method(values)) == bool(shown)
