"""``--keep PART=SHARE``: read, combined with target and recipe, and refused where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.cli.options import BuildOptions


def test_shares_are_combined_by_part(tmp_path: Path) -> None:
    """Recipe, ``--keep``, ``--set``: the later one decides, and each part for itself. A target's
    go where any is asked for.
    """
    target = tmp_path / "board.toml"
    target.write_text(
        'why = "mine"\nmemory_limit_bytes = 1000\n[keep]\nffn = 0.9\nheads = 0.9\nblocks = 0.9\n'
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'target = "{target}"\n[structure]\nkeep = {{heads = 0.8, blocks = 0.8}}\n')
    options = BuildOptions(
        recipe=recipe,
        keep=["blocks=0.7", "vocabulary=8192"],
        assignments=["structure.keep={vocabulary=4096}"],
    )
    expected = {"heads": 0.8, "blocks": 0.7, "vocabulary": 4096}
    assert options.resolve().structure.keep == expected
    alone = BuildOptions(target=str(target)).resolve().structure
    assert alone.keep == {"ffn": 0.9, "heads": 0.9, "blocks": 0.9}
    assert alone.optional


@pytest.mark.parametrize(
    ("asked", "keep", "sparsity"),
    [
        ({}, {"ffn": 0.9}, 0.0),
        ({"keep": ["heads=0.75"]}, {"heads": 0.75}, 0.0),
        ({"sparsity": 0.6}, {}, 0.6),
        ({"sparsity": 0.0}, {}, 0.0),
        ({"pattern": "2:4"}, {}, 0.5),
        ({"method": "admm"}, {}, 0.5),
        ({"packing": "bitmask"}, {}, 0.5),
        ({"keep": ["ffn=0.5"], "pattern": "2:4"}, {"ffn": 0.5}, 0.5),
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
    target.write_text('why = "mine"\nmemory_limit_bytes = 1000\n[keep]\nffn = 0.9\n')
    recipe = BuildOptions(target=str(target), **asked).resolve()
    assert (recipe.structure.keep, recipe.prune.sparsity) == (keep, sparsity)
    assert recipe.structure.optional == (keep == {"ffn": 0.9})


@pytest.mark.parametrize("command", ["build", "prune"])
@pytest.mark.parametrize(
    ("keep", "complaint"),
    [
        ("ffn", "--keep ffn is not PART=SHARE with a number"),
        ("ffn=", "--keep ffn= is not PART=SHARE with a number"),
        ("ffn=half", "--keep ffn=half is not PART=SHARE with a number"),
        ("ffn=0", "ffn = 0 is not a share above 0, up to 1"),
        ("ffn=2", "ffn = 2 is not a share above 0, up to 1"),
        ("ffn=-0.5", "ffn = -0.5 is not a share above 0, up to 1"),
        ("ffn=nan", "ffn = nan is not a share above 0, up to 1"),
        ("vocabulary=inf", "vocabulary = inf is not a share above 0, up to 1, or a count"),
        ("vocabulary=80.5", "vocabulary = 80.5 is not a share above 0, up to 1, or a count"),
        ("fnn=0.5", "unknown part 'fnn' (did you mean 'ffn'?)"),
    ],
)
def test_a_wrong_share_is_refused(command: str, keep: str, complaint: str) -> None:
    """Exit code 2 before any work, with what is wrong and what to type."""
    done = CliRunner().invoke(app, [command, "--keep", keep, "--json"])
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert complaint in said["error"]
    assert said["remedy"]
