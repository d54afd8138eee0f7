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
from racdeploy.pipeline.workspace import Workspace, identify_code
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import AnswerSampler, SampledAnswers, identify_answers


def answer_prompts(
    workspace: Workspace,
    sampler: AnswerSampler,
    problems: Sequence[Problem],
    arm: str,
    artifact: Path,
    files: Mapping[str, str],
    backend: str,
    settings: EngineSettings,
    machine: Mapping[str, Any],
    repeat_finished: bool,
) -> SampledAnswers:
    """Answer the evaluation prompts with one artifact; answers of an interrupted run are reused.

    Args:
        arm: name of the model in reports.
        files: hashes of the artifact's files by name.
        repeat_finished: repeat a finished run, because its speed is measured.

    Returns:
        The answers; if all are of an earlier run, with the statistics of its engine.
    """
    inputs = identify_answers(files, sampler, settings, machine)
    stage = workspace.open("answers", identify_code(__name__) | inputs)
    file = stage.folder / "completions.jsonl"
    cost = stage.folder / "cost.json"
    if stage.is_finished and repeat_finished:
        file.unlink(missing_ok=True)

    answers = sampler.answer(
        lambda: open_engine(backend, artifact, settings), problems, arm, CompletionLog(file)
    )
    if stage.is_finished and not repeat_finished and answers.reused:
        counted = read_json(cost) if cost.is_file() else {}
        stored = {name: float(value) for name, value in counted.get("stats", {}).items()}
        return replace(answers, reused_stats=stored, kernels=str(counted.get("kernels", "")))

    # Seconds differ from run to run, so they are not part of the stage's own summary.
    counted = {"stats": dict(answers.stats), "kernels": answers.kernels}
    write_atomic(cost, json.dumps(counted))
    stage.finish({"answers": len(answers.records)})
    return answers
