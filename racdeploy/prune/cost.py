"""What pruning takes: peak memory from the shapes, time from the first block, and both as measured.

Memory is that of the process and of its tensors on a GPU; time is only known from the first block.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.decoding.engine import Progress
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import name_experts
from racdeploy.prune.bounds import EXPERT_BYTES, TOKENS_PER_BATCH, WINDOW_BYTES
from racdeploy.quant import Codes
from racdeploy.recipe import Pruning
from racdeploy.storage.files import write_atomic
from racdeploy.storage.memory import resident_bytes
from racdeploy.storage.reading import read_json

_RESET = Path("/proc/self/clear_refs")
_FILE = "cost.json"
_FLOAT32, _FLOAT64 = 4, 8
_TRIANGLE = 0.56  # of the Hessian's squares are summed, 36 of 64 in 8 slabs of rows
# In float32, while a linear is solved: Hessian and factor; of a group's largest linear, weights
# twice, scores, result and what ``kthvalue`` takes, or what the refit keeps. Methods may differ.
_MATRICES, _COPIES, _REFIT_COPIES, _CUT_MATRICES = 2, 7, 9, 4
_LIBRARIES_BYTES = 365 << 20  # of torch and transformers, where a plan does without them
_STARTED_BYTES = 16 << 20  # of torch with its first products; 12 MiB in a tiny model
_HOLES = 1.4  # the C library keeps what is freed: 1.1 to 1.4 times what is in use, as measured
_WORTH_A_LINE_S = 60.0  # a shorter wait is over before the line is read


def trace_bytes(checkpoint: Checkpoint, sequences: int, prompt: int, longest: int) -> int:
    """Return what collecting traces here takes at most in memory, ``sequences`` at a time.

    The process as it is, weights in float32, keys and values (a block's twice), and activations.
    """
    entries = checkpoint.entries
    width = checkpoint.integer("hidden_size")
    sequences = 1 if checkpoint.has_state else sequences  # as the engine decodes them
    inner = max(inputs for group in _list_groups(checkpoint) for _, inputs in group.shapes)

    weights = sum(math.prod(entry.shape) for entry in entries.values())
    per_token = 2 * checkpoint.key_value_heads * checkpoint.head_size
    cache = per_token * (sum(checkpoint.attends) + 1) * sequences * longest

    # A prompt token: six values of hidden width, four of them of all that pass between blocks; four
    # of feed-forward width; the last logits twice.
    passing = sequences * prompt * (2 * width + 4 * checkpoint.state_width + 4 * inner)
    logits = 2 * sequences * checkpoint.integer("vocab_size")
    return _process_bytes() + _FLOAT32 * (weights + cache + passing + logits)


def peak_bytes(
    checkpoint: Checkpoint,
    settings: Pruning,
    calibration_tokens: int,
    held_out_tokens: int,
    quant: Codes = "",  # whose codes are chosen while pruning, if any
    *,
    cuts: bool = False,  # whether structure is cut first
) -> int:
    """Return what :func:`~racdeploy.prune.calibrate.prune_blocks` will take at most in memory.

    The process with transformers, the window of hidden states, and the costliest moment of a group.
    """
    process = _process_bytes(checkpoint, settings.device)
    width = checkpoint.integer("hidden_size")
    groups = _list_groups(checkpoint)
    block = sum(group.weights for group in groups)
    streams = 2 if settings.match_dense else 1  # of hidden states: sparse, and dense beside it

    tokens = calibration_tokens + held_out_tokens
    dense_tokens = tokens if settings.match_dense else held_out_tokens
    wide = checkpoint.state_width
    window = sum(min(_FLOAT32 * wide * count, WINDOW_BYTES) for count in (tokens, dense_tokens))

    # A token: as above, two values of feed-forward width, a linear's input per stream.
    inner = max(I for group in groups for _, I in group.shapes)
    batch_tokens = min(TOKENS_PER_BATCH, calibration_tokens)
    passing = _FLOAT32 * batch_tokens * (2 * width + 4 * wide + (2 + streams) * inner)

    method = plugins.constants("methods", settings.method)
    matrices = method.get("MATRICES", _MATRICES)
    copies = method.get("COPIES", _COPIES)
    if settings.match_dense:  # targets need the factor
        matrices = max(matrices, _MATRICES)
    if settings.refit_steps:
        copies = max(copies, _REFIT_COPIES)
    if cuts:  # the inverse on its way down, and a factor of what stays
        matrices = max(matrices, _CUT_MATRICES)
    if quant:  # weights and pull of the search for codes
        copies += 2
    surveys = plugins.constants("allocations", settings.allocation)["SURVEYS"]

    worst = before = 0  # before: weights of the block's groups that were pruned already

    for group in groups:
        shapes = group.shapes
        I, rows = shapes[0][1], sum(O for O, _ in shapes)
        largest = max(O for O, _ in shapes)

        # The dense block; of what is pruned, float32 to compute with, 16 bits to write, the target.
        kept = _FLOAT32 * block + before * (_FLOAT32 * streams + 2)
        others = group.other_sums_bytes(settings.match_dense)
        gather = group.sums_bytes(settings.match_dense) + others + passing
        targets = rows if settings.match_dense else 0
        solve = _FLOAT32 * I * (matrices * I + targets + copies * largest)
        if group.experts > 1:  # the others' sums, and what is solved already: weights and target
            solve += others + _FLOAT32 * streams * group.weights
        effect = _FLOAT32 * _MATRICES * I * I + passing if surveys else 0

        worst = max(worst, kept + max(gather, solve, effect))
        before += group.weights

    return process + _STARTED_BYTES + round(_HOLES * (window + worst))


def _process_bytes(checkpoint: Checkpoint | None = None, device: str = "auto") -> int:
    """Return what the process takes with all that pruning imports, loaded or not yet.

    Where torch is loaded, so is what a checkpoint needs of transformers: then it is measured.
    """
    if "torch" not in sys.modules and device != "cuda":
        return resident_bytes() + _LIBRARIES_BYTES

    if checkpoint:
        from racdeploy.prune.blocks import Blocks
        from racdeploy.prune.device import choose_device

        Blocks(checkpoint, device=choose_device(device))
    return resident_bytes()


@dataclass(frozen=True)
class Group:
    """Linears that share an input: their shapes (O, I), and how many experts have such ones."""

    shapes: list[tuple[int, ...]]
    experts: int

    @property
    def weights(self) -> int:
        """Weights of the group in a block."""
        return self.experts * sum(map(math.prod, self.shapes))

    def sums_bytes(self, match_dense: bool) -> int:
        """Return what the sums over one input take, see InputStatistic."""
        I, rows = self.shapes[0][1], sum(O for O, _ in self.shapes)
        drift = 0
        if match_dense:  # of the outputs where these are few
            drift = rows if 2 * rows <= I else I
        return round(_FLOAT64 * _TRIANGLE * I * I) + _FLOAT64 * drift * I

    def other_sums_bytes(self, match_dense: bool) -> int:
        """Return what those of further experts take that are gathered in the same pass."""
        own = self.sums_bytes(match_dense)
        return min(self.experts * own, max(own, EXPERT_BYTES)) - own


def _list_groups(checkpoint: Checkpoint) -> list[Group]:
    """Return the groups of the largest block."""
    return max(list_groups(checkpoint), key=lambda groups: sum(group.weights for group in groups))


def list_groups(checkpoint: Checkpoint) -> list[list[Group]]:
    """Return the groups of linears of every block."""
    family = checkpoint.family
    blocks = []

    for block in range(checkpoint.block_count):
        groups: list[Group] = []
        for linears in checkpoint.input_groups(block):
            experts = checkpoint.experts if linears[0] in family.routed else 1
            firsts = name_experts(linears, 1)
            names = [f"{family.blocks}.{block}.{linear}.weight" for linear in firsts]
            groups.append(Group([checkpoint.entries[name].shape for name in names], experts))
        blocks.append(groups)

    return blocks


class TimeLeft:
    """Estimates the seconds of pruning from the first block after those that were finished."""

    def __init__(self, finished: int = 0) -> None:
        self._finished = finished
        self._began = self._last = time.perf_counter()
        self.total_s: float | None = None

    def update(self, label: str, done: int, total: int) -> float | None:
        """Take what a progress callback gets; return the seconds left after the first block."""
        now = time.perf_counter()
        block_s = now - self._last
        self._last = now
        if label != "prune" or done != self._finished + 1 or done == total:
            return None

        left_s = block_s * (total - done)
        self.total_s = now - self._began + left_s
        return left_s


@contextmanager
def measured_cost(
    folder: Path,
    predicted_bytes: int,
    processes: int,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,  # gets a line on the time left, if long
) -> Iterator[Progress]:
    """Yield a progress callback; measure the body into ``folder``, unless an earlier run began."""
    finished = len([*folder.glob("block-*.json")])
    reset = _reset_peak()
    if _on_gpu():
        _cuda().reset_peak_memory_stats()

    began = time.perf_counter()
    estimate = TimeLeft(finished)

    def show(label: str, done: int, total: int, tokens: int = 0) -> None:
        left_s = estimate.update(label, done, total)
        if notify and left_s is not None and left_s > _WORTH_A_LINE_S:
            notify(f"pruning: about {left_s / 60:.0f} min left, by its first block")
        if progress:
            progress(label, done, total, tokens)

    yield show
    if finished and (folder / _FILE).is_file():  # the walk had ended when it was interrupted
        return

    values: dict[str, Any] = {"processes": processes, "gpu": _on_gpu(), "measured": None}
    values["predicted"] = {"seconds": estimate.total_s, "peak_bytes": predicted_bytes}

    if not finished:
        resident = resident_bytes("VmHWM") if reset else 0
        on_gpu = _cuda().max_memory_allocated() if _on_gpu() else 0
        values["measured"] = {
            "seconds": time.perf_counter() - began,
            "peak_bytes": resident + on_gpu if resident else 0,  # 0: the system does not say
        }

    write_atomic(folder / _FILE, json.dumps(values, indent=1))


def cost_note(folder: Path) -> str:
    """Return one line on what pruning took, beside the estimates; empty where nothing is known."""
    if not (folder / _FILE).is_file():
        return ""

    values = read_json(folder / _FILE)
    predicted, found = values["predicted"], values["measured"]
    if not found:
        return "pruning was resumed, so not measured"

    note = f"pruning took {found['seconds']:.0f} s{' on a GPU' if values['gpu'] else ''}"
    if values["processes"] > 1:
        note += f" in {values['processes']} processes"
    if predicted["seconds"] is not None:
        note += f", {predicted['seconds']:.0f} s were expected after its first block"
    if found["peak_bytes"]:
        note += f"; its peak memory was {found['peak_bytes'] / 2**30:.2f} GiB"
        note += f", predicted {predicted['peak_bytes'] / 2**30:.2f} GiB"

    return note


def _on_gpu() -> bool:
    return "torch" in sys.modules and bool(_cuda().is_initialized())


def _cuda() -> Any:
    import torch

    return torch.cuda


def _reset_peak() -> bool:
    """Count the peak of resident memory from here; return False where the system cannot."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True
