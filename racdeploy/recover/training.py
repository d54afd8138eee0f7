"""Training of a whole model: it learns to say what the dense model says, and keeps its best state.

Looks at held-out traces decide which state is kept. After one that is far worse than the best, or a
few that are no better, it goes back to that and learns at half the pace. A state is saved at every
look; an interrupted training resumes there and ends with the same bytes. Nothing that is no better
than the start is kept, and neither is anything after a loss that is no number.

Several processes share the batches of a step, and the model. Sums over them are in another order,
so their number shows in the last digits; what one saved, any number resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from racdeploy.processes.heap import keep_heap
from racdeploy.recover.average import Average
from racdeploy.recover.course import BEST_FILE, STATE_FILE, Course, Lesson
from racdeploy.recover.divergence import Head, kl_and_slope, measure_kl
from racdeploy.recover.lessons import STORED_BYTES, Example, Lessons, choose_taught, dense_states
from racdeploy.recover.optimizer import MaskedAdam, gradient_norm, rate_at
from racdeploy.recover.state import fill_tensors, read_values, write_tensors
from racdeploy.recover.student import Student
from racdeploy.recover.variables import Weights
from racdeploy.recover.watch import Watch

LOOKS = 20
_FAR = 1.2  # times the best divergence: from further off, steps that long do not come back
_LINGER = 3  # looks without a better state after which shorter steps are tried
_PATIENCE = 10  # looks without a better state; fewer would stop what comes down with the rate


def distil(
    course: Course,
    trained: Sequence[str],
    arrange: Callable[[Mapping[str, Tensor]], Weights] = Weights,
) -> list[Lesson]:
    """Train some weights of the whole model, and keep the best state; return every look.

    Args:
        trained: names of the weights that get gradients.
        arrange: says what the optimizer moves, given those weights by name.

    Source: AdamW's moments without decay, linear warm-up and decay, gradients of a bounded length.
    """
    keep_heap()

    with ExitStack() as stack:
        width = course.dense.shape.hidden_size
        taught = choose_taught(course.taught, width, STORED_BYTES)
        sets = {"taught": taught, "held-out": course.held_out, "text": course.text}

        lessons = {}
        for name, traces in sets.items():
            where = (course.folder, name, course.device, course.processes)
            states = stack.enter_context(dense_states(course.dense, traces, *where))
            lessons[name] = Lessons(traces, states, course.settings.weights)

        student = Student(course, trained)
        return _Training(course, student, arrange(student.weights), lessons).run()


@dataclass
class _Progress:
    """How far a training has come; what its file holds beside tensors."""

    step: int = 0
    tokens: int = 0
    pace: float = 1.0  # times the learning rate
    best: float = math.inf  # divergence of the best look
    since_best: int = 0
    losses: list[float] = field(default_factory=list)  # since the last look
    looks: list[Lesson] = field(default_factory=list)
    ended: str = ""  # why it ended early

    @classmethod
    def read(cls, values: dict[str, Any]) -> _Progress:
        looks = [Lesson(**look) for look in values.pop("looks")]
        return cls(**values, looks=looks)


class _Training:
    """A student on its way through the steps."""

    def __init__(
        self,
        course: Course,
        student: Student,
        variables: Weights,
        lessons: Mapping[str, Lessons],
    ) -> None:
        settings = course.settings
        self.course, self.student, self.variables = course, student, variables
        self.lessons = lessons

        short = course.compute == "bfloat16"
        self.head = Head.of(course.dense, course.device, short=short)
        self.optimizer = MaskedAdam(variables.moved, course.masked)
        self.average = Average(variables, settings.average)

        self.steps = lessons["taught"].plan(course.tokens, settings.step_tokens, settings.seed)
        self.file = course.folder / STATE_FILE
        self.best_file = course.folder / BEST_FILE
        self.done = _Progress()

    def run(self) -> list[Lesson]:
        """Learn step by step; return every look, those of an interrupted run included."""
        resumes = self.course.processes.ask_first(self.file.is_file)
        if resumes:
            self._resume()
        self.watch = Watch(self.course.tokens, self.done.tokens, self.course.notify)
        if not resumes:
            self._look()

        # Not so often that looking takes longer than a quarter of the learning.
        read = self.lessons["held-out"].tokens / self.course.settings.step_tokens
        every = max(1, len(self.steps) // LOOKS, math.ceil(read))

        for step in range(self.done.step, len(self.steps)):
            if self.done.ended:
                break

            self._learn(self.steps[step])
            self.done.step = step + 1
            self.course.report(self.done.tokens)

            if self.done.step % every == 0 or self.done.step == len(self.steps):
                self._look()

        self.course.report(self.course.tokens)
        self.done.looks[-1] = replace(self.done.looks[-1], note=self.done.ended)
        return self.done.looks

    def _learn(self, batches: Sequence[Sequence[int]]) -> None:
        """Do one step: gradients of all its batches, then one move."""
        processes = self.course.processes
        examples = list(self.lessons["taught"].share(batches, processes))
        own = sum(float(example.weight_BT.sum()) for example in examples)
        weight = max(sum(processes.all(own)), 1e-9)

        loss = 0.0
        tokens = 0

        for example in examples:
            hidden_ND, dense_ND, weight_N = self._select(example, learns=True)
            weight_N = (weight_N / weight).to(hidden_ND.device)
            with torch.no_grad():
                found, slope_ND = kl_and_slope(
                    self.head, hidden_ND, dense_ND, weight_N, self.course.direction
                )

            self.student.pull(hidden_ND, slope_ND)
            loss += float(found)
            tokens += example.tokens

        total = sum(processes.all(loss))
        self.done.tokens += sum(processes.all(tokens))

        self.student.collect()
        self.variables.gather()
        norm = math.hypot(*processes.all(gradient_norm(self.variables.moved)))
        if not math.isfinite(total) or not math.isfinite(norm):
            self.done.ended = f"the loss was {total:g} after {self.done.tokens} tokens"
            return

        self.done.losses.append(total)
        peak = self.done.pace * self.course.rate(depth=self.course.sparse.shape.block_count)
        rate = rate_at(peak, (self.done.step + 0.5) / len(self.steps))

        self.optimizer.step(rate, norm)
        self.variables.settle()
        self.average.follow(self.optimizer.steps)

    def _select(self, example: Example, *, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, the dense model's, and weights, of the tokens that count."""
        hidden_BTD = self.student.hidden(example.ids_BT, learns=learns)
        device = hidden_BTD.device

        counts_BT = example.weight_BT > 0
        dense_ND = example.dense_BTD[counts_BT].to(device)
        return hidden_BTD[counts_BT.to(device)], dense_ND, example.weight_BT[counts_BT]

    def _look(self) -> None:
        """Measure, keep the state if it is the best so far, and save."""
        with self.average.shown() as weights:
            divergence = self._judge(weights)

        done = self.done
        if done.ended:
            return

        if divergence == done.best:
            write_tensors(self.best_file, self._state(), processes=self.course.processes)
        elif divergence > _FAR * done.best or done.since_best % _LINGER == 0:
            # A rate is too high for one model and right for the next, so the best state learns on
            # at half the pace. Moments stay: they are long from the steps that went too far, which
            # makes the next ones short.
            done.pace /= 2
            fill_tensors(self.best_file, self._state(), self.course.processes)
            self.variables.settle()
            self.average.restart()

        if done.step:
            values = asdict(done) | {"optimizer_steps": self.optimizer.steps}
            write_tensors(self.file, self._tensors(), values, self.course.processes)

    def _judge(self, weights: Mapping[str, Tensor]) -> float:
        """Measure the weights, and keep them if they are the best; return the divergence."""
        done = self.done
        divergence = self.measure("held-out")
        of_text = self.measure("text") if self.course.text else None

        loss = sum(done.losses) / len(done.losses) if done.losses else None
        done.looks.append(Lesson(done.tokens, loss, divergence, of_text))
        done.losses = []

        learned = f"loss {loss:.3g}, " if loss is not None else ""
        beside = f", on your text {of_text:.3g}" if of_text is not None else ""
        found = f"KL on held-out traces {divergence:.3g} nats"
        self.watch.show(done.tokens, f"{learned}{found}{beside}")

        if not math.isfinite(divergence):
            done.ended = f"held-out KL was {divergence:g} after {done.tokens} tokens"
            return divergence

        if divergence < done.best:
            if done.step:  # the start is a model already
                self.course.keep(weights)
            done.best, done.since_best = divergence, 0
        else:
            done.since_best += 1
            if done.since_best >= _PATIENCE:
                done.ended = f"nothing better came in {_PATIENCE} looks"

        return divergence

    @torch.no_grad()
    def measure(self, name: str) -> float:
        """Return the mean KL(dense ‖ sparse) on some lessons, in nats."""
        lessons, processes = self.lessons[name], self.course.processes
        total = weight = 0.0

        for example in lessons.share(lessons.in_order(), processes):
            hidden_ND, dense_ND, weight_N = self._select(example, learns=False)
            weight_N = weight_N.double()
            found_N = measure_kl(self.head, hidden_ND, dense_ND).double().cpu()
            total += float(found_N @ weight_N)
            weight += float(weight_N.sum())

        return sum(processes.all(total)) / sum(processes.all(weight))

    def _state(self) -> dict[str, Tensor]:
        """Return what decides the weights."""
        return {f"weight.{name}": moved for name, moved in self.variables.moved.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Return what must be on disk to go on as if nothing had happened."""
        tensors = self._state()
        for name, (first, second) in self.optimizer.moments.items():
            tensors |= {f"first.{name}": first, f"second.{name}": second}
        for name, mean in self.average.values.items():
            tensors[f"average.{name}"] = mean
        return tensors

    def _resume(self) -> None:
        processes = self.course.processes
        values = processes.ask_first(lambda: read_values(self.file))
        self.optimizer.steps = values.pop("optimizer_steps")
        self.done = _Progress.read(values)

        fill_tensors(self.file, self._tensors(), processes)
        self.variables.settle()
