"""The recover stage: a pruned model learns from the dense one, phase after phase.

Phases: distillation on the dense model's traces, one phase for each method; then on-policy, on its
own answers, with the dense model's probability of each token; scales last, once codes are chosen.
After each phase the model answers the calibration prompts; a phase that made it worse is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.phase_training import PhaseTrainer, TrainingRequest
from racdeploy.pipeline.recovery_phases import Phase, list_phases
from racdeploy.pipeline.recovery_state import State, mark
from racdeploy.pipeline.workspace import Workspace
from racdeploy.pruning import PrunedModel
from racdeploy.recipe import Calibration, Recovery
from racdeploy.results.plan import RecoveryPlan
from racdeploy.results.pruning import list_phase_ends
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.probe import ProbeResult
from racdeploy.traces.select import TraceSelection, select_traces
from racdeploy.traces.trace import Trace, count_tokens

PROBE_PROMPTS = 512
"""Maximum number of calibration prompts that judge a phase: always the first ones."""
MIN_EVAL_TOKENS, MAX_EVAL_TOKENS = 2_048, 16_384
"""Minimum and maximum tokens of held-out traces in each evaluation, in float32."""
_MAX_LENGTH_RATIO = 1.05
"""Factor by which a phase may lengthen the thinking; a phase above it is undone."""

CollectTraces = Callable[[Path | None, int], tuple[Path, list[Trace]]]
"""Collects a model's traces. It takes the model's folder, None for the dense one, and the number of
prompts, 0 for all; it returns the traces' folder and the traces."""
ChooseCodes = Callable[[Path, Sequence[Trace], str], Path]
"""Chooses a sparse model's codes. It takes the model's folder, the dense traces and a name; it
returns the new folder."""


@dataclass(frozen=True)
class _RecoveryContext:
    """Models, traces and settings that the phases of one recovery share.

    Args:
        name: name of the recovered model's folder.
        start: folder of the pruned model.
        dense: traces of the dense model.
        unseen: indices of the prompts that nothing is learned from.
        request: with the dense model's traces to learn from.
    """

    name: str
    start: Path
    dense: Sequence[Trace]
    unseen: frozenset[int]
    request: TrainingRequest
    collect: CollectTraces
    choose_codes: ChooseCodes | None

    def probe(self, folder: Path, phase: Phase | None) -> State:
        """Let a model answer the prompts that judge it and those that the next phase trains on."""
        needed = PROBE_PROMPTS
        if phase and phase.is_on_policy:
            tokens = phase.tokens * len(self.dense) / count_tokens(self.dense)
            needed = max(needed, math.ceil(tokens))

        first = needed if needed < len(self.dense) else 0
        _, answers = self.collect(folder, first)
        probe = ProbeResult.measure(answers[:PROBE_PROMPTS], self.dense[:PROBE_PROMPTS])
        return State(folder, probe, answers)

    def with_codes(self, state: State) -> State:
        """Return a model with the codes of its number format, unless it has or needs none."""
        # A model without a gain gets no codes here: pruning chooses better ones.
        if self.choose_codes is None or state.folder == self.start or state.is_coded:
            return state
        folder = self.choose_codes(state.folder, self.dense, self.name)
        note = "the codes of the number format were chosen after recovery"
        return replace(state, folder=folder, is_coded=True, notes=(*state.notes, note))


@dataclass(frozen=True)
class RecoverStage:
    """The stage that recovers a pruned model."""

    workspace: Workspace
    dense: Checkpoint
    encoder: PromptEncoder
    settings: Recovery
    calibration: Calibration

    @property
    def trainer(self) -> PhaseTrainer:
        """The training of a phase."""
        return PhaseTrainer(self.workspace, self.dense, self.encoder, self.settings)

    def run(
        self,
        model: PrunedModel,
        name: str,
        collect: CollectTraces,
        choose_codes: ChooseCodes | None = None,
    ) -> PrunedModel:
        """Recover the pruned model, or return it recovered earlier; without a gain, as it was.

        Args:
            name: name of the recovered model's folder.
            collect: lets a model answer the calibration prompts.
            choose_codes: chooses the codes of a recovered model; None chooses none.
        """
        from racdeploy.recovery.cost import choose_methods

        _, dense = collect(None, 0)
        # All traces, beyond the token budget of pruning: more training data does no harm.
        chosen = select_traces(dense, self.calibration.model_copy(update={"max_tokens": 0}))
        request = self._prepare(model, chosen)
        methods = choose_methods(self.trainer.training_run(Path(), name, request))
        phases = list_phases(self.settings, methods)

        context = _RecoveryContext(
            name=name,
            start=model.folder,
            dense=dense,
            unseen=frozenset(trace.index for trace in chosen.held_out),
            request=request,
            collect=collect,
            choose_codes=choose_codes,
        )
        upcoming = [*phases, None]
        start = state = context.probe(model.folder, upcoming[0])
        for phase, following in zip(phases, upcoming[1:], strict=True):
            state = self._run_phase(context, phase, following, state)
        return self._conclude(model, start.probe, context.with_codes(state))

    def plan(self, max_trace_tokens: int) -> RecoveryPlan:
        """Return tokens, phases and memory of recovery, for traces up to a length.

        Raises:
            EnvironmentFailure: there is too little memory.
            UsageError: the user's own text cannot be read, or is too short.
        """
        from racdeploy import recovery
        from racdeploy.recovery.cost import choose_methods

        trace = Trace(0, "", "", "", prompt_ids=(0,) * max_trace_tokens)
        request = self.trainer.prepare(self.dense.folder, [trace], [])
        training_run = self.trainer.training_run(Path(), "", request)

        methods = choose_methods(training_run)
        phases = list_phases(self.settings, methods)
        memory = max(recovery.load(method).peak_bytes(training_run) for method in methods)

        return RecoveryPlan(
            recover_tokens=sum(phase.tokens for phase in phases),
            recover_phases=", ".join(f"{phase.name} {phase.tokens:,}" for phase in phases),
            recover_memory_bytes_at_most=memory,
        )

    def _prepare(self, model: PrunedModel, chosen: TraceSelection) -> TrainingRequest:
        """Return what all phases learn from.

        Raises:
            UsageError: no trace is held out.
        """
        eval_tokens = min(MAX_EVAL_TOKENS, max(MIN_EVAL_TOKENS, self.settings.tokens // 25))
        held_out = spread_evenly(chosen.held_out, eval_tokens)
        if not held_out:
            raise UsageError(
                "no-held-out-traces",
                "recovery needs held-out traces to choose the best state",
                remedy="raise traces.count or calibration.held_out_share",
            )

        # A model that lost blocks learns each block from the dense block that it was.
        sources = model.source_blocks or [row.source_block for row in model.structure]
        return self.trainer.prepare(model.folder, chosen.calibration, held_out, sources)

    def _run_phase(
        self, context: _RecoveryContext, phase: Phase, following: Phase | None, state: State
    ) -> State:
        """Return the state after a phase, or the one before if it made the model no better."""
        if phase.trains_scales:
            state = context.with_codes(state)

        request = context.request
        if phase.is_on_policy:
            if state.is_exhausted:
                return state  # the same round would run again
            # Held-out prompts stay out of the training, in the model's own answers too.
            own = [trace for trace in state.answers if trace.index not in context.unseen]
            request = replace(request, train_traces=own)

        before = state
        state = self.trainer.teach(phase, before, context.name, request)
        if state.folder != before.folder:  # otherwise no state was better than the start
            probed = context.probe(state.folder, following)
            state = self._judge(phase, before, state, probed)

        is_exhausted = phase.is_on_policy and state.folder == before.folder
        return replace(state, is_exhausted=is_exhausted)

    def _judge(self, phase: Phase, before: State, after: State, probed: State) -> State:
        """Return the state after a phase, or the one before if the phase made the model worse."""
        reason = self._find_loss(probed.probe, before.probe)
        rows = mark(after.rows, phase.name, probed.probe, kept=not reason)

        if not reason:
            return replace(after, probe=probed.probe, answers=probed.answers, rows=rows)

        note = f"recovery, {phase.name} was undone: {reason}"
        return replace(before, tokens=after.tokens, rows=rows, notes=(*after.notes, note))

    def _conclude(self, model: PrunedModel, start: ProbeResult, state: State) -> PrunedModel:
        """Return the recovered model with the rows and notes of its recovery."""
        # The start is a row of the curve too: what the phases gained is read off against it.
        rows = mark(state.rows, "start", start, kept=True)
        gained = state.folder != model.folder

        outcome = "recovery found no better state than the pruned model, which is unchanged"
        if gained:
            outcome = (
                f"recovery: {start.accuracy:.1%} → {state.probe.accuracy:.1%} of the calibration "
                f"prompts right, thinking {start.length_ratio:.3f} → "
                f"{state.probe.length_ratio:.3f} times as long as dense, on {state.tokens:,} tokens"
            )
        notes = [*model.notes, *state.notes, outcome]

        if self.settings.extra_text:
            kept = [row.text_kl_nats for row in list_phase_ends(rows) if row.kept]
            name = Path(self.settings.extra_text).name
            notes.append(
                f"recovery: KL on held-out parts of {name} {kept[0]:.3g} → {kept[-1]:.3g} nats"
            )

        return replace(
            model,
            folder=state.folder,
            before_recovery=model.folder if gained else None,
            recovery=(*model.recovery, *rows),
            notes=tuple(notes),
        )

    def _find_loss(self, probe: ProbeResult, before: ProbeResult) -> str:
        """Return a clause on how a phase made the model worse, or an empty string."""
        if before.accuracy - probe.accuracy > self.settings.max_accuracy_drop:
            return (
                f"{probe.accuracy:.1%} of the calibration prompts right, "
                f"{before.accuracy:.1%} before"
            )
        if probe.length_ratio > _MAX_LENGTH_RATIO * max(before.length_ratio, 1.0):
            return (
                f"thinking {probe.length_ratio:.2f} times as long as dense, "
                f"{before.length_ratio:.2f} before"
            )
        return ""


def spread_evenly(traces: Sequence[Trace], tokens: int) -> list[Trace]:
    """Return traces spread over all, with at most about ``tokens`` tokens, and at least one."""
    count = min(len(traces), max(1, len(traces) * tokens // max(1, count_tokens(traces))))
    return [traces[part * len(traces) // count] for part in range(count)]
