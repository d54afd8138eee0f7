"""The recover stage: a pruned model learns from the dense one; torch is imported when needed.

First on the dense model's traces, way after way; then on its own answers, which the dense model
grades token by token; scales last, once codes are chosen. After each phase the model answers the
calibration prompts, and what made it worse is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.files.reading import Json
from racdeploy.files.stages import Stage, scratch_folder
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workplace import COMPUTING, Workplace, address, print_notice
from racdeploy.processes.cores import multiplies_bfloat16
from racdeploy.prune import PrunedModel
from racdeploy.prune.processes import Processes
from racdeploy.quant import Codes
from racdeploy.recipe import Calibration, Recovery
from racdeploy.results.pruning import RecoveryRow, end_phases
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.probe import Probe
from racdeploy.traces.select import select
from racdeploy.traces.text import choose_text, text_traces
from racdeploy.traces.trace import Trace, count_tokens, hash_ids

if TYPE_CHECKING:
    from racdeploy.recover.course import Course, Lesson

PROBED = 512
"""Most calibration prompts that decide whether a phase is undone: always the first ones."""
LOOKED_AT_TOKENS = (2_048, 16_384)
"""Fewest and most tokens of held-out traces that every look reads, in float32."""
_LONGER = 1.05
"""Thinking that a phase may lengthen so many times before it is undone."""


CollectTraces = Callable[[Path | None, int], tuple[Path, list[Trace]]]
"""Lets a model answer the first calibration prompts: its folder, None for the dense model, and how
many, 0 for all; returns folder and traces."""
ChooseCodes = Callable[[Path, Sequence[Trace], str], Path]
"""Puts a sparse model on the grid of a number format: its folder, the dense traces, a name."""


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
    answers: Sequence[Trace]
    tokens: int = 0  # learned since the start, undone or not
    is_exhausted: bool = False  # own answers taught it nothing
    is_coded: bool = False
    rows: tuple[RecoveryRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecoverStage:
    """A pruned model on its way back to its answers; ``quant``: whose codes it gets, or empty."""

    place: Workplace
    dense: Checkpoint
    encoder: PromptEncoder
    settings: Recovery
    calibration: Calibration
    quant: Codes

    def run(
        self,
        model: PrunedModel,
        name: str,
        collect: CollectTraces,
        choose_codes: ChooseCodes | None = None,
    ) -> PrunedModel:
        """Teach the pruned model, or find it taught; without a gain it is returned as it was.

        Args:
            name: of the recovered model's folder.
            collect: lets a model answer the calibration prompts.
            choose_codes: puts what was gained on the grid of ``quant``; None leaves it off any.
        """
        from racdeploy.recover.cost import choose_ways

        _, dense = collect(None, 0)
        # Whole traces and all of them, whatever the pruning saw: more to learn does no harm.
        chosen = select(dense, self.calibration.model_copy(update={"max_tokens": 0}))

        fewest, most = LOOKED_AT_TOKENS
        looked_at = min(most, max(fewest, self.settings.tokens // 25))
        held_out = spread_evenly(chosen.held_out, looked_at)
        unseen = frozenset(trace.index for trace in chosen.held_out)
        if not held_out:
            raise UsageError(
                "no-held-out-traces",
                "recovery needs traces that are held out, to see which state is the best",
                remedy="raise traces.count or calibration.held_out_share",
            )

        given = self._list_given(model, chosen.calibration, held_out)
        phases = list_phases(self.settings, choose_ways(self.course(Path(), name, given)))
        following = [*phases, None]
        state = start = _ask(collect, dense, following.pop(0), model.folder)

        def settle(state: _State) -> _State:
            # A model without a gain gets no codes here: pruning chooses better ones itself.
            if choose_codes is None or state.folder == model.folder or state.is_coded:
                return state
            names = [self.quant] if isinstance(self.quant, str) else sorted({*self.quant.values()})
            note = f"codes of {', '.join(names)} were chosen after recovery"
            folder = choose_codes(state.folder, dense, name)
            return replace(state, folder=folder, is_coded=True, notes=(*state.notes, note))

        for phase, after in zip(phases, following, strict=True):
            if phase.way == "scales":
                state = settle(state)
            taught = chosen.calibration
            if phase.own:
                if state.is_exhausted:
                    continue  # the last round would be done again
                # nothing is learned of a prompt whose dense trace is held out
                taught = [trace for trace in state.answers if trace.index not in unseen]

            before = state
            state = self._teach(phase, before, name, given, taught)
            if state.folder != before.folder:  # else nothing was better than the start
                asked = _ask(collect, dense, after, state.folder)
                state = self._judge(phase, before, state, asked)
            is_exhausted = phase.own and state.folder == before.folder
            state = replace(state, is_exhausted=is_exhausted)

        return self._conclude(model, start.probe, settle(state))

    def plan(self, longest: int) -> Json:
        """Return what recovery takes; ``longest`` is a bound of a trace's tokens.

        Raises:
            EnvironmentFailure: there is too little memory.
            UsageError: the user's own text cannot be read, or is too short.
        """
        from racdeploy import recover
        from racdeploy.recover.cost import choose_ways

        trace = Trace(0, "", "", "", prompt_ids=(0,) * longest)
        nothing = PrunedModel(self.dense.folder, 0.0, (), (), {})
        course = self.course(Path(), "", self._list_given(nothing, [trace], []))

        ways = choose_ways(course)
        phases = list_phases(self.settings, ways)
        memory = max(recover.load(way).peak_bytes(course) for way in ways)

        return {
            "recover_tokens": sum(phase.tokens for phase in phases),
            "recover_phases": ", ".join(f"{phase.name} {phase.tokens:,}" for phase in phases),
            "recover_memory_bytes_at_most": memory,
        }

    def _judge(self, phase: Phase, before: _State, taught: _State, asked: _State) -> _State:
        """Return the state that a phase led to, or the one before if it made the model worse."""
        reason = self._worse(asked.probe, before.probe)
        rows = _mark(taught.rows, phase.name, asked.probe, kept=not reason)

        if not reason:
            return replace(taught, probe=asked.probe, answers=asked.answers, rows=rows)

        note = f"recovery, {phase.name} was undone: {reason}"
        return replace(before, tokens=taught.tokens, rows=rows, notes=(*taught.notes, note))

    def _conclude(self, model: PrunedModel, start: Probe, state: _State) -> PrunedModel:
        """Return the model with all that is known of how it came about."""
        rows = _mark(state.rows, "start", start, kept=True)
        gained = state.folder != model.folder

        notes = [*model.notes, *state.notes]
        if gained:
            notes.append(
                f"recovery: {start.accuracy:.1%} → {state.probe.accuracy:.1%} of the calibration "
                f"prompts right, thinking {start.length_ratio:.3f} → "
                f"{state.probe.length_ratio:.3f} times as long as dense, on {state.tokens:,} tokens"
            )
        else:
            notes.append(
                "recovery found nothing better than the pruned model, which is left as it was"
            )

        if self.settings.mix:
            kept = [row.text_kl_nats for row in end_phases(rows) if row.kept]
            name = Path(self.settings.mix).name
            notes.append(
                f"recovery: KL on held-out parts of {name} {kept[0]:.3g} → {kept[-1]:.3g} nats"
            )

        return replace(
            model,
            folder=state.folder,
            before_recovery=model.folder if gained else None,
            recovery=rows,
            notes=tuple(notes),
        )

    def _list_given(
        self, model: PrunedModel, taught: Sequence[Trace], held_out: Sequence[Trace]
    ) -> Json:
        """Return what all phases of a model have in common, as other processes get it."""
        text: list[Trace] = []
        text_held_out: list[Trace] = []
        if self.settings.mix:
            text, text_held_out = text_traces(self.settings.mix, self.encoder)

        named = model.sources or [row.source_block for row in model.structure]
        return {
            "sparse": model.folder,
            "phase": Phase("", "", False, 0),
            "text_taught": text,
            "lesson": {
                "sources": tuple(named or range(self.dense.shape.block_count)),
                "taught": taught,
                "held_out": held_out,
                "text": text_held_out,
                "settings": self._choose_settings(),
                "quant": "",
            },
        }

    def _choose_settings(self) -> Recovery:
        """Return the recipe's settings, with what this machine has in place of ``auto``."""
        from racdeploy.prune.device import choose_device

        device = choose_device(self.settings.device).type
        compute = self.settings.compute
        if compute == "auto":
            short = device != "cpu" or multiplies_bfloat16()
            compute = "bfloat16" if short else "float32"

        return self.settings.model_copy(update={"device": device, "compute": compute})

    def _teach(
        self, phase: Phase, state: _State, name: str, given: Json, taught: Sequence[Trace]
    ) -> _State:
        """Do one phase, or find it done."""
        sparse = Checkpoint(state.folder)
        quant = self._quant_of(phase)
        lesson = given["lesson"] | {"taught": taught, "quant": quant}

        inputs = self.describe_code() | {
            "sparse": sparse.sha256,
            "phase": asdict(phase),
            "traces": hash_ids(taught),
            "held_out": hash_ids(lesson["held_out"]),
            "text": hash_ids([*given["text_taught"], *lesson["text"]]),
            "recover": lesson["settings"].model_dump(exclude=_SHARED_OUT),
            "quant": quant,
        }

        stage = self.place.open("recover", inputs)
        if not stage.finished:
            own = {"sparse": sparse.folder.resolve(), "sha256": sparse.sha256, "phase": phase}
            stage.finish(self._learn(stage, name, given | own | {"lesson": lesson}))

        return _after(phase, state, stage, name)

    def _learn(self, stage: Stage, name: str, given: Json) -> Json:
        with self.place.processes.job("recover", self.describe_code(), given):
            course, lessons = self.learn(stage.folder, name, given)

        # A state after the start is nearer to the dense model.
        first, *later = (lesson.kl_nats for lesson in lessons)
        better = first is not None and any(kl is not None and kl < first for kl in later)
        if better:
            course.write()
        course.clean()

        return {"lessons": [asdict(lesson) for lesson in lessons], "better": better}

    def _quant_of(self, phase: Phase) -> str:
        """Return the format that a phase must keep to: weights learn before codes are chosen."""
        if phase.way != "scales":
            return ""

        if not isinstance(self.quant, str):
            raise UsageError(
                "scales-need-one-quant",
                "scales that learn need one number format for all linears",
                remedy='recover.ways = ["all"], or a quant in place of a mix',
            )
        return self.quant

    def describe_code(self) -> dict[str, str]:
        """Return what all processes that teach together must have in common."""
        return address(__name__, COMPUTING) | {"model": self.dense.sha256}

    def share(self, given: Mapping[str, Any]) -> None:
        """Do the share of a process that follows the first one."""
        with scratch_folder(self.place.work, self.place.processes.rank) as scratch:
            self.learn(scratch, scratch.name, given)

    def learn(
        self, folder: Path, name: str, given: Mapping[str, Any]
    ) -> tuple[Course, list[Lesson]]:
        """Do one phase, all processes together; the first one's folder is to last."""
        from racdeploy import recover
        from racdeploy.recover.answers import cut_own
        from racdeploy.recover.course import Lesson

        _require_model(self.place.processes, given["sparse"], given["sha256"])

        phase: Phase = given["phase"]
        course = self.course(folder, name, given)
        course.settle_threads()
        if phase.own:
            course = cut_own(course)

        if not course.taught:
            return course, [Lesson(0, note="no own answer stays near the dense model's")]

        course.report(0)
        text = given["text_taught"]
        if text:  # as much of it as its share of what is learned
            text = choose_text(text, count_tokens(course.taught), course.settings.mix_share)
        course = replace(course, taught=(*course.taught, *text))
        return course, recover.load(phase.way).recover(course)

    def course(self, folder: Path, name: str, given: Mapping[str, Any]) -> Course:
        """Return what this process does of a phase; a line is printed by the first one alone."""
        from racdeploy.prune.device import choose_device
        from racdeploy.recover.course import Course

        place = self.place
        phase: Phase = given["phase"]
        first = place.processes.first

        return Course(
            sparse=Checkpoint(given["sparse"]),
            dense=self.dense,
            tokens=phase.tokens,
            direction="reverse" if phase.own else "forward",
            folder=folder,
            out=folder / name,
            device=choose_device(given["lesson"]["settings"].device),
            threads=place.threads,
            progress=place.progress if first else None,
            notify=print_notice if first else None,
            processes=place.processes,
            **given["lesson"],
        )

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


_SHARED_OUT = {"tokens", "ways", "on_policy", "rounds", "probe_drop", "mix"}
"""Settings that phases do not depend on, beyond what is said of each."""


def _ask(
    collect: CollectTraces, dense: Sequence[Trace], phase: Phase | None, folder: Path
) -> _State:
    """Let a model answer: as many prompts as judge it, and as teach the phase that follows."""
    needed = PROBED
    if phase and phase.own:
        needed = max(needed, math.ceil(phase.tokens * len(dense) / count_tokens(dense)))

    first = needed if needed < len(dense) else 0
    _, answers = collect(folder, first)
    return _State(folder, Probe.of(answers[:PROBED], dense[:PROBED]), answers)


def spread_evenly(traces: Sequence[Trace], tokens: int) -> list[Trace]:
    """Return traces spread over all, of at most so many tokens in all, and at least one."""
    total = count_tokens(traces)
    if total <= tokens:
        return list(traces)

    count = max(1, len(traces) * tokens // total)
    return [traces[part * len(traces) // count] for part in range(count)]


def list_phases(settings: Recovery, ways: Sequence[str]) -> list[Phase]:
    """Return the phases in order, with the tokens of each; those with none are left out.

    The dense model's traces come first: without them the model's own answers are too far off to be
    graded. Scales come last, when everything else has found its place.
    """
    own_tokens = round(settings.on_policy * settings.tokens)
    dense_tokens = settings.tokens - own_tokens

    # Scales are few numbers: a tenth is enough for them, where anything else learns too.
    shares = {way: 1.0 if way != "scales" or len(ways) == 1 else 0.1 for way in ways}
    dense: list[Phase] = []
    last: list[Phase] = []

    for way in ways:
        tokens = round(dense_tokens * shares[way] / sum(shares.values()))
        phases = last if way == "scales" and len(ways) > 1 else dense
        phases.append(Phase(way, way, False, tokens))

    own = []
    teacher = next((way for way in ways if way != "scales"), ways[0])
    for number in range(settings.rounds):
        name = f"own answers {number + 1}"
        own.append(Phase(name, teacher, True, own_tokens // settings.rounds))

    return [phase for phase in (*dense, *own, *last) if phase.tokens]


def _require_model(processes: Processes, folder: Path, sha256: str) -> None:
    """Stop all processes where any of them lacks the model that is to learn."""
    if processes.count == 1:
        return

    is_there = (folder / "config.json").is_file() and Checkpoint(folder).sha256 == sha256
    lacking = [str(rank) for rank, has in enumerate(processes.all(is_there)) if not has]

    if lacking:
        raise EnvironmentFailure(
            "work-folder-not-shared",
            f"process {', '.join(lacking)} does not have the pruned model in {folder}",
            remedy="recovery on several machines needs a --work folder on a shared file system, "
            "under the same path on each",
        )


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
                    text_kl_nats=lesson["text_kl_nats"],
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
