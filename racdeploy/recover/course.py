"""What is learned in one phase: by which model, from which, on what; and what comes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from racdeploy.engines.backends.transformers.torch_model import TORCH_DTYPES
from racdeploy.engines.engine import Progress
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.prune.walk.assemble import assemble
from racdeploy.quant import DENSE_IMPORTANCE_FILE, IMPORTANCE_FILE
from racdeploy.recipe import Recovery
from racdeploy.recover.divergence import Direction
from racdeploy.recover.state import write_tensors
from racdeploy.traces.trace import Trace

STATE_FILE = "state.safetensors"
"""Where a training is saved, in the folder of its phase."""
BEST_FILE = "best.safetensors"
"""Where what the optimizer moves lies as it was in the best state."""


@dataclass(frozen=True)
class Lesson:
    """One look at the model while it learned.

    Args:
        tokens: of traces learned in this phase so far.
        loss: mean over what was learned since the look before, in the way's own unit.
        kl_nats: mean KL(dense ‖ sparse) over held-out traces; None where the way does not know it.
        text_kl_nats: the same over held-out parts of the user's own text; None without one.
        note: why it ended early, on the last look; empty where it did not.
    """

    tokens: int
    loss: float | None = None
    kl_nats: float | None = None
    text_kl_nats: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Course:
    """One phase of recovery.

    Args:
        sparse: the model that learns, as it begins.
        dense: the model it learns from; blocks that were cut have no counterpart in ``sparse``.
        sources: number of the dense block that each block of ``sparse`` was cut from.
        taught: what it learns on.
        held_out: what decides which state is the best.
        text: held-out parts of the user's own text, which are measured too.
        tokens: how much is learned, in tokens of whole traces; traces are repeated.
        direction: of the divergence, where a way trains on one.
        quant: number format whose codes were chosen while pruning; empty where none were.
        folder: where states and other files of the phase lie; each process has its own, and what
            is to last lies in that of the first.
        out: the folder to write the recovered model into.
    """

    sparse: Checkpoint
    dense: Checkpoint
    sources: Sequence[int]
    taught: Sequence[Trace]
    held_out: Sequence[Trace]
    settings: Recovery
    tokens: int
    direction: Direction
    quant: str
    folder: Path
    out: Path
    device: torch.device
    text: Sequence[Trace] = ()
    threads: int = 0
    progress: Progress | None = None
    notify: Callable[[str], None] | None = None  # gets a line at every look
    processes: Processes = ALONE

    @property
    def masked(self) -> Sequence[str]:
        """Names of the weights whose zeros stay."""
        return self.sparse.shape.linear_weights

    def rate(self, depth: int) -> float:
        """Return the highest learning rate where so many blocks learn together.

        Wide models want a lower one, and so do deep ones: what one block changes, the others feel.
        Measured at 4 blocks of width 256 and at 30 of 576; a rate that is too high is halved.
        """
        wide = self.sparse.shape.hidden_size
        return self.settings.rate or 1.6 / (wide * max(depth, 4))

    @property
    def compute(self) -> Literal["float32", "bfloat16"]:
        """What products are computed in; whoever makes a course has settled what ``auto`` is."""
        return "bfloat16" if self.settings.compute == "bfloat16" else "float32"

    @property
    def best_folder(self) -> Path:
        """Where the tensors of the best state lie, a file per block."""
        return self.folder / "best"

    def settle_threads(self) -> None:
        """Compute with as many threads as the first process: another number rounds differently."""
        asked = self.threads or torch.get_num_threads()
        torch.set_num_threads(self.processes.tell(asked))

    def report(self, done: int) -> None:
        """Say how many tokens were learned."""
        if self.progress:
            self.progress("recover", min(done, self.tokens), self.tokens, done)

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Return a weight as its file will hold it, every zero of the start still there."""
        dtype = TORCH_DTYPES[self.sparse.entries[name].dtype]
        rounded = value.detach().cpu().to(dtype)

        if name in self.masked:
            start = torch.from_numpy(self.sparse.read(name))
            revived = (start == 0) & (rounded != 0)
            assert not revived.any(), f"{int(revived.sum())} zeros of {name} came back"

        return rounded.contiguous()

    def keep(self, tensors: Mapping[str, Tensor], *, whole: bool = False) -> None:
        """Write the weights of the best state so far, a file per block.

        Args:
            tensors: by name. Of several processes, which all call this, each has its rows of them.
            whole: each has all of them instead.
        """
        processes = self.processes
        self.best_folder.mkdir(exist_ok=True)

        blocks: dict[str, list[str]] = {}
        for name in tensors:
            block, _ = self.sparse.family.split_block(name)
            part = "model" if block is None else f"{block:05d}"
            blocks.setdefault(part, []).append(name)

        for part, names in blocks.items():
            stored = {}
            for name in names:
                value = tensors[name] if whole else processes.join(tensors[name])
                if processes.first:
                    stored[name] = self.stored(name, value)

            if processes.first:
                write_tensors(self.best_folder / f"block-{part}.safetensors", stored)

    def clean(self) -> None:
        """Remove what only an interrupted run needs."""
        shutil.rmtree(self.best_folder, ignore_errors=True)
        for name in (STATE_FILE, BEST_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def write(self) -> None:
        """Write the recovered model: the best state, and what recovery does not touch."""
        self.best_folder.mkdir(exist_ok=True)
        assemble(self.sparse, self.best_folder, self.out)

        for name in (IMPORTANCE_FILE, DENSE_IMPORTANCE_FILE):
            if (self.sparse.folder / name).is_file():
                shutil.copyfile(self.sparse.folder / name, self.out / name)


def list_trained(checkpoint: Checkpoint, *, vectors_only: bool = False) -> list[str]:
    """Return the weights that recovery may move: all of the blocks, and the norm after them.

    Embedding and output projection stay as they are, as they do in pruning, and so do routers.
    """
    family = checkpoint.family

    names = []

    for name, entry in sorted(checkpoint.entries.items()):
        is_vector = len(entry.shape) == 1
        if vectors_only and not is_vector:
            continue

        block, inside = family.split_block(name)
        if block is None:
            if is_vector:
                names.append(name)
            continue

        linear, _, _ = generalize(inside).rpartition(".")
        if linear not in family.kept:
            names.append(name)

    return names
