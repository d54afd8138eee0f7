"""Markdown: the golden file, its sensitivity, escaping, and the size of a pull-request comment."""

from __future__ import annotations

import re

import pytest

from racdeploy.report import markdown
from racdeploy.report.tables import list_tables
from racdeploy.results.answers import AnswerRecord, Comparison
from racdeploy.results.pruning import LinearRow, TensorRow
from racdeploy.results.report import Report
from tests.support.sample_report import GOLDEN, HOSTILE

_UNEXPLAINED = "the method reached another sparsity than requested"


def changed(report: Report, **values: object) -> Report:
    return report.model_copy(update=values)


def test_the_report_matches_the_golden_file(report: Report, records: list[AnswerRecord]) -> None:
    """Every character; ``python -m tests.support.sample_report`` writes it again, to read the
    diff.
    """
    assert markdown.render(report, records) == GOLDEN.read_text(encoding="utf-8")


def test_the_golden_test_notices_one_changed_value(
    report: Report, records: list[AnswerRecord]
) -> None:
    """One more wrong answer, one other size, one other verdict: each shows."""
    golden = GOLDEN.read_text(encoding="utf-8")
    pruned = report.arms[1]
    assert isinstance(report.comparison, Comparison)
    spoiled = (
        changed(
            report, arms=(report.arms[0], pruned.model_copy(update={"unclosed": 2}), report.arms[2])
        ),
        changed(report, arms=(report.arms[0], pruned.model_copy(update={"size_bytes": 5_400_000}))),
        changed(report, comparison=report.comparison.model_copy(update={"drop_upper": 0.0272})),
        changed(
            report,
            checks=(report.checks[0].model_copy(update={"verdict": "fail"}), *report.checks[1:]),
        ),
    )
    assert [markdown.render(one, records) == golden for one in spoiled] == [False] * len(spoiled)


def test_zeros_that_are_not_as_asked_have_a_reason(report: Report) -> None:
    """Linears with one reason are one row, from the lowest to the highest share; without a reason,
    the old words.
    """
    rows = [
        LinearRow(
            name=f"model.layers.{i}.o_proj",
            requested_sparsity=0.5,
            actual_sparsity=0.5 + i / 100,
            reason=reason,
        )
        for i, reason in enumerate(
            ("", "codes of q4_0 rounded to zero", "codes of q4_0 rounded to zero", "")
        )
    ]
    (table,) = [
        table
        for table in list_tables(changed(report, linears=tuple(rows), tensors=()))
        if table.title == "Deviations"
    ]
    assert table.rows == (
        (
            "sparsity",
            "50.0%",
            "51.0% to 52.0%",
            "2 × model.layers.*.o_proj",
            "codes of q4_0 rounded to zero",
        ),
        ("sparsity", "50.0%", "53.0%", "model.layers.3.o_proj", _UNEXPLAINED),
    )


def test_hostile_text_stays_text() -> None:
    """No tag, cell border, code span, mention, issue link, URL or escape sequence; one line."""
    escaped = markdown.escape(HOSTILE)
    assert "<" not in escaped
    assert "@" not in escaped
    assert "://" not in escaped
    assert not re.search(r"(?<!\\)[|`\[\]]", escaped)
    assert not re.search(r"[\x00-\x1f\u202e]", escaped)
    assert not re.search(r"(?<!&)#", escaped)


def test_a_backslash_cannot_free_a_pipe() -> None:
    r"""``\|`` must not become ``\\|``, an escaped backslash before a bare border."""
    assert markdown.escape("a\\|b") == "a\\\\\\|b"


def test_every_table_row_has_as_many_cells_as_its_header(report: Report) -> None:
    """Hostile cells do not break a row."""
    blocks = re.findall(r"(?:^\|.*\n?)+", markdown.render(report), flags=re.MULTILINE)
    assert len(blocks) == 7
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_a_huge_report_fits_a_comment_and_says_what_is_missing(report: Report) -> None:
    """GitHub refuses above 65 536 characters; nothing is left out silently."""
    tensors = tuple(
        TensorRow(
            name=f"{i}",
            requested_quant="Q4_K",
            actual_quant="F16",
            zeros=0,
            size_bytes=1,
            reason=f"{i} " + "x" * 3000,
        )
        for i in range(500)
    )
    text = markdown.render(changed(report, tensors=tensors, notes=("y" * 3000,) * 300))
    assert len(text) < 65_536
    assert "471 more rows are in report.html" in text
    assert "270 more notes are in report.html" in text
    assert "more characters)" in text


def test_a_text_beyond_the_limit_is_cut_at_a_line(report: Report) -> None:
    """The last resort: cells full of characters that grow when they are escaped."""
    notes = ("@" * 400,) * 30
    tensors = tuple(
        TensorRow(
            name=f"{i}",
            requested_quant="a",
            actual_quant="b",
            zeros=0,
            size_bytes=1,
            reason=f"{i}" + "@" * 390,
        )
        for i in range(30)
    )
    text = markdown.render(changed(report, tensors=tensors, notes=notes))
    assert len(text) < 65_536
    assert text.endswith("the rest is in report.html and report.json._\n\n</details>\n")


@pytest.mark.parametrize(
    ("checks", "sentence"),
    [((), "No check ran, and missing data never passes."), (None, "Every check was skipped")],
)
def test_missing_data_reads_inconclusive(
    report: Report, checks: tuple[()] | None, sentence: str
) -> None:
    """Neither an empty list of checks nor only skipped ones reads like a pass."""
    text = markdown.render(changed(report, checks=report.checks[2:] if checks is None else checks))
    assert text.startswith("### ⚠️ INCONCLUSIVE")
    assert sentence in text


def test_a_failed_check_is_named(report: Report) -> None:
    """The explanation says which check failed."""
    failed = report.checks[1].model_copy(update={"verdict": "fail"})
    text = markdown.render(changed(report, checks=(report.checks[0], failed)))
    assert text.startswith("### ❌ FAIL")
    assert "Failed: thinking." in text


@pytest.mark.parametrize(
    ("verdict", "drop", "lower", "words"),
    [
        (
            "pass",
            0.0,
            -0.02,
            "No measurable loss: 0.0 points, at most 2.6 (margin 5.0, 256 prompts).",
        ),
        ("pass", 0.01, -0.01, "No measurable loss: 1.0 points, at most 2.6"),
        ("pass", -0.01, -0.03, "No measurable loss: 1.0 points more, at most 2.6 fewer"),
        ("pass", 0.01, 0.002, "1.0 points fewer right answers (90% interval of the loss 0.2 to"),
        ("inconclusive", 0.01, -0.01, "1.0 points fewer right answers, not significant"),
        ("fail", 0.01, 0.002, "1.0 points fewer right answers (90% interval of the loss 0.2 to"),
    ],
)
def test_the_first_sentence_is_in_words(
    report: Report, verdict: str, drop: float, lower: float, words: str
) -> None:
    """Equal is not called fewer, and what may be a loss is not called none."""
    assert isinstance(report.comparison, Comparison)
    values = {"verdict": verdict, "drop": drop, "drop_lower": lower}
    text = markdown.render(changed(report, comparison=report.comparison.model_copy(update=values)))
    assert words in text


def test_lost_prompts_are_folded_into_the_comment(
    report: Report, records: list[AnswerRecord]
) -> None:
    """Those of the sample: question, right answer, both answers and both lengths, on one line."""
    text = markdown.render(report, records)
    lines = _lost_lines(text)
    assert "<summary>4 prompts were lost: dense is right and pruned is not</summary>\n\n|" in text
    assert len(lines) == 4
    assert lines[0] == (
        "| word_problem | Ann has 7 apples &amp; gives 3 away. | 4 | 4 "
        "| the thinking never ends | 184 → 512 |"
    )
    assert "prompts were lost" not in markdown.render(report)


def test_many_lost_prompts_leave_room_and_are_counted(
    report: Report, records: list[AnswerRecord]
) -> None:
    """Ten rows at most, fewer where each is long; every one of the others is counted."""
    lost = [
        record.model_copy(update={"correct": record.arm == "dense"}) for record in records[:100]
    ]
    text = markdown.render(report, lost)
    assert len(_lost_lines(text)) == 10
    assert "_40 more are in report.html and records.jsonl._" in text


@pytest.mark.parametrize(
    "attack",
    [
        "@octocat " * 900,
        "```\n</details>\n# Big\n" * 900,
        "</summary></details><img src=x onerror=alert(1)>" * 300,
        "| cell $x$ #1 GH-2 www.example.org https://example.org" * 300,
        "\\" * 9000,
        "\U0001f600" * 9000,
    ],
)
def test_no_text_of_a_model_leaves_its_cell(
    report: Report, records: list[AnswerRecord], attack: str
) -> None:
    """Whatever it says, the comment fits, its folds end, and nobody is called by name."""
    texts = dict.fromkeys(("task", "question", "gold", "extracted", "answer_text"), attack)
    hostile = [
        record.model_copy(update=texts | {"correct": record.arm == "dense"})
        for record in records[:200]
    ]
    text = markdown.render(report, hostile)
    without = markdown.render(report, records)

    assert len(text) < 65_536
    assert text.count("<details>") == text.count("</details>") == without.count("<details>") == 2
    assert not re.search(r"@|(?<!\\)[`$]|<img|\bGH-\d|www\.", text)
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 7 for line in _lost_lines(text))
    assert _lost_lines(text)


def _lost_lines(text: str) -> list[str]:
    """Return the rows of the table of lost prompts."""
    _, _, rest = text.partition("| task | question |")
    rows, _, _ = rest.partition("</details>")
    return [line for line in rows.splitlines()[2:] if line.startswith("|")]
