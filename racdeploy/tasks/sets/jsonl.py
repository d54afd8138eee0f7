"""Problems from the user's own file: one JSON object a line with ``question`` and ``answer``.

If an answer contains ``#### 42``, as in GSM8K, the gold answer is 42. A line may name its
``scorer``.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.errors import UsageError
from racdeploy.files.reading import parse_json, read_user_text
from racdeploy.files.writing import split_lines
from racdeploy.tasks import Problem, scoring
from racdeploy.tasks.extraction import extract_hash_mark


def read(path: Path) -> list[Problem]:
    """Read every problem of a file, one a line.

    Raises:
        UsageError: a line is invalid, or the file is empty.
    """
    lines = split_lines(read_user_text(path, "give the path of an existing file"))

    problems = [
        _parse(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not problems:
        raise UsageError(
            "empty-task-file",
            f"{path} holds no problems",
            remedy='write {"question": …, "answer": …} lines',
        )

    return problems


def _parse(line_name: str, line: str) -> Problem:
    """Return the problem of a line; ``line_name`` is its file and number, for errors."""
    remedy = 'each line is {"question": "…", "answer": "…"}'
    row = parse_json(line, line_name, remedy=remedy)
    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise UsageError(
            "missing-question",
            f"{line_name} has no question{_explain_missing(row, 'question')}",
            remedy=remedy,
        )

    # bool is a subclass of int, but true and false are not answers.
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UsageError(
            "missing-answer",
            f"{line_name} has no answer{_explain_missing(row, 'answer')}",
            remedy=remedy,
        )

    scorer = row.get("scorer", "")
    if not isinstance(scorer, str):
        raise UsageError(
            "scorer-not-a-name", f"{line_name} has a scorer that is not a string", remedy=remedy
        )

    try:
        scoring.check(scorer)
    except UsageError as error:
        error.message = f"{line_name}: {error.message}"
        raise

    text = str(answer)
    return Problem(question, gold=extract_hash_mark(text) or text.strip(), scorer=scorer)


def _explain_missing(row: object, key: str) -> str:
    """Return the reason why a line lacks a valid value for a key."""
    if not isinstance(row, dict):
        return f": it is a {type(row).__name__}, not an object"
    if key in row:
        return f": it is {row[key]!r}"
    return f"; its keys are {', '.join(row) or 'none'}"
