"""The shorten stage: the dense model learns to think less, before it is pruned.

In each round it answers the calibration prompts several times, and learns from its own answers by
the recipe's objective. Its fresh answers to held-out prompts judge the round: one that costs
accuracy, or hardly shortens, is undone and is the last. All later stages take the result for the
dense model; the verification compares with the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from racdeploy import recovery
from racdeploy.engines.engine import Ids
from racdeploy.errors import UsageError
from racdeploy.pipeline.phase_training import PhaseTrainer
from racdeploy.pipeline.recovery_phases import Phase
from racdeploy.pipeline.recovery_state import State, mark
from racdeploy.results.pruning import RecoveryRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.probe import ProbeResult
from racdeploy.traces.trace import Trace, count_tokens

HELD_OUT_SHARE = 0.25
"""Share of the prompts whose answers judge the rounds; nothing is learned from them."""
_EPOCHS = 2
_MIN_GAIN = 0.02
"""Share of the thinking that a round must save to be kept."""

_ALL_PROMPTS = 0

SampleAnswers = Callable[[Path | None, int], Sequence[Trace]]
"""Returns a model's answers to the first prompts, ``recover.samples`` to each. It takes the model's
folder, None for the dense one, and the number of prompts, 0 for all."""


@dataclass(frozen=True)
class ShortenedModel:
    """The model after the last round that was kept; ``folder`` is None if none was."""

    folder: Path | None
    rows: tuple[RecoveryRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ShortenStage:
    """The stage that shortens the thinking of a dense model; ``teacher`` trains it."""

    teacher: PhaseTrainer
    encoder: PromptEncoder
    prompts: int
    name: str

    def run(self, sample: SampleAnswers) -> ShortenedModel:
        """Train round after round, or return the model of an earlier run.

        Raises:
            UsageError: no answer of the dense model is right.
        """
        settings = self.teacher.settings
        dense = self.teacher.dense.folder
        held_prompts = max(1, round(HELD_OUT_SHARE * self.prompts))
        held = held_prompts * settings.samples

        answers = sample(None, _ALL_PROMPTS)
        if not any(answer.correct for answer in answers):
            raise UsageError(
                "nothing-right-to-shorten",
                f"none of {len(answers)} answers of the dense model is right",
                remedy="--tasks with one that it can do, or raise traces.max_new_tokens",
            )

        dense_answers = answers[:held]
        start = ProbeResult.measure(dense_answers, dense_answers)
        state = State(dense, start, answers)
        for number in range(1, settings.rounds + 1):
            taught = self._teach(number, state, held)
            if taught.folder == state.folder:
                return self._conclude(start, taught)

            # Nothing is learned after the last round: only the answers that judge are needed.
            is_last = number == settings.rounds
            answers = sample(taught.folder, held_prompts if is_last else _ALL_PROMPTS)
            probe = ProbeResult.measure(answers[:held], dense_answers)
            reason = self._find_loss(state.probe, probe)
            rows = mark(taught.rows, f"shorter {number}", probe, kept=not reason)
            if reason:
                note = f"shorten: round {number} was undone: {reason}"
                state = replace(state, rows=rows, notes=(*taught.notes, note))
                break
            state = replace(taught, probe=probe, answers=answers, rows=rows)
            if settings.shorten is not True and probe.length_ratio <= settings.shorten:
                break

        return self._conclude(start, state)

    def _teach(self, number: int, state: State, held: int) -> State:
        """Return the state after the training of a round; the same folder if nothing is learned."""
        from racdeploy.recovery.examples import group_answers

        settings = self.teacher.settings
        held_out, train = state.answers[:held], state.answers[held:]
        request = self.teacher.prepare(state.folder, train, held_out)
        objective = recovery.load_objective(settings.objective)
        if objective.needs_brief_prompts:
            request = replace(request, brief_prompts=self._write_brief_prompts(state.answers))

        answers = group_answers(train, request.brief_prompts)
        examples = objective.choose_examples(answers)
        if all(example.is_distilled for example in examples):
            note = f"shorten: round {number} found no prompt with a shorter right answer"
            return replace(state, notes=(*state.notes, note))

        tokens = _EPOCHS * sum(count_tokens(example.traces) for example in examples)
        phase = Phase(
            name=f"shorter {number}",
            method=settings.methods[0] if settings.methods else "full",
            is_on_policy=True,
            tokens=tokens,
            objective=settings.objective,
        )
        return self.teacher.teach(phase, state, self.name, request)

    def _write_brief_prompts(self, answers: Sequence[Trace]) -> dict[Ids, Ids]:
        """Return, for each prompt, its ids with the instruction as a system prompt."""
        system = {"role": "system", "content": self.teacher.settings.instruction}
        questions = {trace.prompt_ids: trace.question for trace in answers}
        return {
            prompt_ids: tuple(self.encoder.encode([system, {"role": "user", "content": question}]))
            for prompt_ids, question in questions.items()
        }

    def _find_loss(self, before: ProbeResult, after: ProbeResult) -> str:
        """Return a clause on why a round is undone, or an empty string."""
        if before.accuracy - after.accuracy > self.teacher.settings.max_accuracy_drop:
            return f"{after.accuracy:.1%} of held-out answers right, {before.accuracy:.1%} before"
        if after.length_ratio > (1 - _MIN_GAIN) * before.length_ratio:
            return (
                f"thinking {after.length_ratio:.3f} times as long as at first, "
                f"{before.length_ratio:.3f} before"
            )
        return ""

    def _conclude(self, start: ProbeResult, state: State) -> ShortenedModel:
        kept = state.folder != self.teacher.dense.folder
        note = "shorten: no round was kept, so the thinking is as long as it was"
        if kept:
            note = (
                f"shorten ({self.teacher.settings.objective}): thinking "
                f"{state.probe.length_ratio:.3f} times as long on held-out prompts, "
                f"{start.accuracy:.1%} → {state.probe.accuracy:.1%} right"
            )
        # What was measured is the objective's loss, no divergence.
        no_divergence = {"kl_nats": None, "text_kl_nats": None}
        rows = []
        for row in mark(state.rows, "start", start, kept=True):
            phase = "shorter 0" if row.phase == "start" else row.phase
            rows.append(row.model_copy(update={"phase": phase, **no_divergence}))

        folder = state.folder if kept else None
        return ShortenedModel(folder, tuple(rows), (*state.notes, note))
