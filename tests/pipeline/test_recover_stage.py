"""The recover stage: phases in order, what made the model worse is undone, kills change nothing."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import recover_stage
from racdeploy.pipeline.phase_training import PhaseTrainer, TrainingRequest
from racdeploy.pipeline.recover_stage import CollectTraces, RecoverStage, spread_evenly
from racdeploy.pipeline.recovery_phases import Phase, list_phases
from racdeploy.pipeline.workspace import Workspace
from racdeploy.pruning import PrunedModel
from racdeploy.recipe import Calibration, Recovery
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.trace import Trace
from tests.support.errors import raises
from tests.support.fork_server import fork_context
from tests.support.more import some
from tests.support.tiny_training_run import TAUGHT, make_training_run

TOKENS = 3000
SETTINGS = Recovery(tokens=TOKENS, batch_tokens=100, learning_rate=1e-3, methods=("full",))
IN_PHASES = SETTINGS.model_copy(update={"tokens": 1200, "methods": ("blockwise", "full")})
CALIBRATION = Calibration(source="prompt")
DENSE = [replace(trace, correct=True) for trace in TAUGHT]


class Asked:
    """Stands in for the trace stage: each model answers a share of the prompts right."""

    def __init__(self, folder: Path, shares: Sequence[float], longer: float = 1.0) -> None:
        self.folder, self.shares, self.longer = folder, list(shares), longer
        self.models: list[Path | None] = []
        self.firsts: list[int] = []

    def __call__(self, model: Path | None, first: int, /) -> tuple[Path, list[Trace]]:
        if model is None:
            return self.folder, DENSE
        if model not in self.models:
            self.models.append(model)
            self.firsts.append(first)

        place = self.models.index(model)
        right = round(self.shares[place] * len(DENSE))
        thinking = self.longer if place else 1.0
        return self.folder, [
            replace(
                trace,
                correct=index < right,
                thinking_tokens=round(thinking * trace.thinking_tokens),
            )
            for index, trace in enumerate(DENSE[: first or None])
        ]


def make_stage(place: Workspace, dense: Checkpoint, settings: Recovery) -> RecoverStage:
    encoder = PromptEncoder.from_folder(dense.folder)
    return RecoverStage(place, dense, encoder, settings, CALIBRATION)


@pytest.fixture
def stage(tmp_path: Path) -> RecoverStage:
    training_run = make_training_run(tmp_path)
    return make_stage(Workspace(tmp_path / "work", 1), training_run.dense, SETTINGS)


@pytest.fixture
def model(tmp_path: Path) -> PrunedModel:
    return PrunedModel(tmp_path / "sparse", 0.5, (), (), {}, ("pruned",))


def run(stage: RecoverStage, model: PrunedModel, collect: CollectTraces) -> PrunedModel:
    """Recover a model as the build does."""
    return stage.run(model, "tiny-recovered", collect)


def test_dense_traces_come_before_own_answers() -> None:
    """A quarter of the tokens is learned on those, in rounds, by the most capable method."""
    settings = Recovery(tokens=800)
    assert list_phases(settings, ("blockwise", "full")) == [
        Phase("blockwise", "blockwise", False, 300),
        Phase("full", "full", False, 300),
        Phase("own answers 1", "blockwise", True, 100),
        Phase("own answers 2", "blockwise", True, 100),
    ]


def test_scales_take_a_tenth_and_teach_no_answers() -> None:
    """They are few numbers; alone they take all."""
    settings = Recovery(tokens=1100, on_policy=0.0)
    assert [phase.tokens for phase in list_phases(settings, ("full", "scales"))] == [1000, 100]
    assert [phase.tokens for phase in list_phases(settings, ("scales",))] == [1100]

    own = list_phases(Recovery(tokens=1100, on_policy=1.0, rounds=1), ("full", "scales"))
    assert own == [Phase("own answers 1", "full", True, 1100)]


def test_scales_come_last() -> None:
    """After own answers too, for those move the weights; alone they come first."""
    phases = list_phases(Recovery(tokens=2200, on_policy=0.5, rounds=1), ("full", "scales"))
    assert [phase.name for phase in phases] == ["full", "own answers 1", "scales"]
    alone = list_phases(Recovery(tokens=2200, on_policy=0.5, rounds=1), ("scales",))
    assert [phase.name for phase in alone] == ["scales", "own answers 1"]


@pytest.mark.parametrize(("methods", "moved"), [(("full",), False), (("full", "scales"), True)])
def test_codes_are_chosen_once_the_weights_are_done(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path, methods: tuple[str, ...], moved: bool
) -> None:
    """Of what own answers left, on the dense traces; scales learn on them."""
    chosen: list[tuple[Path, Sequence[Trace], str]] = []

    def choose_codes(folder: Path, traces: Sequence[Trace], name: str) -> Path:
        chosen.append((folder, traces, name))
        return Path(shutil.copytree(folder, tmp_path / "coded"))

    settings = stage.settings.model_copy(update={"methods": methods, "on_policy": 0.0})
    coding = replace(stage, settings=settings)
    asked = Asked(tmp_path, [0.5, 0.8, 0.9])
    found = coding.run(model, "tiny-recovered", asked, choose_codes)

    assert chosen == [(asked.models[1], DENSE, "tiny-recovered")]
    assert (found.folder == tmp_path / "coded") is not moved
    assert "the codes of the number format were chosen after recovery" in found.notes
    assert found.before_recovery == model.folder


def test_a_model_without_a_gain_gets_no_codes(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """Pruning it again for the number format is better: only that knows the dense model."""

    def choose_codes(folder: Path, traces: Sequence[Trace], name: str) -> Path:
        raise AssertionError(folder)

    found = stage.run(model, "tiny", Asked(tmp_path, [0.9, 0.5, 0.5, 0.5]), choose_codes)
    assert found.folder == model.folder


@pytest.mark.parametrize(("own_share", "answered"), [(0.0, [10, 10]), (0.25, [10, 15])])
def test_no_more_is_asked_than_is_learned_from_or_judged(
    stage: RecoverStage,
    model: PrunedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_share: float,
    answered: list[int],
) -> None:
    """Answers that teach are as many as the next phase has tokens for; the others only judge."""
    monkeypatch.setattr(recover_stage, "PROBE_PROMPTS", 10)
    settings = SETTINGS.model_copy(update={"on_policy": own_share})
    asked = Asked(tmp_path, [0.5, 0.8, 0.9, 0.9])
    found = run(replace(stage, settings=settings), model, asked)

    assert asked.firsts[:2] == answered
    assert math.ceil(0.125 * TOKENS * len(DENSE) / sum(len(each.ids) for each in DENSE)) == 15

    # Half of all prompts are right from the start, those first: of the first ten all are.
    start = [row for row in found.recovery if row.phase == "start"]
    assert start[-1].accuracy == 1.0


def test_each_phase_begins_where_the_one_before_ended(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """Divergence and tokens run on; the recovered model is the last one, and its rows say all."""
    asked = Asked(tmp_path, [0.5, 0.8, 0.9, 0.9])
    stage = replace(
        stage, settings=stage.settings.model_copy(update={"methods": ("blockwise", "full")})
    )
    found = run(stage, model, asked)

    phases = list(dict.fromkeys(row.phase for row in found.recovery))
    assert phases[:3] == ["start", "blockwise", "full"]
    tokens = [row.tokens for row in found.recovery]
    assert tokens == sorted(tokens)
    assert found.recovery[0].accuracy == 0.5
    assert found.folder == asked.models[-1]
    assert found.folder.name == "tiny-recovered"
    assert found.before_recovery == model.folder

    ends = [row.kl_nats for row in found.recovery if row.accuracy is not None]
    assert len(ends) >= 3
    assert found.notes[-1].startswith("recovery: 50.0% → ")


def test_prompts_that_are_looked_at_teach_nothing(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the dense model's traces of them nor the own answers: else a look would flatter."""
    seen: dict[str, set[int]] = {"train_traces": set(), "held_out": set()}
    learn = PhaseTrainer.train

    def watch(self: PhaseTrainer, folder: Path, name: str, request: TrainingRequest) -> Any:
        for key, indices in seen.items():
            indices.update(trace.index for trace in getattr(request, key))
        return learn(self, folder, name, request)

    monkeypatch.setattr(PhaseTrainer, "train", watch)
    found = run(stage, model, Asked(tmp_path, [0.5, 0.9, 0.9, 0.9]))
    assert any(row.phase.startswith("own") for row in found.recovery) or found.notes
    assert seen["held_out"]
    assert not seen["train_traces"] & seen["held_out"]
    assert len(seen["train_traces"] | seen["held_out"]) == len(DENSE)


def test_looks_have_a_bound() -> None:
    """Traces from all over, as many as fit."""
    assert spread_evenly(DENSE, 10**9) == DENSE
    few = spread_evenly(DENSE, 200)
    assert 1 < len(few) < 12
    assert few[0] == DENSE[0]
    assert few[-1].index > len(DENSE) // 2
    assert len(spread_evenly(DENSE, 1)) == 1


def test_a_phase_that_loses_answers_is_undone(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """However near it came to the dense model's distribution; the report says why."""
    found = run(stage, model, Asked(tmp_path, [0.9, 0.5, 0.5, 0.5]))
    assert found.folder == model.folder
    assert found.before_recovery is None
    assert "recovery, full was undone: 50.0% of the calibration prompts right, 90.0% before" in (
        found.notes
    )
    assert found.notes[-1].startswith("recovery found no better state")
    assert not any(row.kept for row in found.recovery if row.phase == "full")


def test_a_phase_that_thinks_longer_is_undone(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """More right answers do not make up for it."""
    found = run(stage, model, Asked(tmp_path, [0.5, 0.9, 0.9, 0.9], longer=1.5))
    assert found.folder == model.folder
    assert any("times as long as dense" in note for note in found.notes)


def test_a_start_that_cannot_be_bettered_is_returned(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """With a rate that only harms; no model but the start is ever asked."""
    harmful = stage.settings.model_copy(update={"learning_rate": 3.0, "on_policy": 0.0})
    asked = Asked(tmp_path, [0.9])
    found = run(replace(stage, settings=harmful), model, asked)
    assert found.folder == model.folder
    assert asked.models == [model.folder]
    assert found.notes[-1].startswith("recovery found no better state")


def test_answers_that_are_nowhere_near_teach_nothing(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """Random text is off every path: the rounds are over at once, and a note says so."""
    own = stage.settings.model_copy(update={"on_policy": 1.0, "rounds": 1})
    found = run(replace(stage, settings=own), model, Asked(tmp_path, [0.9]))
    assert found.folder == model.folder
    assert "recovery, own answers 1: no own answer stays near the dense model's" in found.notes


def test_it_is_found_done(stage: RecoverStage, model: PrunedModel, tmp_path: Path) -> None:
    """The second run learns nothing and returns the same; another seed is another phase."""
    shares = [0.5, 0.9, 0.9, 0.9]
    first = run(stage, model, Asked(tmp_path, shares))
    folders = sorted((tmp_path / "work").iterdir())
    assert run(stage, model, Asked(tmp_path, shares)) == first
    assert sorted((tmp_path / "work").iterdir()) == folders

    other = stage.settings.model_copy(update={"seed": 1})
    assert run(replace(stage, settings=other), model, Asked(tmp_path, shares)) != first


@pytest.mark.parametrize("percent", some([0, 30, 60, 90], kept=[30, 60]))
def test_a_kill_in_any_phase_leaves_the_same_bytes(tmp_path: Path, percent: int) -> None:
    """Killed after so much of a method, the next run ends with the bytes of an undisturbed one."""
    contents = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        training_run = make_training_run(folder)
        model = PrunedModel(training_run.sparse.folder, 0.5, (), (), {})
        stage = make_stage(Workspace(folder / "work", 1), training_run.dense, IN_PHASES)

        if name == "killed":
            victim = fork_context().Process(target=_recover_and_die, args=(folder, percent))
            victim.start()
            victim.join(300)
            assert victim.exitcode == -signal.SIGKILL

        found = run(stage, model, Asked(folder, [0.5, 0.9, 0.9, 0.9, 0.9]))
        contents.append(file_sha256(found.folder / "model.safetensors"))
        assert found.folder != model.folder

    assert contents[0] == contents[1]


def _recover_and_die(folder: Path, percent: int) -> None:
    def die(label: str, done: int, total: int, tokens: int = 0) -> None:
        if label == "recover" and done >= percent / 100 * total:
            os.kill(os.getpid(), signal.SIGKILL)

    model = PrunedModel(folder / "sparse", 0.5, (), (), {})
    place = Workspace(folder / "work", 1, die)
    dense = Checkpoint(folder / "dense")
    stage = make_stage(place, dense, IN_PHASES)
    run(stage, model, Asked(folder, [0.5, 0.9, 0.9, 0.9, 0.9]))


def test_without_held_out_traces_nothing_can_be_chosen(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """An error before any work, which says what to raise."""
    none = replace(stage, calibration=Calibration(held_out_share=0.0))
    with raises("no-held-out-traces", "held_out_share"):
        run(none, model, Asked(tmp_path, [0.5]))
    assert not (tmp_path / "work").exists()


def test_own_text_is_learned_and_measured(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """Every look has the divergence on parts of it that were held out."""
    file = tmp_path / "notes.txt"
    file.write_text("How many apples does she have? " * 400)

    for method in ("full", "blockwise"):
        changed = {"extra_text": str(file), "methods": (method,), "on_policy": 0.0}
        settings = stage.settings.model_copy(update=changed)
        found = run(replace(stage, settings=settings), model, Asked(tmp_path, [0.5, 0.9]))

        on_text = [row.text_kl_nats for row in found.recovery]
        assert all(kl is not None and kl > 0 for kl in on_text)
        assert on_text[0] != on_text[-1]


def test_a_text_that_is_too_short_is_refused(
    stage: RecoverStage, model: PrunedModel, tmp_path: Path
) -> None:
    """Before anything is learned, with how much is needed; and so is one that is no text."""
    file = tmp_path / "notes.txt"
    file.write_text("short")
    settings = stage.settings.model_copy(update={"extra_text": str(file)})
    with raises("text-too-short", "512"):
        run(replace(stage, settings=settings), model, Asked(tmp_path, [0.5]))

    file.write_bytes(b"\xff\xfe\x00")
    with raises("text-not-utf8", str(file)):
        run(replace(stage, settings=settings), model, Asked(tmp_path, [0.5]))
