"""What a search found, as ``racdeploy report`` reads it.

What is accepted is written and read again as the same search.
"""

from __future__ import annotations

from collections.abc import Iterator

from racdeploy.report import tuning_page
from racdeploy.report.tuning_files import read_tuning
from racdeploy.results.tuning import Tuning
from tests.fuzz.mutation import of_json
from tests.fuzz.oracle import expect, place
from tests.support.sample_tuning import build_tuning

READERS = (
    *("racdeploy.results.tuning", "racdeploy.report.tuning_page", "racdeploy.report.tuning_tables"),
    *("racdeploy.report.tuning_page", "racdeploy.report.toml_writer"),
)
_WORDS = (
    *("export.quant", "export.tensors", "prune.ignore", "structure.keep", "export", "q4_k_m"),
    *("accuracy", "seconds-per-correct-answer", "counted", "verified", "Infinity", "Q4_0"),
    *("<script>alert(1)</script>", "'\"><b>", "(a+)+$", {"(": "q8_0"}, {"^blk": "Q8_0"}),
)
mutator = of_json(_WORDS)


def target(data: bytes) -> None:
    """Read a search, make its page."""
    file = place("tune.json", data)
    tuning = read_tuning(file)

    text = tuning.model_dump_json()
    again = Tuning.model_validate_json(text)
    expect(again.model_dump_json() == text, "it is written as another search")

    page = tuning_page.render(tuning)
    expect("<script>alert" not in page, "its words are code of the page")


def seeds() -> Iterator[bytes]:
    """Yield a whole search, a small one, and one whose lists are none."""
    whole = build_tuning()
    yield whole.model_dump_json().encode()

    few = tuple(each for each in whole.candidates if each.name in (whole.winner, whole.rival))
    small = whole.model_copy(update={"candidates": few, "reference": ""})
    yield small.model_dump_json().encode()
    yield (
        small.model_copy(update={"recipe": {"tasks": 7, "also": "gguf"}}).model_dump_json().encode()
    )
