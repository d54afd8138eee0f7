"""The recover stage: a pruned model learns from the dense one; torch is imported when needed.

Phases: distillation on the dense model's traces, one phase for each method; then on-policy, on its
own answers, with the dense model's probability of each token; scales last, once codes are chosen.
After each phase the model answers the calibration prompts; a phase that made it worse is undone.
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
from racdeploy.pipeline.workspace import Workspace, describe_code, notify
from racdeploy.processes.cores import has_fast_bfloat16
from racdeploy.pruning import PrunedModel
from racdeploy.recipe import Calibration, Recovery
from racdeploy.results.plan import RecoveryPlan
from racdeploy.results.pruning import RecoveryRow, list_phase_ends
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.probe import ProbeResult
from racdeploy.traces.select import select_traces
from racdeploy.traces.text import choose_text_traces, read_text_traces
from racdeploy.traces.trace import Trace, count_tokens, hash_ids

if TYPE_CHECKING:
    from racdeploy.recovery.training_run import LogRow, TrainingRun

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
class Phase:
    """A part of the recovery: method, dense or own answers, number of tokens, and objective."""

    name: str
    method: str
    is_on_policy: bool
    tokens: int
    objective: str = "distill"


@dataclass(frozen=True)
class State:
    """A model between phases, how it answers, and the record of the recovery so far."""

    folder: Path
    probe: ProbeResult
    answers: Sequence[Trace]
    tokens: int = 0  # trained on since the start, in undone phases too
    is_exhausted: bool = False  # a round of own answers brought no gain
    is_coded: bool = False
    rows: tuple[RecoveryRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecoverStage:
    """The stage that recovers a pruned model."""

    workspace: Workspace
    dense: Checkpoint
    encoder: PromptEncoder
    settings: Recovery
    calibration: Calibration

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

        eval_tokens = min(MAX_EVAL_TOKENS, max(MIN_EVAL_TOKENS, self.settings.tokens // 25))
        held_out = spread_evenly(chosen.held_out, eval_tokens)
        unseen = frozenset(trace.index for trace in chosen.held_out)
        if not held_out:
            raise UsageError(
                "no-held-out-traces",
                "recovery needs held-out traces to choose the best state",
                remedy="raise traces.count or calibration.held_out_share",
            )

        # A model that lost blocks learns each block from the dense block that it was.
        sources = model.source_blocks or [row.source_block for row in model.structure]
        shared = self.share_arguments(model.folder, chosen.calibration, held_out, sources)
        phases = list_phases(self.settings, choose_methods(self.training_run(Path(), name, shared)))
        following = [*phases, None]
        state = start = _ask(collect, dense, following.pop(0), model.folder)

        def settle(state: State) -> State:
            # A model without a gain gets no codes here: pruning chooses better ones.
            if choose_codes is None or state.folder == model.folder or state.is_coded:
                return state
            folder = choose_codes(state.folder, dense, name)
            note = "the codes of the number format were chosen after recovery"
            return replace(state, folder=folder, is_coded=True, notes=(*state.notes, note))

        for phase, after in zip(phases, following, strict=True):
            if phase.method == "scales":
                state = settle(state)
            train_traces = chosen.calibration
            if phase.is_on_policy:
                if state.is_exhausted:
                    continue  # the same round would run again
                # Held-out prompts stay out of the training, in the model's own answers too.
                train_traces = [trace for trace in state.answers if trace.index not in unseen]

            before = state
            state = self.teach(phase, before, name, shared, train_traces)
            if state.folder != before.folder:  # otherwise no state was better than the start
                probed = _ask(collect, dense, after, state.folder)
                state = self._judge(phase, before, state, probed)
            is_exhausted = phase.is_on_policy and state.folder == before.folder
            state = replace(state, is_exhausted=is_exhausted)

        return self._conclude(model, start.probe, settle(state))

    def plan(self, max_trace_tokens: int) -> RecoveryPlan:
        """Return tokens, phases and memory of recovery, for traces up to a length.

        Raises:
            EnvironmentFailure: there is too little memory.
            UsageError: the user's own text cannot be read, or is too short.
        """
        from racdeploy import recovery
        from racdeploy.recovery.cost import choose_methods

        trace = Trace(0, "", "", "", prompt_ids=(0,) * max_trace_tokens)
        shared = self.share_arguments(self.dense.folder, [trace], [])
        training_run = self.training_run(Path(), "", shared)

        methods = choose_methods(training_run)
        phases = list_phases(self.settings, methods)
        memory = max(recovery.load(method).peak_bytes(training_run) for method in methods)

        return RecoveryPlan(
            recover_tokens=sum(phase.tokens for phase in phases),
            recover_phases=", ".join(f"{phase.name} {phase.tokens:,}" for phase in phases),
            recover_memory_bytes_at_most=memory,
        )

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

    def share_arguments(
        self,
        sparse: Path,
        train_traces: Sequence[Trace],
        held_out: Sequence[Trace],
        sources: Sequence[int] = (),
    ) -> Json:
        """Return the arguments that all phases of a model share, as sent to other processes.

        ``sources`` are the dense blocks that its blocks were; empty for all in order.
        """
        text: list[Trace] = []
        text_held_out: list[Trace] = []
        if self.settings.extra_text:
            text, text_held_out = read_text_traces(self.settings.extra_text, self.encoder)

        return {
            "sparse": sparse,
            "dense": self.dense.folder.resolve(),
            "phase": Phase("", "", False, 0),
            "brief_prompts": {},
            "train_text": text,
            "training": {
                "sources": tuple(sources or range(self.dense.shape.block_count)),
                "train_traces": train_traces,
                "held_out": held_out,
                "text": text_held_out,
                "settings": self._choose_settings(),
            },
        }

    def _choose_settings(self) -> Recovery:
        """Return the recipe's settings, with ``auto`` resolved on this machine."""
        from racdeploy.pruning.device import choose_device

        device = choose_device(self.settings.device).type
        compute = self.settings.compute
        if compute == "auto":
            is_fast = device != "cpu" or has_fast_bfloat16()
            compute = "bfloat16" if is_fast else "float32"

        return self.settings.model_copy(update={"device": device, "compute": compute})

    def teach(
        self, phase: Phase, state: State, name: str, arguments: Json, train_traces: Sequence[Trace]
    ) -> State:
        """Run one phase, or take the result of an earlier run."""
        # The folder of a phase is decided by all that it learns from, and by nothing else.
        sparse = Checkpoint(state.folder)
        training = arguments["training"] | {"train_traces": train_traces}

        inputs = describe_code(self) | {
            "sparse": sparse.sha256,
            "dense": self.dense.sha256,
            "phase": asdict(phase),
            "traces": hash_ids(train_traces),
            "held_out": hash_ids(training["held_out"]),
            "text": hash_ids([*arguments["train_text"], *training["text"]]),
            "recover": training["settings"].model_dump(exclude=_PHASE_INDEPENDENT),
        }

        stage = self.workspace.open("recover", inputs)
        if not stage.is_finished:
            phase_arguments = {
                "sparse": sparse.folder.resolve(),
                "sha256": sparse.sha256,
                "phase": phase,
            }
            stage.finish(
                self._learn(stage, name, arguments | phase_arguments | {"training": training})
            )

        return _after(phase, state, stage, name)

    def _learn(self, stage: Stage, name: str, arguments: Json) -> Json:
        with self.workspace.processes.announce_job("recover", describe_code(self), arguments):
            training_run, log = self.train(stage.folder, name, arguments)

        # Keep the phase only if some state after the start is nearer to the dense model.
        first, *later = (row.kl_nats for row in log)
        better = first is not None and any(kl is not None and kl < first for kl in later)
        if better:
            training_run.write()
        training_run.remove_states()

        return {"log": [asdict(row) for row in log], "better": better}

    def run_as_follower(self, arguments: Mapping[str, Any]) -> None:
        """Do the share of a process other than the first one."""
        with scratch_folder(self.workspace.work, self.workspace.processes.rank) as scratch:
            self.train(scratch, scratch.name, arguments)

    def train(
        self, folder: Path, name: str, arguments: Mapping[str, Any]
    ) -> tuple[TrainingRun, list[LogRow]]:
        """Run one phase in all processes together; only the first one's folder is kept."""
        from racdeploy import recovery
        from racdeploy.recovery.on_policy import truncate_own_answers
        from racdeploy.recovery.training_run import LogRow

        sparse: Path = arguments["sparse"]
        processes = self.workspace.processes
        if processes.world_size > 1:
            is_file = (sparse / "config.json").is_file()
            is_present = is_file and Checkpoint(sparse).sha256 == arguments["sha256"]
            present = processes.all_gather(is_present)
            if not all(present):
                raise EnvironmentFailure(
                    "work-folder-not-shared",
                    f"process {present.index(False)} does not have the pruned model in {sparse}",
                    remedy="recovery on several machines needs a --work folder on a shared file "
                    "system, under the same path on each",
                )

        phase: Phase = arguments["phase"]
        training_run = self.training_run(folder, name, arguments)
        processes.set_threads(self.workspace.threads)
        objective = recovery.load_objective(phase.objective)
        if phase.is_on_policy and objective.purpose == "recover":
            training_run = truncate_own_answers(training_run)

        if not training_run.train_traces:
            return training_run, [LogRow(0, note="no own answer stays near the dense model's")]

        training_run.report_progress(0)
        text = arguments["train_text"]
        if text:  # cut to its share of the training tokens
            text = choose_text_traces(
                text,
                count_tokens(training_run.train_traces),
                training_run.settings.extra_text_share,
            )
        training_run = replace(training_run, train_traces=(*training_run.train_traces, *text))
        return training_run, recovery.load(phase.method).recover(training_run)

    def training_run(self, folder: Path, name: str, arguments: Mapping[str, Any]) -> TrainingRun:
        """Return the training of a phase in this process; only the first one reports progress."""
        from racdeploy.pruning.device import choose_device
        from racdeploy.recovery.training_run import TrainingRun

        workspace = self.workspace
        phase: Phase = arguments["phase"]
        first = workspace.processes.is_first

        return TrainingRun(
            sparse=Checkpoint(arguments["sparse"]),
            dense=Checkpoint(arguments["dense"]),
            tokens=phase.tokens,
            objective=phase.objective,
            brief_prompts=arguments["brief_prompts"],
            direction="reverse" if phase.is_on_policy else "forward",
            folder=folder,
            out=folder / name,
            device=choose_device(arguments["training"]["settings"].device),
            progress=workspace.progress if first else None,
            notify=notify if first else None,
            processes=workspace.processes,
            **arguments["training"],
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


_PHASE_INDEPENDENT = {
    *("tokens", "methods", "on_policy", "rounds", "max_accuracy_drop", "extra_text"),
    *("shorten", "objective", "samples", "instruction"),
}
"""Settings that do not change a phase, beyond its own name, method and tokens."""


def _ask(
    collect: CollectTraces, dense: Sequence[Trace], phase: Phase | None, folder: Path
) -> State:
    """Let a model answer the prompts that judge it and those that the next phase trains on."""
    needed = PROBE_PROMPTS
    if phase and phase.is_on_policy:
        needed = max(needed, math.ceil(phase.tokens * len(dense) / count_tokens(dense)))

    first = needed if needed < len(dense) else 0
    _, answers = collect(folder, first)
    return State(
        folder, ProbeResult.measure(answers[:PROBE_PROMPTS], dense[:PROBE_PROMPTS]), answers
    )


def spread_evenly(traces: Sequence[Trace], tokens: int) -> list[Trace]:
    """Return traces spread over all, with at most about ``tokens`` tokens, and at least one."""
    count = min(len(traces), max(1, len(traces) * tokens // max(1, count_tokens(traces))))
    return [traces[part * len(traces) // count] for part in range(count)]


def list_phases(settings: Recovery, methods: Sequence[str]) -> list[Phase]:
    """Return the phases in order, with the tokens of each; phases without tokens are left out.

    The dense model's traces come first: without them the model's own answers are too poor to learn
    from. Scales come last, when the weights are final.
    """
    own_tokens = round(settings.on_policy * settings.tokens)
    dense_tokens = settings.tokens - own_tokens

    # Scales are few parameters: a tenth of the tokens is enough, if weights learn too.
    shares = {name: 0.1 if name == "scales" and len(methods) > 1 else 1.0 for name in methods}
    phases = [
        Phase(method, method, False, round(dense_tokens * shares[method] / sum(shares.values())))
        for method in methods
    ]

    teacher = max(methods, key=shares.__getitem__)
    for number in range(settings.rounds):
        name = f"own answers {number + 1}"
        phases.append(Phase(name, teacher, True, own_tokens // settings.rounds))

    phases.sort(key=lambda phase: shares[phase.method], reverse=True)
    return [phase for phase in phases if phase.tokens]


def _after(phase: Phase, state: State, stage: Stage, name: str) -> State:
    """Return the state after a phase, with the rows of its curve."""
    # Every phase evaluates its start, but the curve needs only the first one's.
    summary = stage.summary
    rows = [
        RecoveryRow(
            phase=phase.name if row["tokens"] else "start",
            tokens=state.tokens + row["tokens"],
            loss=row["loss"],
            kl_nats=row["kl_nats"],
            text_kl_nats=row["text_kl_nats"],
            kept=summary["better"] or not row["tokens"],
        )
        for row in summary["log"]
        if row["tokens"] or not state.rows
    ]

    ended = summary["log"][-1]["note"]
    notes = (f"recovery, {phase.name}: {ended}",) if ended else ()

    return replace(
        state,
        folder=stage.folder / name if summary["better"] else state.folder,
        tokens=state.tokens + phase.tokens,
        rows=(*state.rows, *rows),
        notes=(*state.notes, *notes),
    )


def mark(
    rows: Sequence[RecoveryRow], phase: str, probe: ProbeResult, *, kept: bool
) -> tuple[RecoveryRow, ...]:
    """Return the rows with a phase marked as kept or undone, and its accuracy on the last row."""
    marked = []
    changes: Json = {"kept": kept, "accuracy": probe.accuracy}
    for row in reversed(rows):
        if row.phase == phase:
            row = row.model_copy(update=changes)
            changes.pop("accuracy", None)
        marked.append(row)

    return tuple(reversed(marked))
