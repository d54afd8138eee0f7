"""The walk over the blocks: gather statistics, prune, write, and pass the sparse block's output on.

One block's weights are in memory at a time. A finished block is a file, so an interrupted walk goes on with the
first block that has none; nothing of the rest is lost, and the result is byte for byte the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from racdeploy import plugins
from racdeploy.artifacts import STREAMS, Trace, write_atomic
from racdeploy.backends._heap import keep_heap
from racdeploy.backends._torch_model import TORCH_DTYPES, check_names, fill_parameter, skeleton
from racdeploy.checkpoint import Checkpoint, read_json
from racdeploy.errors import UsageError
from racdeploy.prune.batches import Batch, make_batches
from racdeploy.prune.patterns import pattern_of
from racdeploy.prune.statistics import InputStatistic
from racdeploy.recipe import Pruning
from racdeploy.report_model import LinearRow

__all__ = ["prune_blocks"]

Progress = Callable[[str, int, int], None]


def prune_blocks(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],
    held_out: Sequence[Trace],
    settings: Pruning,
    folder: Path,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[LinearRow]:
    """Prune every block of a checkpoint and leave one safetensors file per block in ``folder``.

    Args:
        checkpoint: the dense model.
        calibration: traces that decide the pruning.
        held_out: traces that only measure it.
        settings: method, pattern, sparsity.
        folder: receives ``block-00000.safetensors`` and ``.json``; finished ones are reused.
        threads: CPU threads; 0 leaves torch's choice.
        progress: called with a label, blocks done and blocks in all.

    Returns:
        One row per linear, in forward order.

    Raises:
        UsageError: no calibration tokens, or a pattern that does not divide a linear.
    """
    if not calibration:
        raise UsageError("no calibration traces are left after selection", remedy="collect more traces")
    keep_heap()
    if threads:
        torch.set_num_threads(threads)
    walk = _Walk(checkpoint, settings, folder)
    batches = make_batches(calibration, held_out=False) + make_batches(held_out, held_out=True)
    rows: list[LinearRow] = []
    with torch.inference_mode():
        walk.embed(batches)
        for index in range(checkpoint.block_count):
            rows += walk.step(index, batches)
            if progress:
                progress("prune", index + 1, checkpoint.block_count)
    return rows


@dataclass
class _Walk:
    """State that the blocks share: skeleton, settings, and where results go."""

    checkpoint: Checkpoint
    settings: Pruning
    folder: Path

    def __post_init__(self) -> None:
        self.model = skeleton(self.checkpoint)
        expected = {name for name, _ in self.model.named_parameters()}
        check_names(self.checkpoint, expected - {"lm_head.weight"} if self.checkpoint.tied else expected)
        self.pattern = pattern_of(self.settings.sparsity, self.settings.kept_of)
        self.method = plugins.load("methods", self.settings.method)

    def embed(self, batches: Sequence[Batch]) -> None:
        """Fill the hidden states with the token embeddings."""
        fill_parameter(self.model, "model.embed_tokens.weight", self.checkpoint)
        embedding = self.model.get_submodule("model.embed_tokens")
        for batch in batches:
            batch.hidden_BTD = embedding(batch.ids_BT)
        embedding.to("meta")

    def step(self, index: int, batches: Sequence[Batch]) -> list[LinearRow]:
        """Prune one block, or read it if it is already on disk, and advance the hidden states."""
        prefix = f"{self.checkpoint.family.blocks}.{index}"
        block = self.model.get_submodule(prefix)
        for name, _ in block.named_parameters():
            fill_parameter(self.model, f"{prefix}.{name}", self.checkpoint)
        stem = self.folder / f"block-{index:05d}"
        weights, report = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
        if report.is_file():
            rows = [LinearRow.model_validate(row) for row in read_json(report)["linears"]]
        else:
            rows = self._prune(prefix, block, batches, weights)
            text = json.dumps({"linears": [row.model_dump() for row in rows]}, indent=1)
            write_atomic(report, text)
        self._replace(prefix, weights)
        for batch in batches:
            batch.hidden_BTD = self._forward(block, batch)
        block.to("meta")
        return rows

    def _prune(self, prefix: str, block: nn.Module, batches: Sequence[Batch], weights: Path) -> list[LinearRow]:
        statistics = self._gather(block, batches)
        rows, pruned = [], {}
        for group, statistic in zip(self.checkpoint.family.input_groups, statistics, strict=True):
            for linear in group:
                name = f"{prefix}.{linear}"
                if any(re.search(pattern, name) for pattern in self.settings.dense):
                    rows.append(_dense_row(name))
                    continue
                row, value = self._prune_linear(name, block.get_submodule(linear), statistic)
                rows.append(row)
                pruned[f"{name}.weight"] = value
        write_atomic(weights, save(pruned))
        return rows

    def _gather(self, block: nn.Module, batches: Sequence[Batch]) -> list[InputStatistic]:
        groups = self.checkpoint.family.input_groups
        firsts = [block.get_submodule(group[0]) for group in groups]
        statistics = [InputStatistic(module.get_parameter("weight").shape[1]) for module in firsts]
        for batch in batches:
            with _observe(firsts, statistics, batch):
                self._forward(block, batch)
        return statistics

    def _prune_linear(self, name: str, module: nn.Module, statistic: InputStatistic) -> tuple[LinearRow, torch.Tensor]:
        before_OI = module.get_parameter("weight").detach().float()
        self.pattern.check(name, before_OI.shape[1])
        result = self.method.prune(before_OI.clone(), statistic.calibration_II(), self.pattern, self.settings)
        stored = result.weight_OI.to(TORCH_DTYPES[self.checkpoint.entries[f"{name}.weight"].dtype])
        errors = statistic.relative_errors(before_OI, stored.float())
        row = LinearRow(
            name=name,
            sparsity_asked=self.settings.sparsity,
            sparsity_reached=float((stored == 0).float().mean()),
            error={stream: errors[stream] for stream in STREAMS if stream in errors},
            held_out_error=errors.get("held_out"),
            damping=result.damping,
        )
        return row, stored.contiguous()

    def _replace(self, prefix: str, weights: Path) -> None:
        """Put the stored weights, rounded to the file's dtype, in place of the dense ones."""
        for name, value in load_file(weights).items():
            assert name.startswith(prefix), f"{weights} holds {name}"
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            module.register_parameter(leaf, nn.Parameter(value.float(), requires_grad=False))

    def _forward(self, block: nn.Module, batch: Batch) -> torch.Tensor:
        hidden_BTD = batch.hidden_BTD
        assert hidden_BTD is not None, "embed() comes first"
        position_1T = torch.arange(hidden_BTD.shape[1])[None]
        rotary = self.model.get_submodule("model.rotary_emb")
        output = block(
            hidden_BTD,
            attention_mask=None,  # sdpa: causal
            position_ids=position_1T,
            position_embeddings=rotary(hidden_BTD, position_1T),
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


@contextmanager
def _observe(modules: Sequence[nn.Module], statistics: Sequence[InputStatistic], batch: Batch) -> Iterator[None]:
    """Add the input of each module to its statistic while the body runs."""

    def observer(statistic: InputStatistic) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def observe(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            statistic.add(inputs[0], batch.stream_BT, batch.held_out)

        return observe

    handles = [
        module.register_forward_pre_hook(observer(statistic))
        for module, statistic in zip(modules, statistics, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dense_row(name: str) -> LinearRow:
    return LinearRow(
        name=name,
        sparsity_asked=0.0,
        sparsity_reached=0.0,
        error={},
        held_out_error=None,
        damping=0.0,
    )
