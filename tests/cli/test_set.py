"""``--set PART.KEY=VALUE``: every key of the recipe, checked like a recipe, before heavy work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from typer.testing import CliRunner

from racdeploy.api.builds import read_recipe
from racdeploy.api.options import BuildOptions
from racdeploy.cli.app import app
from racdeploy.files.toml import read_assignments
from racdeploy.recipe import Recipe
from tests.support.commands import environment, find_error_code


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


DEFAULTS = dict(_leaves(Recipe.combine(None, {}).model_dump(mode="json")))


@pytest.mark.parametrize(
    "key", [key for key, value in DEFAULTS.items() if value is not None and key != "rungs"]
)
def test_every_key_of_a_recipe_is_reached(key: str) -> None:
    """Its own value, written as TOML, gives the same recipe, but for what a target proposes to
    prune: that yields to whoever says what is pruned.
    """
    value = json.dumps(DEFAULTS[key])
    settings = read_assignments([f"{key}={value}"])
    asked = read_recipe(BuildOptions(settings=settings)).model_dump(mode="json")
    assert dict(_leaves(asked))[key] == DEFAULTS[key]

    whole = Recipe.combine(None, {}).model_dump(mode="json")
    if key.startswith(("prune.", "structure.")):
        del asked["structure"], whole["structure"], asked["prune"]["sparsity"]
        del whole["prune"]["sparsity"]
    if asked["rungs"] == []:  # what is pruned or stored was said
        del whole["rungs"], asked["rungs"]
    assert asked == whole


def test_values_are_set_over_other_options() -> None:
    """Also where an option, or another ``--set``, says something else; tables are merged."""
    settings = read_assignments(
        [
            "prune.sparsity=0.6",
            'export.quant="q4_k"',
            'prune.ignore=["down_proj$"]',
            "gate.accuracy.margin=0.1",
            "prune.refit_steps=30",
            "prune.refit_steps=40",
        ]
    )
    recipe = read_recipe(BuildOptions(sparsity="0.3", quant="q8_0", settings=settings))
    assert (recipe.prune.sparsity, recipe.export.quant) == (0.6, "q4_k")
    assert (recipe.prune.ignore, recipe.prune.refit_steps) == (("down_proj$",), 40)
    assert recipe.gate == {"accuracy": {"margin": 0.1}}


@pytest.mark.parametrize("command", ["build", "traces", "prune"])
@pytest.mark.parametrize(
    ("assignment", "code", "named"),
    [
        ("prune.sparsty=0.5", "invalid-settings", "'prune.sparsty' (did you mean 'sparsity'?)"),
        ("prune.sparsity=1.5", "invalid-settings", "prune.sparsity: "),
        ("prune.sparsity=a lot", "invalid-assignment", "--set prune.sparsity=a lot"),
        ("prune.method=admm", "invalid-assignment", "--set 'prune.method=\"admm\"'"),
        ("prune.sparsity", "invalid-assignment", "--set prune.sparsity"),
        ('prune.method="sparsgpt"', "unknown-plugin", "did you mean 'sparsegpt'"),
    ],
)
def test_a_wrong_value_is_refused_like_a_recipes(
    command: str, assignment: str, code: str, named: str
) -> None:
    """With the nearest known key, or how a value is written."""
    done = CliRunner().invoke(app, [command, "--set", assignment, "--json"])
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert said["code"] == code
    assert named in f"{said['error']} {said['remedy']}"


def test_a_wrong_value_is_refused_before_torch_is_imported() -> None:
    """In a process of its own, which lists what it has imported."""
    code = (
        "import sys\n"
        "from racdeploy.cli.app import app\n"
        "try:\n    app(['build', '--set', 'prune.sparsty=0.5'])\n"
        "finally:\n    print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert find_error_code(done.stderr) == "invalid-settings"
    assert {"torch", "transformers"}.isdisjoint(done.stdout.split())
