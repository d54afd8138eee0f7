"""Every form of a search for the best model in one folder: ``tune.json`` and what is made of it.

``recipe.toml`` is the winner's, which ``racdeploy build --recipe`` takes for other models too.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from racdeploy.errors import ArtifactError
from racdeploy.files.reading import name_problem, read_json
from racdeploy.files.writing import disk_errors, write_atomic
from racdeploy.report import markdown, tuning_page
from racdeploy.report.settings import as_toml
from racdeploy.report.tables import plain
from racdeploy.results.tuning import Tuning

FILE, PAGE, RECIPE = "tune.json", "tune.html", "recipe.toml"
_MOST_BYTES = 64_000_000
_REMEDY = "copy it again, whole, or run racdeploy tune again"


def write_tuning(folder: Path, tuning: Tuning) -> None:
    """Write the search in every form; each file is whole or absent.

    Raises:
        EnvironmentFailure: the disk is full or not writable.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    write_atomic(folder / "tune.md", markdown.render_tuning(tuning))
    write_atomic(
        folder / RECIPE,
        f"# {plain(tuning.winner)}, the winner of racdeploy tune\n{as_toml(tuning.recipe)}",
    )
    write_atomic(folder / PAGE, tuning_page.render(tuning))
    # Last: it says that the others are there.
    write_atomic(folder / FILE, tuning.model_dump_json(indent=1) + "\n")


def read_tuning(file: Path) -> Tuning:
    """Read a ``tune.json``; ArtifactError where it is missing or damaged."""
    try:
        return Tuning.model_validate(read_json(file, _MOST_BYTES))
    except OSError as error:
        message = f"{file} cannot be read: {error.strerror}"
        raise ArtifactError("tuning-unreadable", message, remedy=_REMEDY) from error
    except ValidationError as error:
        message = f"{file} is not what racdeploy tune writes: {name_problem(error)}"
        raise ArtifactError("damaged-tuning", message, remedy=_REMEDY) from error


def name_page(file: Path) -> Path:
    """Return the place of the page of a ``tune.json``: beside it."""
    return file.with_name(f"{file.stem}.html")
