"""One training run of recovery: student, teacher, data, and the files of its best state."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from racdeploy.engines.backends.transformers.torch_model import TORCH_DTYPES
from racdeploy.engines.engine import Ids, Progress
from racdeploy.files.writing import write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize_expert
from racdeploy.pruning.job_share import WHOLE_SHARE, JobShare
from racdeploy.pruning.walk.assemble import assemble, read_block_entries
from racdeploy.quant import DENSE_IMPORTANCE_FILE, IMPORTANCE_FILE, load_grid
from racdeploy.quant.stored_codes import name_arrays, rescale
from racdeploy.recipe import Recovery
from racdeploy.recovery import load_objective
from racdeploy.recovery.divergence import Direction
from racdeploy.recovery.state import write_tensors
from racdeploy.traces.trace import Trace

STATE_FILE = "state.safetensors"
"""Training state to resume from, in the folder of the phase."""
BEST_FILE = "best.safetensors"
"""Trainable parameters as they were in the best state."""


@dataclass(frozen=True)
class TrainingRun:
    """The training run of one phase of recovery.

    Args:
        sparse: the student, in its state before this phase.
        dense: the teacher; removed blocks have no counterpart in ``sparse``.
        sources: index of the dense block that each block of ``sparse`` was cut from.
        train_traces: training data.
        held_out: evaluation data, which decides which state is the best.
        text: held-out parts of the user's own text, evaluated too.
        tokens: number of tokens to train on, counting whole traces; traces are repeated.
        direction: of the KL divergence, for methods that train on it.
        folder: of the phase's states and other files; each process has its own, and results are in
            that of the first.
        out: folder of the recovered model.
        objective: what is learned from the traces.
        brief_prompts: prompt → the same prompt with an instruction to be brief.
    """

    sparse: Checkpoint
    dense: Checkpoint
    sources: Sequence[int]
    train_traces: Sequence[Trace]
    held_out: Sequence[Trace]
    settings: Recovery
    tokens: int
    direction: Direction
    folder: Path
    out: Path
    device: torch.device
    objective: str = "distill"
    brief_prompts: Mapping[Ids, Ids] = field(default_factory=dict)
    text: Sequence[Trace] = ()
    progress: Progress | None = None
    notify: Callable[[str], None] | None = None  # gets a line at every evaluation
    share: JobShare = WHOLE_SHARE  # of this process

    @property
    def masked_weights(self) -> Sequence[str]:
        """Names of the weights whose zeros stay zero."""
        return self.sparse.shape.prunable_weights

    def learning_rate(self, depth: int) -> float:
        """Return the peak learning rate for ``depth`` blocks that are trained together.

        It falls with the width, and with the depth, since a change in one block shifts the inputs
        of the next. The constant was measured at 4 blocks of width 256 and at 30 of 576; training
        halves a rate that turns out too high.
        """
        width = self.sparse.shape.hidden_size
        scale = load_objective(self.objective).learning_rate_scale
        return self.settings.learning_rate or scale / (width * max(depth, 4))

    @property
    def compute(self) -> Literal["float32", "bfloat16"]:
        """Dtype of matrix products; ``auto`` was resolved before the run was made."""
        return "bfloat16" if self.settings.compute == "bfloat16" else "float32"

    @property
    def best_folder(self) -> Path:
        """Folder of the best state's weights, a file per block."""
        return self.folder / "best"

    def report_progress(self, done: int) -> None:
        """Report the number of tokens that were trained on."""
        if self.progress:
            purpose = load_objective(self.objective).purpose
            self.progress(purpose, min(done, self.tokens), self.tokens, done)

    def to_stored_dtype(self, name: str, value: Tensor) -> Tensor:
        """Return a weight in the checkpoint's dtype; assert that its zeros are still zero."""
        dtype = TORCH_DTYPES[self.sparse.entries[name].dtype]
        rounded = value.detach().cpu().to(dtype)

        if name in self.masked_weights:
            start = torch.from_numpy(self.sparse.read(name))
            revived = (start == 0) & (rounded != 0)
            assert not revived.any(), f"{int(revived.sum())} zeros of {name} came back"

        return rounded.contiguous()

    def save_best(self, tensors: Mapping[str, Tensor], *, whole: bool = False) -> None:
        """Write the weights of the best state so far, a file per block.

        Args:
            tensors: by name. Several processes all call this, each with its rows of every tensor.
            whole: every process has whole tensors instead.
        """
        self.best_folder.mkdir(exist_ok=True)

        blocks: dict[str, list[str]] = {}
        for name in tensors:
            block, _ = self.sparse.family.split_block(name)
            part = "model" if block is None else f"{block:05d}"
            blocks.setdefault(part, []).append(name)

        for part, names in blocks.items():
            stored = {}
            for name in names:
                value = tensors[name] if whole else self.share.gather_rows(tensors[name])
                if self.share.has_files:
                    stored[name] = self.to_stored_dtype(name, value)

            if self.share.has_files:
                write_tensors(self.best_folder / f"block-{part}.safetensors", stored)

    def remove_states(self) -> None:
        """Remove the files that only a resumed run needs."""
        shutil.rmtree(self.best_folder, ignore_errors=True)
        for name in (STATE_FILE, BEST_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def write(self) -> None:
        """Write the recovered model: weights of the best state, all else from the pruned model."""
        self.best_folder.mkdir(exist_ok=True)
        self._write_codes()
        assemble(self.sparse, self.best_folder, self.out)

        for name in (IMPORTANCE_FILE, DENSE_IMPORTANCE_FILE):
            if (self.sparse.folder / name).is_file():
                shutil.copyfile(self.sparse.folder / name, self.out / name)

    def _write_codes(self) -> None:
        """Write the codes of the best state's weights: those of the pruned model, other scales."""
        trained = read_block_entries(self.best_folder)
        for weight, stored in self.sparse.coded.items():
            if weight not in trained:
                continue
            codes, weight_OI = stored.read_codes(), trained[weight].read()
            # A linear without trainable scales was frozen: its codes stay as they are.
            if not np.array_equal(weight_OI, stored.read()):
                codes = rescale(codes, stored.quant, weight_OI)
                if not np.array_equal(load_grid(stored.quant).decode(codes), weight_OI):
                    continue  # more than scales was trained: the export rounds the weights
            arrays = name_arrays(weight, stored.quant, codes, weight_OI)
            write_atomic(self.best_folder / f"block-codes-{weight}.safetensors", save(arrays))


def list_trained(checkpoint: Checkpoint, *, vectors_only: bool = False) -> list[str]:
    """Return the names of the weights that recovery may train: the blocks and the final norm.

    Embedding, output projection and routers are frozen, as in pruning.
    """
    family = checkpoint.family
    names = []

    for name, entry in sorted(checkpoint.entries.items()):
        is_vector = len(entry.shape) == 1
        if vectors_only and not is_vector:
            continue

        block, inside = family.split_block(name)
        if block is None:  # outside the blocks, the final norm is the only vector
            if is_vector:
                names.append(name)
            continue

        linear, _, _ = generalize_expert(inside).rpartition(".")
        if linear not in family.never_pruned:
            names.append(name)

    return names
