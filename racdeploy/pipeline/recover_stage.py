"""The recover stage: a pruned model learns from the dense one; torch is imported when needed.

First on the dense model's traces, way after way; then on its own answers, which the dense model
grades token by token. After each phase the model answers the calibration prompts, and what made it
worse is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workplace import COMPUTING, Workplace, address, print_notice
from racdeploy.prune import PrunedModel
from racdeploy.recipe import Calibration, Recovery
from racdeploy.report.model import RecoveryRow
from racdeploy.storage.files import canonical_hash
from racdeploy.storage.stages import Stage
from racdeploy.traces.mix import Probe
from racdeploy.traces.select import select
from racdeploy.traces.trace import Trace

if TYPE_CHECKING:
    from racdeploy.recover.course import Course, Lesson

CollectTraces = Callable[[Path | None], tuple[Path, list[Trace]]]
"""Returns the folder and the traces of a model's folder; None is the dense model."""
_LONGER = 1.05
"""Thinking that a phase may lengthen so many times before it is undone."""


@dataclass(frozen=True)
class Phase:
    """A part of the recovery: which way, on whose answers, and how many tokens."""

    name: str
    way: str
    own: bool
    tokens: int


@dataclass(frozen=True)
class _State:
    """A model on its way, how it answers, and what was seen so far."""

    folder: Path
    probe: Probe
    tokens: int = 0  # learned since the start, undone or not
    rows: tuple[RecoveryRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecoverStage:
    """A pruned model on its way back to its answers, in codes of ``quant`` where joint."""

    place: Workplace
    dense: Checkpoint
    settings: Recovery
    calibration: Calibration
    quant: str

    def run(
        self,
        model: PrunedModel,
        name: str,
        collect: CollectTraces,
    ) -> PrunedModel:
        """Teach the pruned model, or find it taught; without a gain it is returned as it was.

        Args:
            name: of the recovered model's folder.
            collect: lets a model answer the calibration prompts.
        """
        _, dense = collect(None)
        chosen = select(dense, self.calibration)  # whole traces, whatever the pruning saw
        taught, held_out = chosen.calibration, chosen.held_out
        if not held_out:
            raise UsageError(
                "recovery needs traces that are held out, to see which state is the best",
                remedy="raise traces.count or calibration.held_out_share",
            )

        learns = _Teaching(self, model, name, taught, held_out)

        _, own = collect(model.folder)
        state = _State(model.folder, Probe.of(own, dense))

        for phase in list_phases(self.settings, learns.ways):
            traces = own if phase.own else taught
            found = learns.teach(phase, state, traces)
            if found.folder == state.folder:  # nothing was better than the start
                state = found
                continue

            _, answers = collect(found.folder)
            probe = Probe.of(answers, dense)

            if reason := self._worse(probe, state.probe):
                note = f"recovery, {phase.name} was undone: {reason}"
                state = replace(
                    state,
                    tokens=found.tokens,
                    rows=_mark(found.rows, phase.name, probe, kept=False),
                    notes=(*found.notes, note),
                )
                continue

            rows = _mark(found.rows, phase.name, probe, kept=True)
            state = replace(found, probe=probe, rows=rows)
            own = answers

        start = Probe.of(collect(model.folder)[1], dense)
        rows = _mark(state.rows, "start", start, kept=True)
        gained = state.folder != model.folder
        note = _summarize(start, state) if gained else _NO_GAIN

        return replace(
            model,
            folder=state.folder,
            before_recovery=model.folder if gained else None,
            recovery=rows,
            notes=(*model.notes, *state.notes, note),
        )

    def describe_code(self) -> dict[str, str]:
        """Return what all processes that teach together must have in common."""
        return address(__name__, COMPUTING) | {"model": self.dense.sha256}

    def _worse(self, probe: Probe, before: Probe) -> str:
        """Return why a phase made the model worse, or an empty string."""
        if before.accuracy - probe.accuracy > self.settings.probe_drop:
            return (
                f"{probe.accuracy:.1%} of the calibration prompts right, "
                f"{before.accuracy:.1%} before"
            )
        if probe.length_ratio > _LONGER * max(before.length_ratio, 1.0):
            return (
                f"thinking {probe.length_ratio:.2f} times as long as dense, "
                f"{before.length_ratio:.2f} before"
            )
        return ""


_NO_GAIN = "recovery found nothing better than the pruned model, which is left as it was"


@dataclass(frozen=True)
class _Teaching:
    """What all phases of one model share."""

    stage: RecoverStage
    model: PrunedModel
    name: str
    taught: Sequence[Trace]
    held_out: Sequence[Trace]

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways of the dense phase: as asked, or the best that fits into memory."""
        from racdeploy.recover.cost import choose_ways

        course = self._course(self.model.folder, Phase("", "", False, 0), self.taught, Path())
        return choose_ways(course)

    def teach(self, phase: Phase, state: _State, traces: Sequence[Trace]) -> _State:
        """Do one phase, or find it done."""
        settings = self.stage.settings
        sparse = Checkpoint(state.folder)

        inputs = address(__name__, COMPUTING) | {
            "model": sparse.sha256,
            "dense": self.stage.dense.sha256,
            "phase": asdict(phase),
            "traces": [trace.ids for trace in traces],
            "held_out": [trace.ids for trace in self.held_out],
            "recover": settings.model_dump(exclude={"tokens", "ways", "rounds", "probe_drop"}),
            "quant": self.stage.quant,
        }

        stage = self.stage.place.open("recover", _shorten(inputs))
        if not stage.finished:
            stage.finish(self._learn(phase, sparse, traces, stage))

        return _after(phase, state, stage, self.name)

    def _learn(
        self, phase: Phase, sparse: Checkpoint, traces: Sequence[Trace], stage: Stage
    ) -> dict[str, Any]:
        from racdeploy import recover
        from racdeploy.recover.answers import cut_own
        from racdeploy.recover.course import Lesson

        course = self._course(sparse.folder, phase, traces, stage.folder)
        if phase.own:
            course = cut_own(course)

        if course.taught:
            lessons = recover.load(phase.way).recover(course)
        else:
            lessons = [Lesson(0, note="no own answer stays near the dense model's")]

        better = _is_better(lessons)
        if better:
            course.write()
        course.clean()

        return {"lessons": [asdict(lesson) for lesson in lessons], "better": better}

    def _course(self, sparse: Path, phase: Phase, traces: Sequence[Trace], folder: Path) -> Course:
        from racdeploy.prune.device import choose_device
        from racdeploy.recover.course import Course

        stage, rows = self.stage, self.model.structure
        sources = [row.source_block for row in rows] or range(stage.dense.block_count)

        return Course(
            sparse=Checkpoint(sparse),
            dense=stage.dense,
            sources=tuple(sources),
            taught=traces,
            held_out=self.held_out,
            settings=stage.settings,
            tokens=phase.tokens,
            direction="reverse" if phase.own else "forward",
            quant=stage.quant,
            folder=folder,
            out=folder / self.name,
            device=choose_device(stage.settings.device),
            threads=stage.place.threads,
            progress=stage.place.progress,
            notify=print_notice,
        )


def list_phases(settings: Recovery, ways: Sequence[str]) -> list[Phase]:
    """Return the phases in order, with the tokens of each; those with none are left out.

    The dense model's traces come first: without them the model's own answers are too far off to be
    graded.
    """
    own_tokens = round(settings.on_policy * settings.tokens)
    dense_tokens = settings.tokens - own_tokens

    # Scales are few numbers: a tenth is enough for them, where anything else learns too.
    shares = {way: 1.0 if way != "scales" or len(ways) == 1 else 0.1 for way in ways}
    phases = []

    for way in ways:
        tokens = round(dense_tokens * shares[way] / sum(shares.values()))
        phases.append(Phase(way, way, False, tokens))

    teacher = next((way for way in ways if way != "scales"), ways[0])
    for number in range(settings.rounds):
        name = f"own answers {number + 1}"
        phases.append(Phase(name, teacher, True, own_tokens // settings.rounds))

    return [phase for phase in phases if phase.tokens]


def _after(phase: Phase, state: _State, stage: Stage, name: str) -> _State:
    """Return the state after a phase that ended."""
    summary = stage.summary
    rows = []

    for lesson in summary["lessons"]:
        if lesson["tokens"] or not state.rows:
            rows.append(
                RecoveryRow(
                    phase=phase.name if lesson["tokens"] else "start",
                    tokens=state.tokens + lesson["tokens"],
                    loss=lesson["loss"],
                    kl_nats=lesson["kl_nats"],
                    kept=summary["better"] or not lesson["tokens"],
                )
            )

    ended = summary["lessons"][-1]["note"]
    notes = (f"recovery, {phase.name}: {ended}",) if ended else ()

    return replace(
        state,
        folder=stage.folder / name if summary["better"] else state.folder,
        tokens=state.tokens + phase.tokens,
        rows=(*state.rows, *rows),
        notes=(*state.notes, *notes),
    )


def _is_better(lessons: Sequence[Lesson]) -> bool:
    """Return whether any state after the start is nearer to the dense model."""
    first, *later = (lesson.kl_nats for lesson in lessons)
    return first is not None and any(value is not None and value < first for value in later)


def _mark(
    rows: Sequence[RecoveryRow], phase: str, probe: Probe, *, kept: bool
) -> tuple[RecoveryRow, ...]:
    """Return the rows with what became of a phase; how the model answers is on its last row."""
    places = [place for place, row in enumerate(rows) if row.phase == phase]
    marked = list(rows)

    for place in places:
        marked[place] = rows[place].model_copy(update={"kept": kept})
    if places:
        last = places[-1]
        marked[last] = marked[last].model_copy(update={"accuracy": probe.accuracy})

    return tuple(marked)


def _summarize(start: Probe, state: _State) -> str:
    return (
        f"recovery: {start.accuracy:.1%} → {state.probe.accuracy:.1%} of the calibration prompts "
        f"right, thinking {start.length_ratio:.3f} → {state.probe.length_ratio:.3f} times as long "
        f"as dense, on {state.tokens:,} tokens"
    )


def _shorten(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with hashes in place of long lists."""
    short = dict(inputs)
    for key in ("traces", "held_out"):
        short[key] = canonical_hash(short[key])
    return short
