"""A search that runs, on stderr: bars on a terminal, and a line for each candidate's next step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from racdeploy.cli.progress import show_progress
from racdeploy.engines.engine import Progress
from racdeploy.report.tables import plain, say

if TYPE_CHECKING:
    from racdeploy.results.tuning import Candidate

Show = Callable[["Candidate"], None]


@contextmanager
def show_search(console: Console, quiet: bool = False) -> Iterator[tuple[Progress, Show]]:
    """Yield what shows the stage that runs, and what shows a candidate that came further."""
    with show_progress(console, quiet, keep=False) as progress:
        yield progress, (lambda candidate: None) if quiet else _print_steps(console)


def _print_steps(console: Console) -> Show:
    """Return what prints a line where a candidate came further than it was counted."""
    known: set[str] = set()

    def show(each: Candidate) -> None:
        if each.reached == "counted":
            return
        words = [f"{each.name}: {each.reached}", say("{0.size_bytes:bytes}", each)]
        if each.prompts:
            words.append(f"{each.correct}/{each.prompts} right")
        elif each.kl_nats is not None:
            words.append(f"KL {each.kl_nats:.2g}")
        if each.reason:
            words.append(f"stops: {each.reason}")

        line = plain(", ".join(words))
        if line not in known:
            known.add(line)
            console.print(line, markup=False, soft_wrap=True, highlight=False)

    return show
