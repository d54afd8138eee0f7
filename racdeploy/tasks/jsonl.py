"""Problems from the user's own file: one JSON object a line with ``question`` and ``answer``.

An answer that ends in ``#### 42``, as in GSM8K, is what follows. A line may name its ``scorer``.
"""

from __future__ import annotations

import json
from pathlib import Path

from racdeploy import scorers
from racdeploy.errors import UsageError
from racdeploy.problems.extract import extract_hash_mark
from racdeploy.tasks import Problem


def read(path: Path) -> list[Problem]:
    """Read every problem of a file; repeated questions count once, bad lines are refused."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot read {path}: {error}"
        raise UsageError(reason, remedy="give a UTF-8 .jsonl file") from error

    problems = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            problem = _parse(f"{path}:{number}", line)
            problems[problem.question] = problem

    if not problems:
        remedy = 'write {"question": …, "answer": …} lines'
        raise UsageError(f"{path} holds no problems", remedy=remedy)

    return [*problems.values()]


def _parse(place: str, line: str) -> Problem:
    remedy = 'each line is {"question": "…", "answer": "…"}'
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON: {error}", remedy=remedy) from error

    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{place} has no question", remedy=remedy)

    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UsageError(f"{place} has no answer", remedy=remedy)

    scorer = row.get("scorer", "")
    if not isinstance(scorer, str):
        raise UsageError(f"{place} has a scorer that is no name", remedy=remedy)

    try:
        scorers.check(scorer)
    except UsageError as error:
        raise UsageError(f"{place}: {error.message}", remedy=error.remedy) from error

    text = str(answer)
    return Problem(question, gold=extract_hash_mark(text) or text.strip(), scorer=scorer)
