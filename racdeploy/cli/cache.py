"""Commands that list and remove cached results of builds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from racdeploy.cli.console import out, print_json, say, show
from racdeploy.cli.options import JsonOpt, WorkOpt

if TYPE_CHECKING:
    from racdeploy.files.cache_entries import CacheEntry

_COLUMNS = ("name", "state", "size", "last used")


def list_cache(work: WorkOpt = None, json_output: JsonOpt = False) -> None:
    """List cached folders and files with size, last use and state."""
    from racdeploy.files.cache_entries import list_cache_entries
    from racdeploy.report.tables import ReportTable, format_bytes
    from racdeploy.report.terminal import print_table

    entries = list_cache_entries(work)
    if json_output:
        print_json(_as_json(entries))
        return

    rows = []
    for each in entries:
        used = f"{each.idle_days:.0f} days ago" if each.idle_days >= 1 else "today"
        rows.append((each.name, each.state, format_bytes(each.size_bytes), used))

    print_table(ReportTable("", _COLUMNS, tuple(rows)), out)
    total = format_bytes(sum(each.size_bytes for each in entries))
    say(f"{len(entries)} in all, {total}; racdeploy cache rm --older 30 removes old ones")


def remove(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names, as printed by racdeploy cache ls.")
    ] = None,
    older: Annotated[
        float | None,
        typer.Option(min=0, help="Only entries that were not used for this many days."),
    ] = None,
    work: WorkOpt = None,
    json_output: JsonOpt = False,
) -> None:
    """Remove cached results; folders that a process is using are kept."""
    from racdeploy.files import cache_entries
    from racdeploy.report.tables import format_bytes

    chosen = cache_entries.select_entries(
        cache_entries.list_cache_entries(work), names or [], older
    )
    for each in chosen:
        cache_entries.remove_entry(each)

    if json_output:
        print_json(_as_json(chosen))
        return

    for each in chosen:
        show(each.name)
    total = format_bytes(sum(each.size_bytes for each in chosen))
    say(f"{len(chosen)} removed, {total}")


def _as_json(entries: Sequence[CacheEntry]) -> dict[str, Any]:
    rows = [
        {
            "name": each.name,
            "path": str(each.path),
            "state": each.state,
            "size_bytes": each.size_bytes,
            "idle_days": round(each.idle_days, 2),
        }
        for each in entries
    ]
    return {"size_bytes": sum(each.size_bytes for each in entries), "found": rows}
