"""Commands that keep a mix of number formats under a name, and list what there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from racdeploy import plugins
from racdeploy.cli.console import err, out, print_json, reported
from racdeploy.cli.options import JsonOpt
from racdeploy.errors import UsageError

if TYPE_CHECKING:
    from racdeploy.quant.saved_presets import SavedPreset

_COLUMNS = ("preset", "from", "most tensors", "rules", "why")


@reported
def list_presets(json_output: JsonOpt = False) -> None:
    """List the presets that --quant takes: those that ship with racdeploy, and your own."""
    from racdeploy.quant import saved_presets
    from racdeploy.report.tables import Table, plain
    from racdeploy.report.terminal import print_table

    found: list[dict[str, Any]] = []
    for name in plugins.names("presets"):
        shipped = plugins.load("presets", name)
        why = (shipped.__doc__ or "").partition("\n")[0]
        rules = len(shipped.RULES)
        found.append(
            {"name": name, "from": "racdeploy", "quant": shipped.QUANT, "rules": rules, "why": why}
        )

    for name in saved_presets.names():
        own = saved_presets.read(name)
        rules = len(own.tensors)
        found.append(
            {"name": name, "from": "you", "quant": own.quant, "rules": rules, "why": own.why}
        )

    if json_output:
        print_json({"folder": str(saved_presets.folder()), "presets": found})
        return

    rows = tuple(tuple(plain(str(cell)) for cell in each.values()) for each in found)
    print_table(Table("", _COLUMNS, rows), out)
    err.print(f"your own are in {saved_presets.folder()}", markup=False, soft_wrap=True)


@reported
def save_preset(
    name: Annotated[str, typer.Argument(help="Name that --quant shall take.")],
    source: Annotated[
        Path,
        typer.Option("--from", help="tune.json (of its winner), recipe file, or bundle folder."),
    ],
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace your preset of that name.")
    ] = False,
    json_output: JsonOpt = False,
) -> None:
    """Keep the number formats of a search, a recipe or a bundle under a name."""
    from racdeploy.quant import saved_presets

    preset = read_preset(source)
    file = saved_presets.save(name, preset, force)

    if json_output:
        print_json({"file": str(file), **preset.model_dump()})
        return
    out.print(str(file), markup=False, soft_wrap=True)
    own = saved_presets.fold(name)
    err.print(f"next: racdeploy build MODEL --quant {own}", markup=False, soft_wrap=True)


def read_preset(source: Path) -> SavedPreset:
    """Return the number formats of a search, a recipe or a bundle.

    Raises:
        ArtifactError: a search or a bundle is damaged.
        UsageError: no number format is said, or one that there is not.
    """
    from racdeploy.quant import saved_presets
    from racdeploy.storage.toml import validate

    export = _read_export(source)
    if not export.get("quant"):
        raise UsageError(
            f"{source} says no number format",
            remedy="give a file whose [export] has quant, and tensors if some differ",
        )

    chosen = saved_presets.resolve({"format": "gguf", **_drop_none(export)})
    kept = {key: chosen[key] for key in ("quant", "tensors") if key in chosen}
    origin = "the winner of " if source.suffix == ".json" else ""
    values = {**kept, "why": f"{origin}{source.name}"[:200]}
    return validate(saved_presets.SavedPreset, values, str(source))


def _read_export(source: Path) -> Mapping[str, Any]:
    """Return the ``export`` of whatever a file or folder says."""
    from racdeploy.manifest import Manifest
    from racdeploy.report.tuning_files import read_tuning
    from racdeploy.storage.toml import read_toml

    if source.is_dir():
        recipe: Mapping[str, Any] = Manifest.read(source).recipe
    elif source.suffix == ".json":
        recipe = read_tuning(source).recipe_of_winner
    else:
        recipe = read_toml(source)

    export = recipe.get("export", {})
    return export if isinstance(export, Mapping) else {}


def _drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
