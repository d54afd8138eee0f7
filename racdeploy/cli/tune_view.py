"""View of a running search on stderr: bars, and a line for each step of a candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from racdeploy.cli.console import print_notes
from racdeploy.cli.progress import show_progress
from racdeploy.engines.engine import Progress
from racdeploy.report.tables import format_with_units, to_single_line

if TYPE_CHECKING:
    from racdeploy.results.tuning import Candidate

Show = Callable[["list[str] | Candidate"], None]


@contextmanager
def show_search(console: Console, quiet: bool = False) -> Iterator[tuple[Progress, Show]]:
    """Yield a progress callback, and a listener that prints the plan and candidates' steps."""
    with show_progress(console, quiet, keep=False) as progress:
        yield progress, (lambda event: None) if quiet else _print_steps(console)


def _print_steps(console: Console) -> Show:
    """Return a listener that prints the plan, and a line for each new step of a candidate."""
    known = set()

    def show(each: list[str] | Candidate) -> None:
        if isinstance(each, list):
            print_notes(each)
            return
        if each.reached == "counted":
            return
        words = [f"{each.name}: {each.reached}", format_with_units("{0.size_bytes:bytes}", each)]
        if each.prompts:
            words.append(f"{each.correct}/{each.prompts} right")
        elif each.kl_nats is not None:
            words.append(f"KL {each.kl_nats:.2g}")
        if each.reason:
            words.append(f"stops: {each.reason}")

        line = to_single_line(", ".join(words))
        if line not in known:
            known.add(line)
            console.print(line, markup=False, soft_wrap=True, highlight=False)

    return show
