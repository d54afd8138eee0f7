"""Files of a search for the best model: ``tune.json``, its page and a recipe.

``recipe.toml`` is the winner's; ``racdeploy build --recipe`` accepts it for other models too.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.files.writing import disk_errors, write_atomic
from racdeploy.report import tuning_page
from racdeploy.report.files import read_as
from racdeploy.report.tables import to_single_line
from racdeploy.report.toml_writer import to_toml
from racdeploy.results.tuning import Tuning

FILE, PAGE, RECIPE = "tune.json", "tune.html", "recipe.toml"


def write_tuning(folder: Path, tuning: Tuning) -> None:
    """Write the search in every format; each file is complete or absent.

    Raises:
        EnvironmentFailure: the disk is full or not writable.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    write_atomic(
        folder / RECIPE,
        f"# {to_single_line(tuning.winner)}, by racdeploy tune\n{to_toml(tuning.recipe)}",
    )
    write_atomic(folder / PAGE, tuning_page.render(tuning))
    # Last: readers take it as the sign that the other files are complete.
    write_atomic(folder / FILE, tuning.model_dump_json(indent=1) + "\n")


def read_tuning(file: Path) -> Tuning:
    """Read a ``tune.json``.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return read_as(Tuning, file)
