"""What every way to store a linear changes at the end of its block, from one survey of the model.

Each linear is tried with zeros, number formats and codes of one list. What an option changes is its
error under the Hessian, scaled to what one of them changes of the block's output: one forward pass
for each linear. Widths of parts are tried beside, and number formats of embedding and head.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from racdeploy import plugins, quant
from racdeploy.decoding.engine import Progress
from racdeploy.engines.transformers.torch_model import TORCH_DTYPES
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.batches import Batch, make_batches
from racdeploy.prune.decision import observe_widths
from racdeploy.prune.ends import list_formats, observe_embedding, observe_head
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.layout import Layout, find_end
from racdeploy.prune.methods import Pruned
from racdeploy.prune.outline import whole
from racdeploy.prune.patterns import make_pattern
from racdeploy.prune.refit import prune_and_refit
from racdeploy.prune.rounding import round_to_grid
from racdeploy.prune.session import Session, open_session
from racdeploy.prune.solving import find_order
from racdeploy.prune.survey import Effect, Observation, survey
from racdeploy.prune.surveyed import Option, Stored, Surveyed
from racdeploy.quant.importance import scale
from racdeploy.recipe import Pruning, StreamWeights, Structure
from racdeploy.traces.select import within_budget
from racdeploy.traces.trace import Trace

REFIT_STEPS = 5  # at most, as where sparsities are shared out
PROBE_TOKENS = 1024  # of the batch on which blocks are compared, a forward pass for each linear
LARGEST_CHANGE = 0.03  # of a linear's output: beyond it, a block's output no longer follows in step
LEAST_CHANGE = 1e-9  # of a linear's output: below it, rounding is all there is


def survey_options(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],
    settings: Pruning,
    options: Sequence[str],
    folder: Path,
    *,
    most_tokens: int = 8192,
    parts: Sequence[str] = (),
    weights: StreamWeights | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Surveyed:
    """Try options on every prunable linear of the dense model, in one walk and one process.

    Experts are tried one by one, each on its own tokens: a forward pass of their block for each.

    Args:
        calibration: traces of the dense model.
        settings: method, damping, device and what else decides how zeros are chosen.
        options: keys of :class:`Option`; one whose blocks do not divide a row is left out there.
        folder: for hidden states that do not fit into memory.
        most_tokens: of the traces that are looked at, spread over all; 0: every trace.
        parts: structures whose widths are tried, too; those that a family cannot cut are left out.
        weights: what a token of each stream counts; None is 1 for all.
        threads: of torch; 0 leaves its choice.
        progress: called with a label, blocks done and blocks in all.

    Raises:
        UsageError: there are no traces, or an option is unknown.
    """
    parsed = [Option.parse(key) for key in dict.fromkeys(options)]
    chosen = spread(calibration, most_tokens)
    given = checkpoint, chosen, (), settings, folder, weights, threads, progress
    session = open_session(*given)
    few = spread(chosen, PROBE_TOKENS)  # of all lengths and tasks
    (probe,) = make_batches(few, session.tasks, held_out=False, tokens=sys.maxsize)
    layouts = _list_layouts(checkpoint, parts)
    trial = _Trial(session, parsed, layouts)

    with torch.inference_mode():
        survey(session, list(trial.weights), trial.observe, probe, trial.observe_ends)

    tokens = sum(len(trace.ids) for trace in chosen)
    found = trial.linears, trial.widths, trial.embedding, trial.head
    return Surveyed(tokens, trial.weights, *found)


def spread(traces: Sequence[Trace], most_tokens: int) -> list[Trace]:
    """Return whole traces, evenly from all of them, up to a token budget; 0 means all."""
    tokens = sum(len(trace.ids) for trace in traces)
    if not most_tokens or tokens <= most_tokens:
        return list(traces)

    count = max(1, len(traces) * most_tokens // tokens)
    last = len(traces) - 1
    places = np.linspace(0, last, count).round()

    chosen = [traces[int(place)] for place in places]
    return within_budget(chosen, most_tokens) or [traces[0]]


@dataclass
class _Trial:
    """Every option of every linear, tried where the survey comes by."""

    session: Session
    options: Sequence[Option]
    layouts: Mapping[str, tuple[str, Layout]]  # linear that ends a part → part, layout
    weights: dict[str, int] = field(init=False, default_factory=dict)
    linears: dict[str, dict[str, Stored]] = field(init=False, default_factory=dict)
    widths: dict[str, list[dict[int, float]]] = field(init=False, default_factory=dict)
    embedding: dict[str, Stored] = field(init=False, default_factory=dict)
    head: dict[str, Stored] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        blocks, settings = self.session.blocks, self.session.settings
        self.checkpoint = blocks.checkpoint
        self.method = plugins.load("methods", settings.method)
        self.criterion = plugins.load("criteria", Structure().criterion)
        steps = min(settings.refit_steps, REFIT_STEPS)
        self.settings = settings.model_copy(update={"refit_steps": steps})

        for index in range(self.checkpoint.block_count):
            prefix = blocks.prefix(index)

            for linear in self.checkpoint.linears(index):
                name = f"{prefix}.{linear}"
                entry = self.checkpoint.entries[f"{name}.weight"]
                self.weights[name] = math.prod(entry.shape)

    def observe(
        self, name: str, weight_OI: torch.Tensor, hessian: Hessian, effect: Effect
    ) -> Observation:
        """Note what each option of a linear changes, its zeros, and widths where a part ends."""
        energy = hessian.energy(weight_OI) or 1.0  # of a linear that is zero

        found: dict[str, Stored] = {}
        probe = _Probe()

        for option, stored_OI in self._store(name, weight_OI, hessian):
            change = hessian.energy(stored_OI - weight_OI) / energy
            if math.isfinite(change):  # else it is too large for the number format
                probe.offer(change, stored_OI)
                zero_OI = stored_OI == 0
                found[option.key] = Stored(change, float(zero_OI.float().mean()))

        gain = probe.gain(effect)
        self.linears[name] = {
            key: Stored(gain * stored.error, stored.zeros) for key, stored in found.items()
        }

        if name in self.layouts:
            part, layout = self.layouts[name]
            errors = observe_widths(self.criterion, weight_OI, hessian, layout, effect, share=0.5)
            curve = {int(count): error for count, error in errors.items()}
            self.widths.setdefault(part, []).append(curve)

        return {}

    def observe_ends(self, batch: Batch, hidden_BTD: torch.Tensor) -> None:
        """Try number formats of embedding and head, given what the last block makes of a batch."""
        if self.checkpoint.streams > 1:  # what their head sees is made of several states
            return

        names = list_formats(self.session, self.options)
        self.embedding = observe_embedding(self.session, names, batch)
        self.head = observe_head(self.session, names, batch, hidden_BTD)

    def _store(
        self, name: str, weight_OI: torch.Tensor, hessian: Hessian
    ) -> Iterator[tuple[Option, torch.Tensor]]:
        """Yield each option that fits with the weights that a file would hold."""
        _, linear = self.checkpoint.family.split_block(name)
        order_I = find_order(self.checkpoint, linear, weight_OI)
        entry = self.checkpoint.entries[f"{name}.weight"]
        dtype = TORCH_DTYPES[entry.dtype]

        for alike in self._list_fitting(weight_OI.shape[1]):
            pruned = self._prune(weight_OI, hessian, alike[0])
            as_written_OI = pruned.weight_OI.to(dtype).float()  # in the pruned checkpoint

            for option in alike:
                if option.joint:
                    yield option, _descend(pruned, weight_OI, hessian, option.quant, order_I)
                else:
                    yield option, _round(as_written_OI, hessian, option.quant, order_I)

    def _list_fitting(self, I: int) -> list[list[Option]]:
        """Return the options for rows of a length, those that have the same zeros together."""
        fitting: dict[tuple[float, str], list[Option]] = {}

        for option in self.options:
            _, group = option.kept_of or (1, 1)
            form = quant.load(option.quant)
            if I % group or quant.fits(form, I):
                continue

            zeros = option.sparsity, option.pattern
            alike = fitting.setdefault(zeros, [])
            alike.append(option)

        return [*fitting.values()]

    def _prune(self, weight_OI: torch.Tensor, hessian: Hessian, option: Option) -> Pruned:
        if not option.sparsity:
            all_OI = torch.ones_like(weight_OI, dtype=torch.bool)
            return Pruned(weight_OI, all_OI)

        pattern = make_pattern(option.sparsity, option.kept_of)
        return prune_and_refit(self.method, weight_OI, hessian, pattern, self.settings)


@dataclass
class _Probe:
    """The weights on which a block is asked: of the largest change that it still follows."""

    change: float = 0.0
    weight_OI: torch.Tensor | None = None

    def offer(self, change: float, weight_OI: torch.Tensor) -> None:
        """Keep the weights if they suit better than those kept so far."""
        if self.weight_OI is None:
            is_better = change > LEAST_CHANGE
        elif self.change > LARGEST_CHANGE:
            is_better = LEAST_CHANGE < change < self.change
        else:
            is_better = self.change < change <= LARGEST_CHANGE

        if is_better:
            self.change, self.weight_OI = change, weight_OI

    def gain(self, effect: Effect) -> float:
        """Return the change at the block's end for one of the linear's output."""
        if self.weight_OI is None:
            return 0.0
        return effect(self.weight_OI) / self.change


def _round(
    weight_OI: torch.Tensor, hessian: Hessian, name: str, order_I: torch.Tensor | None
) -> torch.Tensor:
    """Return weights as the export rounds them, by the importance of their inputs in GGUF."""
    form = quant.load(name)
    I = weight_OI.shape[1]
    if "gguf" not in form.FORMATS:
        packed_OP = form.quantize(weight_OI.cpu().numpy())
        stored_OI = form.dequantize(packed_OP, I)
        return torch.from_numpy(stored_OI).to(weight_OI.device)

    mean_I = hessian.norm_I.square()
    if order_I is not None:
        mean_I = mean_I[order_I]
        weight_OI = weight_OI[:, order_I]

    known_I = scale(mean_I.cpu().numpy()) if mean_I.any() else None
    packed_OP = quant.load_ggml(name).quantize(weight_OI.cpu().numpy(), known_I)
    stored_OI = form.dequantize(packed_OP, I)

    back_OI = torch.from_numpy(stored_OI).to(weight_OI.device)
    return back_OI if order_I is None else back_OI[:, order_I.argsort()]


def _descend(
    pruned: Pruned,
    target_OI: torch.Tensor,
    hessian: Hessian,
    name: str,
    order_I: torch.Tensor | None,
) -> torch.Tensor:
    """Return weights on the grid of a number format, chosen by descent."""
    grid = quant.as_grid(name)
    order_I = order_I if "gguf" in grid.FORMATS else None
    begun = Pruned(pruned.weight_OI.clone(), pruned.keep_OI)
    return round_to_grid(begun, target_OI, hessian, grid, order_I)


def _list_layouts(checkpoint: Checkpoint, parts: Sequence[str]) -> dict[str, tuple[str, Layout]]:
    """Return the linears that end a part, of those whose blocks can differ in width."""
    layouts: dict[str, tuple[str, Layout]] = {}
    outline = whole(checkpoint)

    for part in parts:
        plugin = plugins.load("structures", part)
        if plugin.STEP != "block" or checkpoint.family.uncut:
            continue

        own = outline.layouts(checkpoint, part, Structure())
        first = own[0]
        linear = find_end(checkpoint, first.letter)
        if first.alike or not linear:
            continue

        for block, layout in enumerate(own):
            name = f"{checkpoint.family.blocks}.{block}.{linear}"
            layouts[name] = part, layout

    return layouts
