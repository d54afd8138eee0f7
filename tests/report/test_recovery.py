"""What a model learned from the dense one: the phases, the sentence and the CSV."""

from __future__ import annotations

import csv
import json

import pytest
from pydantic import ValidationError

from racdeploy.report import html, markdown
from racdeploy.report.recovery import describe_recovery, to_csv
from racdeploy.report.tables import list_tables
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.pruning import RecoveryRow, list_phase_ends
from racdeploy.results.report import Report

START = RecoveryRow(phase="start", tokens=0, kl_nats=0.9, accuracy=0.5)
LOOKS = (
    RecoveryRow(phase="full", tokens=500_000, loss=0.4, kl_nats=0.09),
    RecoveryRow(phase="full", tokens=1_000_000, loss=0.2, kl_nats=0.03, accuracy=0.9),
)
WORSE = RecoveryRow(phase="own answers 1", tokens=1_200_000, kl_nats=0.3, accuracy=0.8, kept=False)
BETTER = RecoveryRow(phase="own answers 2", tokens=1_500_000, kl_nats=0.02, accuracy=0.95)
ROWS = (START, *LOOKS, WORSE, BETTER)


def test_nothing_is_said_where_nothing_was_learned(
    report: Report, records: list[AnswerRecord]
) -> None:
    """No phase, no sentence, no table, no section."""
    cut = report.model_copy(update={"recovery": ()})
    assert (list_phase_ends(()), describe_recovery(())) == ([], "")
    assert 'id="recovery"' not in html.render(cut, records)
    assert "Recovery" not in markdown.render(cut)
    assert "learned from" not in markdown.render(cut)


def test_a_phase_is_what_its_last_look_saw() -> None:
    """One for each phase, in order; what was measured earlier in a phase is not its end."""
    assert list_phase_ends(ROWS) == [START, LOOKS[1], WORSE, BETTER]
    assert list_phase_ends(ROWS[:2]) == [START, LOOKS[0]]


def test_the_table_has_a_row_for_each_phase(report: Report) -> None:
    """Three digits of KL, a dash where nothing was asked, and what was undone."""
    silent = BETTER.model_copy(update={"kl_nats": None, "accuracy": None})
    learned = report.model_copy(update={"recovery": (START, *LOOKS, WORSE, silent)})
    (table,) = [table for table in list_tables(learned) if table.title == "Recovery"]
    assert table.rows == (
        ("start", "0", "0.9", "50.0%", "yes"),
        ("full", "1,000,000", "0.03", "90.0%", "yes"),
        ("own answers 1", "1,200,000", "0.3", "80.0%", "no, undone"),
        ("own answers 2", "1,500,000", "–", "–", "yes"),
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS, "1,300,000 tokens afterwards: KL 0.9 → 0.02 nats on held-out traces"),
        (ROWS[:4], "1,000,000 tokens afterwards: KL 0.9 → 0.03 nats on held-out traces"),
        ((START.model_copy(update={"kl_nats": None}), BETTER), "1,500,000 tokens afterwards"),
        ((START, WORSE), ""),
        ((START,), ""),
    ],
)
def test_only_what_entered_the_model_is_in_the_sentence(
    rows: tuple[RecoveryRow, ...], said: str
) -> None:
    """Neither the tokens nor the KL of an undone phase; no KL where one end was not measured."""
    assert describe_recovery(rows) == (f"learned from the dense model on {said}" if said else "")


def test_shortening_is_told_apart_from_recovery() -> None:
    """Its tokens are of another training, and its loss is no divergence."""
    shorter = [
        RecoveryRow(phase="shorter 0", tokens=0, accuracy=0.9),
        RecoveryRow(phase="shorter 1", tokens=50_000, loss=0.3, accuracy=0.9),
    ]
    said = "learned from its own answers to think less, before it was pruned"
    assert describe_recovery(shorter) == said
    assert describe_recovery([*shorter, *ROWS]) == f"{said}, and {describe_recovery(ROWS)}"

    undone = [shorter[0], shorter[1].model_copy(update={"kept": False})]
    assert describe_recovery([*undone, *ROWS]) == describe_recovery(ROWS)


def test_the_csv_reads_back_as_the_looks() -> None:
    """A header and one line for each look; what was not measured is empty."""
    text = to_csv((START, LOOKS[0], WORSE))
    assert text == (
        "phase,tokens,loss,kl_nats,text_kl_nats,accuracy,kept\n"
        "start,0,,0.9,,0.5,True\n"
        "full,500000,0.4,0.09,,,True\n"
        "own answers 1,1200000,,0.3,,0.8,False\n"
    )

    found = []
    for line in csv.DictReader(to_csv(ROWS).splitlines()):
        found.append(RecoveryRow.model_validate({key: line[key] or None for key in line}))
    assert tuple(found) == ROWS


def test_a_name_with_a_comma_stays_one_cell() -> None:
    """Commas, quotes and line ends of a name are quoted."""
    named = START.model_copy(update={"phase": 'a, "b"\nc'})
    header, row = csv.reader(to_csv((named,)).splitlines(keepends=True))
    assert (len(row), row[0]) == (len(header), 'a, "b"\nc')


@pytest.mark.parametrize(
    "change", [{"tokens": -1}, {"accuracy": 1.5}, {"phase": None}, {"kl": 0.1}, {"kept": "perhaps"}]
)
def test_a_look_that_cannot_be_is_refused(report: Report, change: dict[str, object]) -> None:
    """Fewer than no tokens, more than all prompts, no name, another key, neither kept nor not."""
    stored = json.loads(report.model_dump_json())
    Report.model_validate(stored)
    stored["recovery"][1] |= change
    with pytest.raises(ValidationError):
        Report.model_validate(stored)


def test_a_report_from_before_has_none(report: Report) -> None:
    """A stored one without the key reads as one of a model that learned nothing."""
    stored = json.loads(report.model_dump_json())
    del stored["recovery"]
    assert Report.model_validate(stored).recovery == ()


def test_a_phase_has_the_divergence_of_the_state_it_left() -> None:
    """That of its best look: a training may get worse before it ends, and its best state stays."""
    best = RecoveryRow(phase="full", tokens=10, kl_nats=0.2, text_kl_nats=0.5)
    last = RecoveryRow(phase="full", tokens=20, kl_nats=0.4, text_kl_nats=0.6, accuracy=0.9)
    (phase,) = list_phase_ends((best, last))
    assert (phase.tokens, phase.kl_nats, phase.text_kl_nats, phase.accuracy) == (20, 0.2, 0.5, 0.9)
