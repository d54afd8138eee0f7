"""``--keep PART=SHARE``: read, combined with target and recipe, and refused where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from racdeploy.api.builds import read_recipe
from racdeploy.api.options import BuildOptions
from racdeploy.cli.app import app


def test_shares_are_combined_by_part(tmp_path: Path) -> None:
    """Recipe, ``--keep``, ``--set``: the later one decides, and each part for itself. A target's
    go where any is asked for.
    """
    target = tmp_path / "board.toml"
    target.write_text(
        'description = "mine"\nmemory_limit_bytes = 1000\n'
        'rungs = [{quant = "q4_0", keep = {ffn = 0.9, heads = 0.9, blocks = 0.9}}]\n'
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'target = "{target}"\n[structure]\nkeep = {{heads = 0.8, blocks = 0.8}}\n')
    options = BuildOptions(
        recipe=recipe,
        keep={"blocks": 0.7, "vocabulary": 8192},
        settings={"structure.keep": {"vocabulary": 4096}},
    )
    expected = {"heads": 0.8, "blocks": 0.7, "vocabulary": 4096}
    assert read_recipe(options).structure.keep == expected
    alone = read_recipe(BuildOptions(target=str(target)))
    assert alone.structure.keep == {"ffn": 0.9, "heads": 0.9, "blocks": 0.9}
    assert alone.structure.optional
    assert (alone.export.quant, alone.rungs) == ("q4_0", ())


@pytest.mark.parametrize(
    ("asked", "keep", "sparsity"),
    [
        ({}, {"ffn": 0.9}, 0.0),
        ({"keep": {"heads": 0.75}}, {"heads": 0.75}, 0.0),
        ({"sparsity": 0.6}, {}, 0.6),
        ({"sparsity": 0.0}, {}, 0.0),
        ({"pattern": "2:4"}, {}, 0.5),
        ({"method": "admm"}, {}, 0.5),
        ({"packing": "bitmask"}, {}, 0.5),
        ({"keep": {"ffn": 0.5}, "pattern": "2:4"}, {"ffn": 0.5}, 0.5),
        ({"quant": "q4_0"}, {"ffn": 0.9}, 0.0),
    ],
)
def test_what_is_asked_replaces_what_a_target_proposes(
    tmp_path: Path, asked: dict[str, Any], keep: dict[str, float], sparsity: float
) -> None:
    """Zeros that nobody counts are half of the weights, and a cut comes without zeros. What is
    asked for is not optional.
    """
    target = tmp_path / "board.toml"
    target.write_text(
        'description = "mine"\nmemory_limit_bytes = 1000\n'
        'rungs = [{quant = "q8_0"}, {quant = "q8_0", keep = {ffn = 0.9}}]\n'
    )
    recipe = read_recipe(BuildOptions(target=str(target), **asked))
    assert (recipe.structure.keep, recipe.prune.sparsity) == (keep, sparsity)
    assert recipe.structure.optional == (keep == {"ffn": 0.9})
    assert bool(recipe.rungs) == (not asked)


@pytest.mark.parametrize("command", ["build", "prune"])
@pytest.mark.parametrize(
    ("keep", "code", "named"),
    [
        ("ffn", "invalid-assignment", "--keep ffn "),
        ("ffn=", "invalid-assignment", "--keep ffn= "),
        ("ffn=half", "invalid-assignment", "--keep ffn=half"),
        ("ffn=0", "invalid-settings", "ffn = 0 "),
        ("ffn=2", "invalid-settings", "ffn = 2 "),
        ("ffn=-0.5", "invalid-settings", "ffn = -0.5 "),
        ("ffn=nan", "invalid-settings", "ffn = nan "),
        ("vocabulary=inf", "invalid-settings", "vocabulary = inf "),
        ("vocabulary=80.5", "invalid-settings", "vocabulary = 80.5 "),
        ("fnn=0.5", "invalid-settings", "'fnn' (did you mean 'ffn'?)"),
    ],
)
def test_a_wrong_share_is_refused(command: str, keep: str, code: str, named: str) -> None:
    """Exit code 2 before any work, with what is wrong and what to type."""
    done = CliRunner().invoke(app, [command, "--keep", keep, "--json"])
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert (said["code"], named in said["error"]) == (code, True), said
    assert said["remedy"]
