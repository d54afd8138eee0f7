"""Blockwise recovery: each block learns to reproduce the output of the dense model's block.

A block's inputs come from the recovered blocks before it, its targets from the dense model. One
block is in memory at a time, as in pruning, so a small machine recovers a large model. Each
finished block is a file; an interrupted training resumes at the first missing one.

The loss is the squared error relative to the target's norm, token by token: some tokens' states are
a thousand times as large as others', and each later norm layer divides by that.
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
from racdeploy.pruning.walk.batches import Batch, make_batches
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.statistics import PAD
from racdeploy.recovery.divergence import LMHead, measure_kl
from racdeploy.recovery.optimizer import MaskedAdam, gradient_norm, learning_rate_at
from racdeploy.recovery.progress_line import ProgressLine
from racdeploy.recovery.state import fill_tensors
from racdeploy.recovery.training_batches import plan_steps
from racdeploy.recovery.training_log import LogRow
from racdeploy.recovery.training_run import TrainingRun

MICRO_BATCH_TOKENS = 1024
"""Maximum tokens in a forward pass of a block; a longer trace is a batch of its own."""
EVALUATIONS = 4


class BlockwiseTraining:
    """Training of one block after the other, the dense and the sparse model side by side."""

    def __init__(self, run: TrainingRun) -> None:
        self.training_run = run
        traces = (*run.train_traces, *run.held_out, *run.text)
        tasks = sorted({trace.task for trace in traces})
        tokens = min(MICRO_BATCH_TOKENS, run.settings.batch_tokens)

        train_batches = make_batches(run.train_traces, tasks, held_out=False, max_tokens=tokens)
        held_out = make_batches(run.held_out, tasks, held_out=True, max_tokens=tokens)
        text = make_batches(run.text, tasks, held_out=True, max_tokens=tokens)
        self.steps = _plan_steps(run, train_batches)
        self.watch = ProgressLine(run.tokens, 0, run.notify)

        # Every process numbers all batches alike, but holds the hidden states of its own only.
        self.batches = [*train_batches, *held_out, *text]
        self.text = range(len(train_batches) + len(held_out), len(self.batches))
        sizes = [batch.ids_BT.numel() for batch in self.batches]
        self.own_indices = run.share.list_owned(run.share.assign_owners(sizes))

        self.dense = BlockwiseModel(run.dense, run.compute, run.device)
        self.sparse = BlockwiseModel(run.sparse, run.compute, run.device)

        # "start" is the pruned model before recovery: it is only evaluated.
        models = {"dense": self.dense, "sparse": self.sparse, "start": self.sparse}
        self.flows = {}
        for name, blocks in models.items():
            self.flows[name] = CalibrationPass(blocks, self.batches, run.folder, name)
            self.flows[name].embed(self._list_batches(name))

    def close(self) -> None:
        """Remove the hidden states from disk."""
        for flow in self.flows.values():
            flow.close()

    def run(self) -> list[LogRow]:
        """Train block after block; return the losses at the model's end, before and after."""
        keep_heap()
        losses = []
        passed = 0

        for index, source in enumerate(self.training_run.sources):
            # Dense blocks that pruning removed still advance the dense states, as targets.
            self._pass_dense(passed, source + 1)
            passed = source + 1
            losses.append(self._pass_block(index))
            self.sparse.meta_block(index).to("meta")

        self._pass_dense(passed, self.training_run.dense.shape.block_count)
        return self._conclude(sum(losses) / len(losses))

    def _pass_dense(self, start: int, stop: int) -> None:
        """Advance the dense model's hidden states through blocks ``start`` to ``stop - 1``."""
        for index in range(start, stop):
            self._pass("dense", self.dense.load_block(index))
            self.dense.meta_block(index).to("meta")

    @torch.no_grad()
    def _pass(self, name: str, block: nn.Module) -> None:
        """Advance the hidden states of this process's batches through a block."""
        for index in self._list_batches(name):
            self.flows[name].advance(block, index)

    def _conclude(self, loss: float) -> list[LogRow]:
        """Measure the KL before and after; discard the trained blocks unless it fell."""
        before = self._measure("start")
        after = self._measure("sparse")
        text_before: float | None = None
        text_after: float | None = None
        if self.training_run.text:
            text_before = self._measure("start", text=True)
            text_after = self._measure("sparse", text=True)

        note = ""
        if not after < before:
            note = f"held-out KL would have been {after:.3g} nats, from {before:.3g}"
            shutil.rmtree(self.training_run.best_folder, ignore_errors=True)

        tokens = self.training_run.tokens
        return [
            LogRow(0, kl_nats=before, text_kl_nats=text_before),
            LogRow(tokens, loss, kl_nats=after, text_kl_nats=text_after, note=note),
        ]

    def _pass_block(self, index: int) -> float:
        """Train a block, or load its saved result; advance the states; return its final error."""
        share = self.training_run.share
        file = self.training_run.folder / f"block-{index:05d}.json"

        block = self.sparse.load_block(index)
        self._pass("start", block)

        if not share.run_once(file.is_file):
            errors = self._teach(index, block)
            if share.has_files:
                write_atomic(file, json.dumps({"errors": errors}))

        # The last state need not be the best, and a resumed training has none in memory.
        self._restore(index, block)
        self._pass("sparse", block)

        before, after = map(float, share.run_once(lambda: read_json(file)["errors"]))
        change = f"error of its output {before:.3g} → {after:.3g}"
        done = self._report(index + 1)

        count = len(self.training_run.sources)
        self.watch.show(done, f"block {index + 1} of {count}: {change}")
        return after

    def _teach(self, index: int, block: nn.Module) -> tuple[float, float]:
        """Train a block, its best state on disk; return its held-out error before and after."""
        prefix = self.sparse.prefix(index)
        weights = {f"{prefix}.{name}": value for name, value in block.named_parameters()}
        for weight in weights.values():
            weight.requires_grad_(True)

        optimizer = MaskedAdam(weights, self.training_run.masked_weights)
        every = max(1, len(self.steps) // EVALUATIONS)
        before = best = self._error(block)

        for number, step in enumerate(self.steps):
            if not self._learn(block, step, weights):
                break

            norm = gradient_norm(weights)
            rate = learning_rate_at(
                self.training_run.learning_rate(depth=1), (number + 0.5) / len(self.steps)
            )
            optimizer.step(rate, norm)

            done = number + 1
            self._report(index + done / len(self.steps))
            if done % every == 0 or done == len(self.steps):
                error = self._error(block)
                if error < best:
                    best = error
                    self.training_run.save_best(weights, whole=True)

        for weight in weights.values():
            weight.requires_grad_(False)
        return before, best

    def _learn(self, block: nn.Module, step: Sequence[int], weights: Mapping[str, Tensor]) -> bool:
        """Accumulate the gradients of a step; return whether the loss is finite everywhere."""
        counts = [float(_mask_real(self.batches[index]).sum()) for index in step]
        total = 0.0

        for index in step:
            if index not in self.own_indices:
                continue

            error_BT = self._errors(block, index)
            real_BT = self.sparse.to_device(_mask_real(self.batches[index]))
            loss = (error_BT * real_BT).sum() / sum(counts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())

        self._add_up(weights)
        return self.training_run.share.agree(math.isfinite(total))

    def _add_up(self, weights: Mapping[str, Tensor]) -> None:
        """Sum the gradients over processes.

        All must join in each sum, so a process whose tokens missed an expert adds zeros, and
        experts that no process reached are skipped: Adam must not move those.
        """
        share = self.training_run.share
        with_gradient = [name for name, weight in weights.items() if weight.grad is not None]
        with_any_gradient = share.unite(with_gradient)
        for name, value in weights.items():
            if name not in with_any_gradient:
                continue
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            share.add_up(value.grad)

    def _errors(self, block: nn.Module, index: int) -> Tensor:
        """Return each token's squared error relative to the squared dense state, error_BT."""
        sparse = self.flows["sparse"]
        target_BTD = self.sparse.to_device(self.flows["dense"].hidden[index])
        block_inputs = sparse.block_inputs[index].fork()
        output_BTD = self.sparse.forward(
            block, sparse.hidden[index], block_inputs=block_inputs
        ).float()

        error_BT = (output_BTD - target_BTD).square().sum(2)
        return error_BT / target_BTD.square().sum(2).clamp_min(1e-12)

    @torch.no_grad()
    def _error(self, block: nn.Module) -> float:
        """Return the mean relative error of a block over held-out traces."""
        sums = torch.zeros(2, dtype=torch.float64)

        for index in self._list_batches("start"):
            if index in self.text:
                continue

            real_BT = self.sparse.to_device(_mask_real(self.batches[index]))
            error_BT = self._errors(block, index) * real_BT

            sums[0] += float(error_BT.double().sum())
            sums[1] += float(real_BT.sum())

        self.training_run.share.add_up(sums)
        return float(sums[0] / sums[1])

    @torch.no_grad()
    def _measure(self, name: str, *, text: bool = False) -> float:
        """Return the mean KL(dense ‖ model) after the last block, over held-out traces or text.

        Args:
            name: ``start`` or ``sparse``.
        """
        run = self.training_run
        head = LMHead.from_checkpoint(run.dense, run.device)
        norms = {"dense": self.dense.load_final_norm(), name: self.sparse.load_final_norm()}
        weight_R = torch.tensor([0.0, 1.0, 1.0, 0.0])  # of ``SEGMENTS`` and of ``PAD``

        sums = torch.zeros(2, dtype=torch.float64)

        for index in self._list_batches("start"):
            if (index in self.text) != text:
                continue

            # A state predicts the next token, so it has that token's weight; the last has none.
            segment_BT = self.batches[index].segment_BT[:, 1:]
            weight_BT = weight_R[segment_BT]
            counts_BT = weight_BT > 0
            weight_N = weight_BT[counts_BT].double()

            hidden = []
            for flow, norm in norms.items():
                states_BTD = self.sparse.to_device(self.flows[flow].hidden[index])
                normed_BTD = norm(states_BTD)[:, :-1]
                hidden.append(normed_BTD[self.sparse.to_device(counts_BT)])

            dense_ND, sparse_ND = hidden
            kl_N = measure_kl(head, sparse_ND, dense_ND).double().cpu()
            sums[0] += kl_N @ weight_N
            sums[1] += weight_N.sum()

        run.share.add_up(sums)
        return float(sums[0] / sums[1])

    def _restore(self, index: int, block: nn.Module) -> None:
        """Load the best state of a block; where none was saved, load the pruned block again."""
        prefix, share = self.sparse.prefix(index), self.training_run.share
        file = self.training_run.best_folder / f"block-{index:05d}.safetensors"

        if not share.run_once(file.is_file):
            self.sparse.load_block(index)
            return

        named = {f"{prefix}.{name}": value for name, value in block.named_parameters()}
        if share.has_files:
            fill_tensors(file, named)
        for value in named.values():
            value.data = share.send_to_all(value.data)

    def _list_batches(self, flow: str) -> list[int]:
        """Return the indices of this process's batches; for ``start``, held-out ones only."""
        held_out = flow == "start"
        return [index for index in self.own_indices if self.batches[index].held_out or not held_out]

    def _report(self, blocks: float) -> int:
        """Report progress, finished blocks expressed in tokens, and return those tokens."""
        tokens = round(blocks / len(self.training_run.sources) * self.training_run.tokens)
        self.training_run.report_progress(tokens)
        return tokens


def _plan_steps(run: TrainingRun, batches: Sequence[Batch]) -> list[list[int]]:
    """Return the batches of each step, by number, drawn in a new order on every pass."""
    generator = random.Random(run.settings.seed)
    lengths = [int(_mask_real(batch).sum()) for batch in batches]

    def draw() -> list[int]:
        order = list(range(len(batches)))
        generator.shuffle(order)
        return order

    return plan_steps(draw, lengths.__getitem__, run.tokens, run.settings.batch_tokens)


def _mask_real(batch: Batch) -> Tensor:
    """Return the attention mask real_BT: 1 for tokens, 0 for padding."""
    return (batch.segment_BT != PAD).float()
