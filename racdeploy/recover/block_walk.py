"""One block at a time learns to leave the states that the dense model's block leaves.

What enters a block comes from the recovered blocks before it; what it should leave comes from the
dense model. One block is in memory, as in pruning, so a small machine recovers a large model. A
finished block is a file, and an interrupted walk resumes at the first that is missing.

Errors are relative, token by token: some tokens' states are a thousand times as large as others',
and each later norm divides by that.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.processes.heap import keep_heap
from racdeploy.prune.walk.batches import Batch, make_batches
from racdeploy.prune.walk.blocks import Blocks
from racdeploy.prune.walk.flow import Flow
from racdeploy.prune.walk.statistics import PAD
from racdeploy.recover.course import Course, Lesson
from racdeploy.recover.divergence import Head, measure_kl
from racdeploy.recover.lessons import plan_steps
from racdeploy.recover.optimizer import MaskedAdam, gradient_norm, rate_at
from racdeploy.recover.state import fill_tensors
from racdeploy.recover.watch import Watch
from racdeploy.traces.trace import STREAMS

BATCH_TOKENS = 1024
"""Most tokens that go through a block together; a longer trace is alone."""
LOOKS = 4


class BlockWalk:
    """The dense and the sparse model, side by side, on their way through the blocks."""

    def __init__(self, course: Course) -> None:
        self.course = course
        settings, processes = course.settings, course.processes

        traces = (*course.taught, *course.held_out, *course.text)
        tasks = sorted({trace.task for trace in traces})
        tokens = min(BATCH_TOKENS, settings.step_tokens)

        taught = make_batches(course.taught, tasks, held_out=False, tokens=tokens)
        held_out = make_batches(course.held_out, tasks, held_out=True, tokens=tokens)
        text = make_batches(course.text, tasks, held_out=True, tokens=tokens)
        lengths = [int(_real(batch).sum()) for batch in taught]
        generator = random.Random(settings.seed)

        def draw() -> list[int]:
            order = list(range(len(taught)))
            generator.shuffle(order)
            return order

        length = lengths.__getitem__
        self.steps = plan_steps(draw, length, course.tokens, settings.step_tokens)
        self.watch = Watch(course.tokens, 0, course.notify)

        # Batches keep their numbers in every process; each has the states of its own.
        self.batches = [*taught, *held_out, *text]
        self.text = range(len(taught) + len(held_out), len(self.batches))
        sizes = [batch.ids_BT.numel() for batch in self.batches]
        self.mine = processes.mine(sizes)

        self.dense = Blocks(course.dense, course.compute, course.device)
        self.sparse = Blocks(course.sparse, course.compute, course.device)

        # "start" is the model as it was, which is only measured.
        models = {"dense": self.dense, "sparse": self.sparse, "start": self.sparse}
        self.flows = {}
        for name, blocks in models.items():
            self.flows[name] = Flow(blocks, self.batches, course.folder, name)
            self.flows[name].enter(self._list_batches(name))

    def close(self) -> None:
        """Remove the hidden states."""
        for flow in self.flows.values():
            flow.close()

    def run(self) -> list[Lesson]:
        """Let block after block learn; return what that changed at the model's end."""
        keep_heap()
        losses = []
        passed = 0

        for place, source in enumerate(self.course.sources):
            self._pass_dense(passed, source + 1)
            passed = source + 1
            losses.append(self._pass_block(place))
            self.sparse.empty(place).to("meta")

        self._pass_dense(passed, self.course.dense.shape.block_count)
        return self._conclude(sum(losses) / len(losses))

    def _pass_dense(self, start: int, stop: int) -> None:
        """Let the dense model's states pass some of its blocks."""
        for index in range(start, stop):
            self._pass("dense", self.dense.load(index))
            self.dense.empty(index).to("meta")

    @torch.no_grad()
    def _pass(self, name: str, block: nn.Module) -> None:
        """Let the batches before a block pass it."""
        for index in self._list_batches(name):
            self.flows[name].leave(block, index)

    def _conclude(self, loss: float) -> list[Lesson]:
        """Compare both ends with the dense model's; keep nothing that is no better."""
        before, after = (self._measure(name) for name in ("start", "sparse"))
        text: list[float | None] = [None, None]
        if self.course.text:
            text = [self._measure(name, text=True) for name in ("start", "sparse")]

        note = ""
        if not after < before:
            note = f"held-out KL would have been {after:.3g} nats, from {before:.3g}"
            shutil.rmtree(self.course.best_folder, ignore_errors=True)

        tokens = self.course.tokens
        return [
            Lesson(0, None, before, text[0]),
            Lesson(tokens, loss, after, text[1], note),
        ]

    def _pass_block(self, place: int) -> float:
        """Let a block learn, or read what it learned; then let the states pass it."""
        processes = self.course.processes
        file = self.course.folder / f"block-{place:05d}.json"

        block = self.sparse.load(place)
        self._pass("start", block)

        if not processes.ask_first(file.is_file):
            errors = self._teach(place, block)
            if processes.first:
                write_atomic(file, json.dumps({"errors": errors}))

        self._restore(place, block)
        self._pass("sparse", block)

        before, after = map(float, processes.ask_first(lambda: read_json(file)["errors"]))
        change = f"error of its output {before:.3g} → {after:.3g}"
        done = self._report(place + 1)

        count = len(self.course.sources)
        self.watch.show(done, f"block {place + 1} of {count}: {change}")
        return after

    def _teach(self, place: int, block: nn.Module) -> tuple[float, float]:
        """Train a block and keep its best state on disk; return errors at the start and then."""
        prefix = self.sparse.prefix(place)
        weights = {f"{prefix}.{name}": value for name, value in block.named_parameters()}
        for weight in weights.values():
            weight.requires_grad_(True)

        optimizer = MaskedAdam(weights, self.course.masked)
        every = max(1, len(self.steps) // LOOKS)
        before = best = self._error(block)

        for number, step in enumerate(self.steps):
            if not self._learn(block, step, weights):
                break

            norm = gradient_norm(weights)
            rate = rate_at(self.course.rate(depth=1), (number + 0.5) / len(self.steps))
            optimizer.step(rate, norm)

            done = number + 1
            self._report(place + done / len(self.steps))
            if done % every == 0 or done == len(self.steps):
                error = self._error(block)
                if error < best:
                    best = error
                    self.course.keep(weights, whole=True)

        for weight in weights.values():
            weight.requires_grad_(False)
        return before, best

    def _learn(self, block: nn.Module, step: Sequence[int], weights: Mapping[str, Tensor]) -> bool:
        """Add up the gradients of a step; return whether they are numbers."""
        counts = [float(_real(self.batches[index]).sum()) for index in step]
        total = 0.0

        for index in step:
            if index not in self.mine:
                continue

            error_BT = self._errors(block, index)
            real_BT = self.sparse.place(_real(self.batches[index]))
            loss = (error_BT * real_BT).sum() / sum(counts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())

        self._add_up(weights)
        return all(map(math.isfinite, self.course.processes.all(total)))

    def _add_up(self, weights: Mapping[str, Tensor]) -> None:
        """Sum each gradient that any process has; an expert that no token chose has none."""
        processes = self.course.processes
        if processes.count == 1:
            return

        own = [name for name, weight in weights.items() if weight.grad is not None]
        reached = set[str]().union(*processes.all(own))
        for name, value in weights.items():
            if name not in reached:
                continue
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            processes.total(value.grad)

    def _errors(self, block: nn.Module, index: int) -> Tensor:
        """Return each token's squared error, relative to the dense state."""
        sparse = self.flows["sparse"]
        left_BTD = self.sparse.place(self.flows["dense"].hidden[index])
        beside = sparse.besides[index].apart()
        found_BTD = self.sparse.forward(block, sparse.hidden[index], beside=beside).float()

        missed_BT = (found_BTD - left_BTD).square().sum(2)
        return missed_BT / left_BTD.square().sum(2).clamp_min(1e-12)

    @torch.no_grad()
    def _error(self, block: nn.Module) -> float:
        """Return the mean error on held-out traces."""
        sums = torch.zeros(2, dtype=torch.float64)

        for index in self._list_batches("start"):
            if index in self.text:
                continue

            real_BT = self.sparse.place(_real(self.batches[index]))
            error_BT = self._errors(block, index) * real_BT

            sums[0] += float(error_BT.double().sum())
            sums[1] += float(real_BT.sum())

        self.course.processes.total(sums)
        return float(sums[0] / sums[1])

    @torch.no_grad()
    def _measure(self, name: str, *, text: bool = False) -> float:
        """Return KL(dense ‖ a stream) at the end, over held-out traces or text."""
        course = self.course
        head = Head.of(course.dense, course.device)
        norms = {"dense": self.dense.last_norm(), name: self.sparse.last_norm()}
        weights = course.settings.weights
        counted = [getattr(weights, stream) for stream in STREAMS]
        weight_R = torch.tensor([*counted, 0.0])  # the last one is that of ``PAD``

        sums = torch.zeros(2, dtype=torch.float64)

        for index in self._list_batches("start"):
            if (index in self.text) != text:
                continue

            # A state says the next token; nothing follows the last.
            stream_BT = self.batches[index].stream_BT[:, 1:]
            weight_BT = weight_R[stream_BT]
            counts_BT = weight_BT > 0
            weight_N = weight_BT[counts_BT].double()

            hidden = []
            for flow, norm in norms.items():
                states_BTD = self.sparse.place(self.flows[flow].hidden[index])
                said_BTD = norm(states_BTD)[:, :-1]
                hidden.append(said_BTD[self.sparse.place(counts_BT)])

            dense_ND, own_ND = hidden
            found_N = measure_kl(head, own_ND, dense_ND).double().cpu()
            sums[0] += found_N @ weight_N
            sums[1] += weight_N.sum()

        course.processes.total(sums)
        return float(sums[0] / sums[1])

    def _restore(self, place: int, block: nn.Module) -> None:
        """Give a block the best state that it had; without one it is read again as it was."""
        prefix, processes = self.sparse.prefix(place), self.course.processes
        file = self.course.best_folder / f"block-{place:05d}.safetensors"

        if not processes.ask_first(file.is_file):
            self.sparse.load(place)
            return

        named = {f"{prefix}.{name}": value for name, value in block.named_parameters()}
        if processes.first:
            fill_tensors(file, named)
        for value in named.values():
            value.data = processes.spread(value.data)

    def _list_batches(self, flow: str) -> list[int]:
        """Return the numbers of this process's batches in a flow."""
        held_out = flow == "start"
        return [index for index in self.mine if self.batches[index].held_out or not held_out]

    def _report(self, blocks: float) -> int:
        """Report the blocks that learned as tokens, and return those."""
        tokens = round(blocks / len(self.course.sources) * self.course.tokens)
        self.course.report(tokens)
        return tokens


def _real(batch: Batch) -> Tensor:
    """Return 1 for tokens and 0 for padding, real_BT."""
    return (batch.stream_BT != PAD).float()
