"""``--keep PART=SHARE``: read, combined with target and recipe, and refused where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.cli.options import BuildOptions


def test_shares_are_combined_by_part(tmp_path: Path) -> None:
    """Target, recipe, ``--keep``, ``--set``: the later one decides, and each part for itself."""
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
    expected = {"ffn": 0.9, "heads": 0.8, "blocks": 0.7, "vocabulary": 4096}
    assert options.resolve().structure.keep == expected


def test_a_cut_leaves_the_zeros_of_the_target() -> None:
    """Both are done, unless no zeros are asked for."""
    both = BuildOptions(target="raspberry-pi-5", keep=["ffn=0.75"]).resolve()
    assert (both.prune.pattern, both.structure.parts) == ("2:4", ("ffn",))
    alone = BuildOptions(target="raspberry-pi-5", keep=["ffn=0.75"], sparsity=0).resolve()
    assert (alone.prune.pattern, alone.prune.sparsity) == ("unstructured", 0)


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
