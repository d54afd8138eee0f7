"""What pruning takes: seconds and peak memory, predicted from one block on this machine, and measured.

The walk of :mod:`racdeploy.prune.calibrate` does the same few things for every block. One block is loaded, some tokens
go through it, and the method prunes a piece of each linear on a random Hessian; all are timed, scaled to the whole
model, and added up. Memory is that of the process and, where there is a GPU, of its tensors there. Not counted: what
several processes save, and copies to a GPU and back.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from racdeploy import plugins
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.activations import WINDOW_BYTES
from racdeploy.prune.batches import TOKENS_PER_BATCH
from racdeploy.prune.blocks import Blocks
from racdeploy.prune.device import choose_device
from racdeploy.prune.flow import KEPT_BYTES, is_kept
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.patterns import pattern_of
from racdeploy.prune.refit import prune_and_refit
from racdeploy.prune.rounding import round_to_grid
from racdeploy.quant import Grid, as_grid
from racdeploy.recipe import Pruning
from racdeploy.storage.files import read_json, write_atomic
from racdeploy.storage.heap import keep_heap

T = TypeVar("T")
_SAMPLE_FLOP, _SAMPLE_INPUTS, _SAMPLE_OUTPUTS = 2e10, 1024, 512
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FILE = "cost.json"


@dataclass(frozen=True)
class Cost:
    """Seconds, and the largest resident memory of the process; measured, 0 bytes where the system does not say."""

    seconds: float
    peak_bytes: int


def predict(
    checkpoint: Checkpoint,
    settings: Pruning,
    calibration_lengths: Sequence[int],
    held_out_lengths: Sequence[int],
    threads: int = 0,
    quant: str = "",
) -> Cost:
    """Return what :func:`~racdeploy.prune.calibrate.prune_blocks` will take on this machine, in a few seconds.

    Args:
        checkpoint: the dense model.
        settings: method, pattern, sparsity.
        calibration_lengths: tokens of each trace that decides the pruning.
        held_out_lengths: tokens of each trace that only measures it.
        threads: CPU threads; 0 leaves torch's choice.
        quant: number format whose codes are chosen while pruning; empty leaves rounding to the export.
    """
    keep_heap()
    if threads:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        grid = as_grid(quant) if quant else None
        model = _Model(checkpoint, settings, sum(calibration_lengths), sum(held_out_lengths), grid)
        return Cost(
            model.seconds(max([*calibration_lengths, *held_out_lengths])), model.peak_bytes()
        )


def trace_bytes(checkpoint: Checkpoint, sequences: int, prompt: int, longest: int) -> int:
    """Return what collecting traces here takes at most in memory, in bytes: transformers holds the whole model.

    That is the process as it is, every weight in float32, keys and values with one block's twice while they are
    appended to, and what passes through a block and its head.

    Args:
        checkpoint: the model that answers.
        sequences: decoded together.
        prompt: tokens of the longest prompt.
        longest: tokens of the longest trace.
    """
    entries, prefix = checkpoint.entries, f"{checkpoint.family.blocks}.0"
    weights = 4 * sum(math.prod(entry.shape) for entry in entries.values())
    row = 4 * 2 * checkpoint.key_value_heads * checkpoint.head_size
    cache = row * (checkpoint.block_count + 1) * sequences * longest
    inner = max(
        entries[f"{prefix}.{linear}.weight"].shape[1] for linear in checkpoint.family.linears
    )
    width = checkpoint.integer("hidden_size")
    passing = (
        4 * sequences * (prompt * (6 * width + 4 * inner) + 2 * checkpoint.integer("vocab_size"))
    )
    return _resident() + weights + cache + passing


@dataclass
class _Model:
    """The arithmetic of one walk."""

    checkpoint: Checkpoint
    settings: Pruning
    calibration_tokens: int
    held_out_tokens: int
    grid: Grid | None

    def __post_init__(self) -> None:
        entries, prefix = self.checkpoint.entries, f"{self.checkpoint.family.blocks}.0"
        self.groups = [
            [entries[f"{prefix}.{name}.weight"].shape for name in group]
            for group in self.checkpoint.family.input_groups
        ]
        self.weights = sum(math.prod(shape) for group in self.groups for shape in group)
        self.method = plugins.load("methods", self.settings.method)
        self.allocation = plugins.load("allocations", self.settings.allocation)
        self.device = choose_device(self.settings.device)
        self.generator = torch.Generator().manual_seed(0)
        self.streams = 2 if self.settings.match_dense else 1

    def seconds(self, longest: int) -> float:
        """Time the parts, and add them up over all blocks."""
        blocks = Blocks(self.checkpoint, self.settings.compute, self.device)
        load_s, block = _timed(lambda: blocks.load(0))
        width = self.groups[0][0][1]
        tokens = int(
            min(
                max(_SAMPLE_FLOP / (2 * self.weights), 128),
                TOKENS_PER_BATCH,
                self.calibration_tokens,
            )
        )
        length = min(longest, tokens)
        hidden_BTD = self._random(max(tokens // length, 1), length, width)
        forward_s, _ = _timed(lambda: blocks.forward(block, hidden_BTD), warm=True)
        forward_s /= hidden_BTD.shape[0] * length
        block.to("meta")
        held_out_passes = 3.0  # sparse, dense, and each linear against its target
        passed = (
            self.streams * self._passes() * self.calibration_tokens
            + held_out_passes * self.held_out_tokens
        )
        seconds = (
            load_s
            + forward_s * passed
            + self._gathering(self.streams == 2)
            + self._solving(self._solve)
        )
        if self.allocation.SURVEYS:
            seconds += load_s + self._surveying(forward_s, longest)
        return self.checkpoint.block_count * seconds

    def _surveying(self, forward_s: float, longest: int) -> float:
        """Return the seconds of a look at one block of the dense model before pruning, with effects where they count.

        Args:
            forward_s: seconds of a token's pass.
            longest: tokens of the longest trace.
        """
        effects = 0

        def effect(changed_OI: torch.Tensor) -> float:
            nonlocal effects
            effects = sum(len(group) for group in self.groups)
            return 1.0

        solve_s = self._solving(
            lambda w_OI, hessian: self.allocation.observe(w_OI, hessian, effect, self.settings)
        )
        probe_tokens = min(max(TOKENS_PER_BATCH, longest), self.calibration_tokens)
        passed = self._passes() * self.calibration_tokens + (1 + effects) * probe_tokens
        return forward_s * passed + self._gathering(drifts=False) + solve_s

    def _passes(self) -> float:
        """Return how often one model's tokens go through a block: up to each input, and to the end."""
        weights = [sum(math.prod(shape) for shape in group) for group in self.groups]
        kept_width = sum(group[0][1] for index, group in enumerate(self.groups) if is_kept(index))
        kept = min(KEPT_BYTES / max(4 * self.calibration_tokens * kept_width, 1), 1.0)
        passed = 0.0
        for goal in range(len(weights) + 1):
            for group, count in enumerate(weights[:goal]):
                left_out = is_kept(group + 1) and group + 1 < goal
                passed += count * (1 - kept if left_out else 1)
        return passed / self.weights

    def _gathering(self, drifts: bool) -> float:
        """Return the seconds of the products and sums of one block's statistics."""
        side = 1024
        x_NI = self._random(side, side)
        sum_II = x_NI.new_zeros(side, side, dtype=torch.float64)
        product_s, product_II = _timed(lambda: x_NI.T @ x_NI, warm=True)
        sum_s, _ = _timed(lambda: sum_II.add_(product_II), warm=True)
        batches, seconds = math.ceil(self.calibration_tokens / TOKENS_PER_BATCH), 0.0
        for group in self.groups:
            I, rows = group[0][1], sum(O for O, _ in group)
            drift = min(I, 2 * rows) if drifts else 0
            seconds += product_s * self.calibration_tokens * I * (0.56 * I + drift) / side**3
            seconds += sum_s * batches * I * (0.56 * I + min(drift, rows)) / side**2
        return seconds

    def _solving(self, solve: Callable[[torch.Tensor, Hessian], object]) -> float:
        """Return the seconds of solving something for each of a block's linears: for a piece of each, and scaled."""
        settings = self.settings
        seconds, seen = 0.0, dict[tuple[int, int], tuple[float, float]]()
        for group in self.groups:
            for index, (O, I) in enumerate(group):
                o, i = min(O, _SAMPLE_OUTPUTS), min(I, _SAMPLE_INPUTS)
                whole = math.lcm(
                    settings.kept_of[1] if settings.kept_of else 1,
                    self.grid.BLOCK if self.grid else 1,
                )
                i = max(i - i % whole, whole)
                if (o, i) not in seen:
                    x_NI, weight_OI = self._random(2 * i, i), self._random(o, i)
                    hessian = Hessian(x_NI.T @ x_NI, settings.damping)
                    piece = partial(solve, weight_OI, hessian)
                    first_s, again_s = (
                        _timed(piece)[0],
                        _timed(piece)[0],
                    )  # the first one also factors the Hessian
                    seen[o, i] = max(first_s - again_s, 0.0), again_s
                factor_s, solve_s = seen[o, i]
                seconds += solve_s * (O / o) * (I / i) ** 2 + (
                    factor_s * (I / i) ** 3 if index == 0 else 0.0
                )
        return seconds

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def _solve(self, weight_OI: torch.Tensor, hessian: Hessian) -> None:
        """Do with a linear what the walk does once its Hessian is there."""
        settings = self.settings
        pattern = pattern_of(settings.sparsity, settings.kept_of)
        pruned = prune_and_refit(self.method, weight_OI, hessian, pattern, settings)
        if self.grid:
            round_to_grid(pruned.weight_OI, pruned.keep_OI, weight_OI, hessian, self.grid)
        if settings.match_dense:
            hessian.solve(weight_OI)

    def peak_bytes(self) -> int:
        """Return the process as it is now, two copies of a block, the window, and the widest statistic at its worst."""
        width, tokens = self.groups[0][0][1], self.calibration_tokens + self.held_out_tokens
        dense_tokens = tokens if self.streams == 2 else self.held_out_tokens
        window = sum(min(4 * width * count, WINDOW_BYTES) for count in (tokens, dense_tokens))
        batch = min(TOKENS_PER_BATCH, self.calibration_tokens)
        inner = max(I for group in self.groups for _, I in group)
        passing = 4 * batch * (6 * width + (2 + 2 * self.streams) * inner)
        worst = 0
        for group in self.groups:
            I, rows = group[0][1], sum(O for O, _ in group)
            drift = 0 if self.streams == 1 else min(I, rows) if 2 * rows <= I else I
            gather = round(8 * 0.56 * I * I) + 8 * drift * I + passing
            factor = 4 * 2 * I * I + 4 * drift * I
            solve = 4 * 2 * I * I + 4 * I * (
                2 * rows + (10 if self.grid else 8) * max(O for O, _ in group)
            )
            effect = 4 * 2 * I * I + passing if self.allocation.SURVEYS else 0
            worst = max(worst, gather, factor, solve, effect)
        return _resident() + 2 * 4 * self.weights + window + worst


@contextmanager
def measured_cost(folder: Path, predicted: Cost, processes: int) -> Iterator[None]:
    """While the body runs, measure it, then leave both in a folder; what an earlier run began is not measured."""
    fresh = not any(folder.glob("block-*.json"))
    reset = _reset_peak()
    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    yield
    if fresh:
        peak_bytes = _resident("VmHWM") if reset else 0
        found = Cost(time.perf_counter() - began, peak_bytes + _resident_gpu() if peak_bytes else 0)
    elif (folder / _FILE).is_file():  # the walk had ended when it was interrupted
        return
    values = {"predicted": asdict(predicted), "measured": asdict(found) if fresh else None}
    write_atomic(
        folder / _FILE, json.dumps(values | {"processes": processes, "gpu": _on_gpu()}, indent=1)
    )


def cost_note(folder: Path) -> str:
    """Return one line on what pruning took and how far off the prediction was; empty where nothing is known."""
    if not (folder / _FILE).is_file():
        return ""
    values = read_json(folder / _FILE)
    if not values["measured"]:
        return f"pruning was resumed, so not measured; {Cost(**values['predicted']).seconds:.0f} s were predicted"
    predicted, found = Cost(**values["predicted"]), Cost(**values["measured"])
    several = (
        f" for one of its {values['processes']} processes alone" if values["processes"] > 1 else ""
    )
    where = " on a GPU" if values["gpu"] else ""
    note = f"pruning took {found.seconds:.0f} s{where}, {predicted.seconds:.0f} s were predicted{several}"
    if found.peak_bytes:
        note += f"; its peak memory was {found.peak_bytes / 2**30:.2f} GiB, predicted {predicted.peak_bytes / 2**30:.2f}"
    return note


def _timed(do: Callable[[], T], warm: bool = False) -> tuple[float, T]:
    """Return the seconds of a call and its result; a warm one is the second."""
    if warm:
        do()
    _finish()
    began = time.perf_counter()
    result = do()
    _finish()
    return time.perf_counter() - began, result


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _finish() -> None:
    """Wait for a GPU: calls return before it is done."""
    if _on_gpu():
        torch.cuda.synchronize()


def _resident_gpu() -> int:
    return torch.cuda.max_memory_allocated() if _on_gpu() else 0


def _reset_peak() -> bool:
    """Count the peak of resident memory from here; return False where the system has no such switch."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(entry: str = "VmRSS") -> int:
    """Return resident memory in bytes, now or at its peak; 0 where the system does not say, as outside Linux."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), 0)
