"""Commands that show and remove what builds left in the user's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from racdeploy.cli.console import err, out, print_json, reported, show
from racdeploy.cli.options import JsonOpt, WorkOpt

if TYPE_CHECKING:
    from racdeploy.files.leftovers import Leftover

_COLUMNS = ("name", "state", "size", "last used")


@reported
def list_cache(work: WorkOpt = None, json_output: JsonOpt = False) -> None:
    """List stage folders and unpacked files: how large, when used, finished or not."""
    from racdeploy.files.leftovers import list_leftovers
    from racdeploy.report.tables import Table, readable_bytes
    from racdeploy.report.terminal import print_table

    found = list_leftovers(work)
    if json_output:
        print_json(_as_json(found))
        return

    rows = []
    for each in found:
        used = f"{each.idle_days:.0f} days ago" if each.idle_days >= 1 else "today"
        rows.append((each.name, each.state, readable_bytes(each.size_bytes), used))

    print_table(Table("", _COLUMNS, tuple(rows)), out)
    total = readable_bytes(sum(each.size_bytes for each in found))
    err.print(f"{len(found)} in all, {total}; racdeploy cache rm --older 30 removes old ones")


@reported
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names as racdeploy cache ls prints them.")
    ] = None,
    older: Annotated[
        float | None, typer.Option(min=0, help="Only what was not used for so many days.")
    ] = None,
    work: WorkOpt = None,
    json_output: JsonOpt = False,
) -> None:
    """Remove what can be made again; a folder in which a process works stays."""
    from racdeploy.files import leftovers
    from racdeploy.report.tables import readable_bytes

    chosen = leftovers.choose(leftovers.list_leftovers(work), names or [], older)
    for each in chosen:
        leftovers.remove(each)

    if json_output:
        print_json(_as_json(chosen))
        return

    for each in chosen:
        show(each.name)
    total = readable_bytes(sum(each.size_bytes for each in chosen))
    err.print(f"{len(chosen)} removed, {total}")


def _as_json(found: Sequence[Leftover]) -> dict[str, Any]:
    rows = []
    for each in found:
        rows.append(
            {
                "name": each.name,
                "path": str(each.path),
                "state": each.state,
                "size_bytes": each.size_bytes,
                "idle_days": round(each.idle_days, 2),
            }
        )
    return {"size_bytes": sum(each.size_bytes for each in found), "found": rows}
