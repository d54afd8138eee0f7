"""The training of one phase, by all processes together, or the result of an earlier run.

A recovery has several phases, and so has shortening; torch is imported when needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.engines.engine import Ids
from racdeploy.errors import EnvironmentFailure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.recovery_phases import Phase
from racdeploy.pipeline.recovery_state import State
from racdeploy.pipeline.workspace import Workspace, describe_code, notify
from racdeploy.processes.cores import has_fast_bfloat16
from racdeploy.recipe import Recovery
from racdeploy.recovery.training_log import LogRow, PhaseResult
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.text import choose_text_traces, read_text_traces
from racdeploy.traces.trace import Trace, count_tokens, hash_ids

if TYPE_CHECKING:
    from racdeploy.recovery.training_run import TrainingRun

_PHASE_INDEPENDENT = {
    *("tokens", "methods", "on_policy", "rounds", "max_accuracy_drop", "extra_text"),
    *("shorten", "objective", "samples", "instruction"),
}
"""Settings that do not change a phase, beyond its own name, method and tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """Request to train one phase, as it is sent to the other processes of a job.

    Args:
        sparse: folder of the student.
        sparse_sha256: hash of its files, which every process must have.
        dense: folder of the teacher.
        sources: index of the dense block that each block of the student was.
        train_traces: answers to learn from.
        held_out: traces that judge the states of the student.
        train_text: parts of the user's own text to learn from, before they are cut to their share.
        held_out_text: parts of it that are measured.
        settings: of the recipe, with ``auto`` resolved for this machine.
        brief_prompts: prompt → the same prompt with an instruction to be brief.
        phase: None in a request that only serves to plan.
    """

    sparse: Path
    dense: Path
    sources: tuple[int, ...]
    train_traces: Sequence[Trace]
    held_out: Sequence[Trace]
    train_text: Sequence[Trace]
    held_out_text: Sequence[Trace]
    settings: Recovery
    brief_prompts: Mapping[Ids, Ids] = field(default_factory=dict)
    sparse_sha256: str = ""
    phase: Phase | None = None


@dataclass(frozen=True)
class PhaseTrainer:
    """The stage that trains a student in one phase; ``dense`` is the teacher."""

    workspace: Workspace
    dense: Checkpoint
    encoder: PromptEncoder
    settings: Recovery

    def prepare(
        self,
        sparse: Path,
        train_traces: Sequence[Trace],
        held_out: Sequence[Trace],
        sources: Sequence[int] = (),
    ) -> TrainingRequest:
        """Return a request with what all phases of a student share.

        Args:
            sources: dense blocks that the student's blocks were; empty for all in order.
        """
        text: list[Trace] = []
        held_out_text: list[Trace] = []
        if self.settings.extra_text:
            text, held_out_text = read_text_traces(self.settings.extra_text, self.encoder)

        return TrainingRequest(
            sparse=sparse,
            dense=self.dense.folder.resolve(),
            sources=tuple(sources or range(self.dense.shape.block_count)),
            train_traces=train_traces,
            held_out=held_out,
            train_text=text,
            held_out_text=held_out_text,
            settings=self._choose_settings(),
        )

    def teach(self, phase: Phase, state: State, name: str, shared: TrainingRequest) -> State:
        """Run one phase, or take the result of an earlier run.

        Args:
            name: name of the trained model's folder.
            shared: request with the data of this phase.
        """
        sparse = Checkpoint(state.folder)
        request = replace(
            shared, sparse=sparse.folder.resolve(), sparse_sha256=sparse.sha256, phase=phase
        )

        # The folder of a phase is decided by all that it learns from, and by nothing else.
        inputs = describe_code(self) | {
            "sparse": sparse.sha256,
            "dense": self.dense.sha256,
            "phase": asdict(phase),
            "traces": hash_ids(request.train_traces),
            "held_out": hash_ids(request.held_out),
            "text": hash_ids([*request.train_text, *request.held_out_text]),
            "recover": request.settings.model_dump(exclude=_PHASE_INDEPENDENT),
        }

        stage = self.workspace.open("recover", inputs)
        if not stage.is_finished:
            stage.finish(asdict(self._learn(stage.folder, name, request)))
        result = PhaseResult.from_summary(stage.summary)
        return state.after(phase, result, stage.folder / name)

    def _learn(self, folder: Path, name: str, request: TrainingRequest) -> PhaseResult:
        """Train together with the other processes."""
        with self.workspace.announce(request, self):
            training_run, log = self.train(folder, name, request)

        # Keep the phase only if some state after the start is nearer to the dense model.
        first, *later = (row.kl_nats for row in log)
        better = first is not None and any(kl is not None and kl < first for kl in later)
        if better:
            training_run.write()
        training_run.remove_states()

        return PhaseResult(tuple(log), better)

    def run_as_follower(self, request: TrainingRequest) -> None:
        """Do the share of a process other than the first one."""
        with self.workspace.scratch() as scratch:
            self.train(scratch, scratch.name, request)

    def train(
        self, folder: Path, name: str, request: TrainingRequest
    ) -> tuple[TrainingRun, list[LogRow]]:
        """Run one phase in all processes together; only the first one's folder is kept."""
        from racdeploy import recovery
        from racdeploy.recovery.on_policy import truncate_own_answers

        phase = request.phase
        assert phase, "a request to train has a phase"
        self._check_shared(request)

        training_run = self.training_run(folder, name, request)
        training_run.share.set_threads(self.workspace.threads)
        objective = recovery.load_objective(phase.objective)
        if phase.is_on_policy and objective.purpose == "recover":
            training_run = truncate_own_answers(training_run)

        if not training_run.train_traces:
            return training_run, [LogRow(0, note="no own answer stays near the dense model's")]

        training_run.report_progress(0)
        traces = [*training_run.train_traces, *self._choose_text(training_run, request.train_text)]
        training_run = replace(training_run, train_traces=traces)
        return training_run, recovery.load(phase.method).recover(training_run)

    def training_run(self, folder: Path, name: str, request: TrainingRequest) -> TrainingRun:
        """Return the training of a phase in this process; only the first one reports progress."""
        from racdeploy.pruning.device import choose_device
        from racdeploy.recovery.training_run import TrainingRun

        workspace, share = self.workspace, self.workspace.share
        phase = request.phase or Phase("plan", "", is_on_policy=False, tokens=0)

        return TrainingRun(
            sparse=Checkpoint(request.sparse),
            dense=Checkpoint(request.dense),
            sources=request.sources,
            train_traces=request.train_traces,
            held_out=request.held_out,
            text=request.held_out_text,
            settings=request.settings,
            tokens=phase.tokens,
            objective=phase.objective,
            brief_prompts=request.brief_prompts,
            direction="reverse" if phase.is_on_policy else "forward",
            folder=folder,
            out=folder / name,
            device=choose_device(request.settings.device),
            progress=workspace.progress if share.has_files else None,
            notify=notify if share.has_files else None,
            share=share,
        )

    def _check_shared(self, request: TrainingRequest) -> None:
        """Refuse to train where a process does not see the student."""
        share, sparse = self.workspace.share, request.sparse
        is_student = share.has_files  # the request was made of the student there
        if not is_student and (sparse / "config.json").is_file():
            is_student = Checkpoint(sparse).sha256 == request.sparse_sha256

        if lacking := share.list_lacking(is_student):
            raise EnvironmentFailure(
                "work-folder-not-shared",
                f"process {lacking[0]} does not have the pruned model in {sparse}",
                remedy="recovery on several machines needs a --work folder on a shared file "
                "system, under the same path on each",
            )

    def _choose_text(self, run: TrainingRun, text: Sequence[Trace]) -> Sequence[Trace]:
        """Return parts of the user's text, cut to their share of the training tokens."""
        if not text:
            return text
        tokens = count_tokens(run.train_traces)
        return choose_text_traces(text, tokens, run.settings.extra_text_share)

    def _choose_settings(self) -> Recovery:
        """Return the recipe's settings, with ``auto`` resolved on this machine."""
        from racdeploy.pruning.device import choose_device

        device = choose_device(self.settings.device).type
        compute = self.settings.compute
        if compute == "auto":
            is_fast = device != "cpu" or has_fast_bfloat16()
            compute = "bfloat16" if is_fast else "float32"

        return self.settings.model_copy(update={"device": device, "compute": compute})
