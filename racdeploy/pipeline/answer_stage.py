"""The answer stage: an artifact answers the evaluation prompts on its engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from racdeploy.engines import open_engine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import EngineSettings
from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.pipeline.workplace import Workplace, address
from racdeploy.tasks import Problem
from racdeploy.verify.answers import Answers, Respondent, identity


def answer_prompts(
    place: Workplace,
    respondent: Respondent,
    problems: Sequence[Problem],
    arm: str,
    artifact: Path,
    files: Mapping[str, str],
    backend: str,
    settings: EngineSettings,
    machine: Mapping[str, Any],
    again: bool,
) -> Answers:
    """Answer the evaluation prompts with one artifact; what an interrupted run answered counts.

    ``files`` are hashes by name; ``again`` repeats a finished run, because its speed counts.
    Answers of one earlier run come with what the engine counted then.
    """
    inputs = identity(files, respondent, settings, machine)
    stage = place.open("answers", address(__name__) | inputs)
    file = stage.folder / "completions.jsonl"
    cost = stage.folder / "cost.json"
    if stage.finished and again:
        file.unlink(missing_ok=True)

    answers = respondent.answer(
        lambda: open_engine(backend, artifact, settings), problems, arm, CompletionLog(file)
    )
    if stage.finished and not again and answers.earlier:
        counted = read_json(cost) if cost.is_file() else {}
        stored = {name: float(value) for name, value in counted.get("stats", {}).items()}
        return replace(answers, earlier_stats=stored, kernels=str(counted.get("kernels", "")))

    # Seconds differ from run to run, and what is in the stage's own files does not.
    counted = {"stats": dict(answers.stats), "kernels": answers.kernels}
    write_atomic(cost, json.dumps(counted))
    stage.finish({"answers": len(answers.records)})
    return answers
