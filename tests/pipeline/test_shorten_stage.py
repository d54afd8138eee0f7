"""The shorten stage: rounds that cost accuracy or save nothing are undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.phase_training import PhaseTrainer
from racdeploy.pipeline.prune_stage import PruneRequest
from racdeploy.pipeline.shorten_stage import ShortenedModel, ShortenStage
from racdeploy.pipeline.trace_stage import TraceRequest
from racdeploy.pipeline.workspace import Workspace
from racdeploy.pruning.process_group import ProcessGroup
from racdeploy.recipe import Pruning, Recipe, Recovery, Structure
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import make_trace

PROMPTS, SAMPLES = 8, 4
SETTINGS = Recovery(
    shorten=True,
    samples=SAMPLES,
    objective="shortest",
    batch_tokens=200,
    learning_rate=1e-3,
    rounds=2,
)


class Sampled:
    """Stands in for a model's answers: each model thinks so long, with a share of them right."""

    def __init__(self, *models: tuple[float, float]) -> None:
        self.models = models
        self.asked: list[tuple[Path | None, int]] = []

    def __call__(self, folder: Path | None, prompts: int) -> Sequence[Trace]:
        length, right = self.models[len(self.asked)]
        self.asked.append((folder, prompts))
        answers = []
        for index in range((prompts or PROMPTS) * SAMPLES):
            prompt, sample = divmod(index, SAMPLES)
            thinking = round(length * (20 + 3 * sample))
            trace = make_trace(index, 5, thinking, 4)
            ids = tuple(7 + place % 3 for place in range(thinking + 4))  # can be learned
            prompt_ids = make_trace(prompt, 5, 1, 1).prompt_ids
            correct = index < right * PROMPTS * SAMPLES
            answers.append(
                replace(trace, prompt_ids=prompt_ids, completion_ids=ids, correct=correct)
            )
        return answers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", dtype="float32")


def shorten(
    work: Path, model: Path, sampled: Sampled, settings: Recovery = SETTINGS
) -> ShortenedModel:
    """Run the stage as the build does."""
    dense, encoder = Checkpoint(model), PromptEncoder.from_folder(model)
    teacher = PhaseTrainer(Workspace(work, 1), dense, encoder, settings)
    return ShortenStage(teacher, encoder, PROMPTS, "tiny-shortened").run(sampled)


def test_two_rounds_are_kept(tmp_path: Path, model: Path) -> None:
    """The last one's answers are to the held-out prompts alone, and a second run learns nothing."""
    sampled = Sampled((1.0, 1.0), (0.8, 1.0), (0.6, 1.0))
    found = shorten(tmp_path / "work", model, sampled)
    assert found.folder
    assert [prompts for _, prompts in sampled.asked] == [0, 0, 2]
    assert [row.phase for row in found.rows if row.accuracy is not None] == [
        "shorter 0",
        "shorter 1",
        "shorter 2",
    ]
    assert {row.kl_nats for row in found.rows} == {None}, "its loss is no divergence"
    assert found.notes[-1] == (
        "shorten (shortest): thinking 0.602 times as long on held-out prompts, "
        "100.0% → 100.0% right"
    )

    before = file_sha256(found.folder / "model.safetensors")
    again = shorten(tmp_path / "work", model, Sampled((1.0, 1.0), (0.8, 1.0), (0.6, 1.0)))
    assert again == found
    assert file_sha256(found.folder / "model.safetensors") == before


@pytest.mark.parametrize(
    ("second", "reason"),
    [((0.7, 0.1), "held-out answers right"), ((0.79, 1.0), "times as long as at first")],
    ids=["costs accuracy", "saves nothing"],
)
def test_a_round_is_undone(
    tmp_path: Path, model: Path, second: tuple[float, float], reason: str
) -> None:
    """The state before it is kept, and the report says why."""
    found = shorten(tmp_path / "work", model, Sampled((1.0, 1.0), (0.8, 1.0), second))
    assert found.folder
    assert reason in found.notes[-2]
    assert [row.kept for row in found.rows if row.phase == "shorter 2"] == [False] * len(
        [row for row in found.rows if row.phase == "shorter 2"]
    )
    only_one = shorten(
        tmp_path / "work",
        model,
        Sampled((1.0, 1.0), (0.8, 1.0)),
        SETTINGS.model_copy(update={"rounds": 1}),
    )
    assert Checkpoint(found.folder).sha256 == Checkpoint(only_one.folder or Path()).sha256


@pytest.mark.parametrize("objective", ["preference", "concise"])
def test_other_objectives_teach_too(tmp_path: Path, model: Path, objective: str) -> None:
    """Of the model that is told to be brief, the prompt has the instruction before it."""
    settings = SETTINGS.model_copy(update={"objective": objective, "rounds": 1})
    sampled = Sampled((1.0, 1.0), (0.8, 1.0))
    found = shorten(tmp_path / "work", model, sampled, settings)
    assert found.rows[0].phase == "shorter 0"
    assert found.rows[-1].tokens > 0
    assert "shorten: no round" in found.notes[-1] or f"({objective})" in found.notes[-1]


def test_other_processes_go_on_with_the_shortened_model(tmp_path: Path, model: Path) -> None:
    """Their later jobs have the same dense model as the first process."""
    shorter = make_checkpoint(tmp_path / "shorter", "llama", dtype="float32", seed=5)
    models: list[str] = []
    build = Build(Job(Recipe.combine(None, {"model": str(model)})), tmp_path, 1)
    shortened = ShortenedModel(shorter, (), ())
    open_dense = partial(open_engine, "transformers")
    requests = [
        TraceRequest(settings=EngineSettings(), open=open_dense, model=model, sha256=""),
        PruneRequest(
            model=model,
            calibration=[],
            held_out=[],
            structure=Structure(),
            settings=Pruning(),
            quants={},
            keep_existing_zeros=False,
        ),
        build.recover_stage.trainer.prepare(model, [], []),
        shortened,
    ]

    class Jobs(ProcessGroup):
        def receive_jobs(self, describe: Any) -> Any:
            models.extend(describe(request)["model"] for request in requests)
            yield shortened
            models.extend(describe(request)["model"] for request in requests)

    replace(build, processes=Jobs()).follow()
    before, after = Checkpoint(model).sha256, Checkpoint(shorter).sha256
    assert before != after
    assert models == [before] * 4 + [after] * 4


def test_it_stops_at_the_share_that_was_asked(tmp_path: Path, model: Path) -> None:
    settings = SETTINGS.model_copy(update={"shorten": 0.85})
    sampled = Sampled((1.0, 1.0), (0.8, 1.0))
    assert shorten(tmp_path / "work", model, sampled, settings).folder


def test_nothing_to_take(tmp_path: Path, model: Path) -> None:
    """Answers of one length: no round is kept, and no model is trained."""
    sampled = Sampled((0.0, 1.0))
    found = shorten(tmp_path / "work", model, sampled)
    assert found.folder is None
    assert "no prompt with a shorter right answer" in found.notes[0]
    assert len(sampled.asked) == 1


def test_all_answers_wrong(tmp_path: Path, model: Path) -> None:
    with raises("nothing-right-to-shorten"):
        shorten(tmp_path / "work", model, Sampled((1.0, 0.0)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "shortes"}, "did you mean 'shortest'"),
        ({"methods": ["blockwise"]}, "'full' or 'scales'"),
        ({"shorten": 1.5}, "a share above 0"),
        ({"shorten": 0.0}, "a share above 0"),
    ],
)
def test_settings_that_cannot_shorten(settings: dict[str, object], said: str) -> None:
    """Errors of the recipe, before any work."""
    with pytest.raises(ValidationError, match=said):
        Recovery.model_validate({"shorten": True} | settings)


def test_one_prompt_cannot_both_teach_and_judge() -> None:
    with raises("invalid-settings"):
        Recipe.combine(None, {"recover": {"shorten": True}, "traces": {"count": 1}})
    Recipe.combine(None, {"recover": {"shorten": True}, "traces": {"count": 2}})
