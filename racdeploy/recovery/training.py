"""Distillation of the dense model into the whole sparse model, keeping the best state.

Evaluations on held-out traces decide which state is kept. After one that is far worse than the
best, or several that are no better, training returns to the best state at half the learning rate.
The training state is saved at every evaluation; an interrupted training resumes there and ends with
the same bytes. A state no better than the start is not kept, nor one after a loss that is not
finite.

Several processes share the batches of a step, and the model. They sum in another order, so their
number shows in the last digits; a saved state can be resumed by any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from racdeploy.files.reading import Json
from racdeploy.processes.heap import keep_heap
from racdeploy.recovery import load_objective
from racdeploy.recovery.divergence import LMHead, kl_and_gradient, measure_kl
from racdeploy.recovery.examples import group_answers
from racdeploy.recovery.likelihood import likelihood_and_gradient, measure_likelihood
from racdeploy.recovery.optimizer import MaskedAdam, gradient_norm, learning_rate_at
from racdeploy.recovery.parameters import WeightParameters
from racdeploy.recovery.progress_line import ProgressLine
from racdeploy.recovery.state import fill_tensors, read_values, write_tensors
from racdeploy.recovery.student import Student
from racdeploy.recovery.training_batches import (
    MAX_STORED_BYTES,
    TrainingBatch,
    TrainingBatches,
    dense_states,
    limit_to_disk,
)
from racdeploy.recovery.training_log import LogRow
from racdeploy.recovery.training_run import BEST_FILE, STATE_FILE, TrainingRun

EVALUATIONS = 20
_MAX_KL_RATIO = 1.2  # to the best KL: steps of this size do not return from beyond
_HALVING_PATIENCE = 3  # evaluations without a better state until the rate is halved
_PATIENCE = 10  # evaluations without a better state; a falling rate needs time to help


def distill(
    run: TrainingRun,
    trained: Sequence[str],
    arrange: Callable[[Mapping[str, Tensor]], WeightParameters] = WeightParameters,
) -> list[LogRow]:
    """Train some weights of the whole model, keep the best state, and return the training log.

    Args:
        trained: names of the weights that get gradients.
        arrange: returns the parameters that the optimizer updates, given those weights by name.

    Source: Adam without weight decay, linear warm-up and decay, gradient clipping.
    """
    keep_heap()

    with ExitStack() as stack:
        width = run.dense.shape.hidden_size
        stored = limit_to_disk(run.train_traces, width, MAX_STORED_BYTES)
        objective = load_objective(run.objective)
        sets = {"train": stored, "held-out": run.held_out, "text": run.text}

        batches = {}
        for name, traces in sets.items():
            answers = group_answers(traces, run.brief_prompts)
            examples = objective.choose_examples(answers)
            seen = [trace for example in examples for trace in example.teacher_traces]
            states = stack.enter_context(
                dense_states(run.dense, seen, run.folder, name, device=run.device, share=run.share)
            )
            batches[name] = TrainingBatches(examples, states)

        student = Student(run, trained)
        return _Training(run, student, arrange(student.weights), batches).run()


@dataclass(frozen=True)
class _Targets:
    """Targets of the tokens of a batch; see :class:`TrainingBatch`."""

    dense_ND: Tensor
    weight_N: Tensor
    token_N: Tensor
    pair_N: Tensor


@dataclass
class _Progress:
    """Progress of a training: the values that its file holds beside the tensors."""

    step: int = 0
    tokens: int = 0
    rate_factor: float = 1.0  # of the learning rate, halved after setbacks
    best_kl: float = math.inf
    since_best: int = 0  # evaluations
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    log: list[LogRow] = field(default_factory=list)
    ended: str = ""  # reason of an early end

    @classmethod
    def read(cls, values: Json) -> _Progress:
        log = [LogRow(**row) for row in values.pop("log")]
        return cls(**values, log=log)


class _Training:
    """The training loop of a student."""

    def __init__(
        self,
        run: TrainingRun,
        student: Student,
        variables: WeightParameters,
        batches: Mapping[str, TrainingBatches],
    ) -> None:
        settings = run.settings
        self.training_run, self.student, self.variables = run, student, variables
        self.batches = batches

        short = run.compute == "bfloat16"
        self.head = LMHead.from_checkpoint(run.dense, run.device, bfloat16=short)
        self.optimizer = MaskedAdam(variables.parameters, run.masked_weights)

        self.steps = batches["train"].draw_steps(run.tokens, settings.batch_tokens, settings.seed)
        self.file = run.folder / STATE_FILE
        self.best_file = run.folder / BEST_FILE
        self.done = _Progress()

    def run(self) -> list[LogRow]:
        """Train to the end; return the log, rows before an interruption included."""
        resumes = self.training_run.share.run_once(self.file.is_file)
        if resumes:
            self._resume()
        self.watch = ProgressLine(
            self.training_run.tokens, self.done.tokens, self.training_run.notify
        )
        if not resumes:
            self._evaluate()

        # An evaluation takes a forward pass of all held-out traces; a step is about four times that
        # per token. So evaluations take at most about a quarter of the training time.
        read = self.batches["held-out"].tokens / self.training_run.settings.batch_tokens
        every = max(1, len(self.steps) // EVALUATIONS, math.ceil(read))

        for step in range(self.done.step, len(self.steps)):
            if self.done.ended:
                break

            self._learn(self.steps[step])
            self.done.step = step + 1
            self.training_run.report_progress(self.done.tokens)

            if self.done.step % every == 0 or self.done.step == len(self.steps):
                self._evaluate()

        self.training_run.report_progress(self.training_run.tokens)
        self.done.log[-1] = replace(self.done.log[-1], note=self.done.ended)
        return self.done.log

    def _learn(self, batches: Sequence[Sequence[int]]) -> None:
        """Do one optimizer step: gradients of all its batches, then one update."""
        share = self.training_run.share
        examples = list(self.batches["train"].shard(batches, share))
        # The loss is a mean over all token weights of the step, in all processes.
        own_weight = sum(float(example.weight_BT.sum()) for example in examples)
        weight = max(share.total(own_weight), 1e-9)

        loss = 0.0
        tokens = 0

        for example in examples:
            hidden_ND, targets = self._select(example, training=True)
            with torch.no_grad():
                part, gradient_ND = self._compute_gradient(hidden_ND, targets, weight)

            self.student.backward(hidden_ND, gradient_ND)
            loss += float(part)
            tokens += example.tokens

        total = share.total(loss)
        self.done.tokens += share.total(tokens)

        self.student.collect_gradients()
        self.variables.propagate_gradients()
        norm = math.hypot(*share.list_all(gradient_norm(self.variables.parameters)))
        if not math.isfinite(total) or not math.isfinite(norm):
            self.done.ended = f"the loss was {total:g} after {self.done.tokens} tokens"
            return

        self.done.losses.append(total)
        peak = self.done.rate_factor * self.training_run.learning_rate(
            depth=self.training_run.sparse.shape.block_count
        )
        rate = learning_rate_at(peak, (self.done.step + 0.5) / len(self.steps))

        self.optimizer.step(rate, norm)
        self.variables.update_weights()

    def _select(self, example: TrainingBatch, *, training: bool) -> tuple[Tensor, _Targets]:
        """Return hidden_ND and the targets of the tokens with a weight."""
        hidden_BTD = self.student.hidden_states(example.ids_BT, training=training)
        device = hidden_BTD.device

        counts_BT = example.weight_BT > 0
        targets = _Targets(
            example.dense_BTD[counts_BT].to(device),
            example.weight_BT[counts_BT],
            example.token_BT[counts_BT].to(device),
            example.pair_BT[counts_BT].to(device),
        )
        return hidden_BTD[counts_BT.to(device)], targets

    def _compute_gradient(
        self, hidden_ND: Tensor, targets: _Targets, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Return Σ loss / weight over tokens, and its gradient, gradient_ND."""
        weight_N = (targets.weight_N / weight).to(hidden_ND.device)
        learned = targets.token_N >= 0
        distilled = ~learned

        total, gradient_ND = torch.zeros(()), torch.empty_like(hidden_ND, dtype=torch.float32)
        if distilled.any():
            total, gradient_ND[distilled] = kl_and_gradient(
                self.head,
                hidden_ND[distilled],
                targets.dense_ND[distilled],
                weight_N[distilled],
                direction=self.training_run.direction,
            )
        if learned.any():
            loss, gradient_ND[learned] = likelihood_and_gradient(
                self.head,
                hidden_ND[learned],
                targets.token_N[learned],
                targets.pair_N[learned],
                weight_N=weight_N[learned],
            )
            total = total + loss
        return total, gradient_ND

    def _evaluate(self) -> None:
        """Evaluate, save the state, and return to the best one after a setback."""
        done = self.done
        divergence = self._judge()
        if done.ended:
            return

        if divergence == done.best_kl:
            write_tensors(self.best_file, self._state(), share=self.training_run.share)
        elif divergence > _MAX_KL_RATIO * done.best_kl or done.since_best % _HALVING_PATIENCE == 0:
            # No learning rate suits every model, so a setback halves it and training continues from
            # the best state. The moments stay: the steps that went too far made the second moment
            # large, which makes the next steps small.
            done.rate_factor /= 2
            fill_tensors(self.best_file, self._state(), self.training_run.share)
            self.variables.update_weights()

        if done.step:
            values = asdict(done) | {"optimizer_steps": self.optimizer.steps}
            write_tensors(self.file, self._tensors(), values, self.training_run.share)

    def _judge(self) -> float:
        """Log an evaluation, and keep the weights if they are the best; return the held-out KL."""
        done = self.done
        divergence = self.measure("held-out")
        text_kl = self.measure("text") if self.training_run.text else None

        loss = sum(done.losses) / len(done.losses) if done.losses else None
        done.log.append(LogRow(done.tokens, loss, divergence, text_kl))
        done.losses = []

        learned = f"loss {loss:.3g}, " if loss is not None else ""
        on_text = f", on your text {text_kl:.3g}" if text_kl is not None else ""
        objective = load_objective(self.training_run.objective)
        held_out = f"{objective.held_out_figure} {divergence:.3g} nats"
        self.watch.show(done.tokens, f"{learned}{held_out}{on_text}")

        if not math.isfinite(divergence):
            done.ended = f"held-out KL was {divergence:g} after {done.tokens} tokens"
            return divergence

        if divergence < done.best_kl:
            if done.step:  # the start is a model on disk already
                self.training_run.save_best(self.variables.weights)
            done.best_kl, done.since_best = divergence, 0
        else:
            done.since_best += 1
            if done.since_best >= _PATIENCE:
                done.ended = f"no better state in {_PATIENCE} evaluations"

        return divergence

    @torch.no_grad()
    def measure(self, name: str) -> float:
        """Return the mean KL(dense ‖ sparse) in nats over ``held-out`` traces or ``text``."""
        batches, share = self.batches[name], self.training_run.share
        total = weight = 0.0

        for example in batches.shard(batches.batches_by_length(), share):
            hidden_ND, targets = self._select(example, training=False)
            learned = targets.token_N >= 0
            loss_N = hidden_ND.new_empty(len(hidden_ND))
            loss_N[~learned] = measure_kl(
                self.head, hidden_ND[~learned], targets.dense_ND[~learned]
            )
            loss_N[learned] = measure_likelihood(
                self.head, hidden_ND[learned], targets.token_N[learned], targets.pair_N[learned]
            )
            weight_N = targets.weight_N.double()
            total += float(loss_N.double().cpu() @ weight_N)
            weight += float(weight_N.sum())

        return share.total(total) / share.total(weight)

    def _state(self) -> dict[str, Tensor]:
        """Return the trainable parameters, which determine the weights."""
        return {f"weight.{name}": moved for name, moved in self.variables.parameters.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the training state: parameters and moments."""
        tensors = self._state()
        for name, (first, second) in self.optimizer.moments.items():
            tensors |= {f"first.{name}": first, f"second.{name}": second}
        return tensors

    def _resume(self) -> None:
        share = self.training_run.share
        values = share.run_once(lambda: read_values(self.file))
        self.optimizer.steps = values.pop("optimizer_steps")
        self.done = _Progress.read(values)

        fill_tensors(self.file, self._tensors(), share)
        self.variables.update_weights()
