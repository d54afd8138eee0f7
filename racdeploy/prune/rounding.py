"""Choose the codes of a number format while pruning compensates: the exporter then writes those very codes.

Starts from rounded weights and visits one column after the other: each weight moves to the grid point that is best
while all others stay, so the layer-wise error falls with every step. Scales stay as they are, and so does the weight of
each block that made its scale: quantizing the result again gives the same scale and the same codes. Knows of a format
what :class:`racdeploy.quant.Grid` says, and no file's layout.
Source: QuantEase (arXiv 2309.01885), on a mask.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from racdeploy.prune.hessian import Hessian
from racdeploy.quant import Grid

__all__ = ["round_to_grid"]

SWEEPS, COLUMNS = 8, 128


def round_to_grid(
    weight_OI: torch.Tensor, keep_OI: torch.Tensor, target_OI: torch.Tensor, hessian: Hessian, quant: Grid
) -> torch.Tensor:
    """Return weights that ``quant`` stores exactly, zero off the mask.

    Args:
        weight_OI: pruned weights in float32.
        keep_OI: the mask.
        target_OI: weights before pruning.
        hessian: of the input.
        quant: a number format whose codes are whole multiples of a block's scale.
    """
    device, I = weight_OI.device, weight_OI.shape[1]
    settled_OI, step_OB = _settle((weight_OI * keep_OI).cpu().numpy(), quant)
    rounded_OI = torch.from_numpy(settled_OI.copy()).to(device)
    step_OI = torch.from_numpy(step_OB).to(device).repeat_interleave(quant.BLOCK, dim=1)
    free_OI = keep_OI & (step_OI != 0) & ~_extreme(rounded_OI, quant.BLOCK)
    step_OI = torch.where(step_OI == 0, 1.0, step_OI)
    low, high = quant.CODES
    H_II = hessian.matrix_II
    pull_OI = (target_OI - rounded_OI) @ H_II
    for _ in range(SWEEPS):
        moved = 0
        for start in range(0, I, COLUMNS):
            stop = min(start + COLUMNS, I)
            change_OC = torch.zeros_like(rounded_OI[:, start:stop])
            for column in range(start, stop):
                best_O = rounded_OI[:, column] + pull_OI[:, column] / H_II[column, column]
                code_O = (best_O / step_OI[:, column]).round_().clamp_(low, high)
                change_O = (code_O * step_OI[:, column] - rounded_OI[:, column]) * free_OI[:, column]
                rounded_OI[:, column] += change_O
                pull_OI[:, start:stop] -= torch.outer(change_O, H_II[column, start:stop])
                change_OC[:, column - start] = change_O
            moved += int((change_OC != 0).sum())
            pull_OI[:, :start] -= change_OC @ H_II[start:stop, :start]
            pull_OI[:, stop:] -= change_OC @ H_II[start:stop, stop:]
        if not moved:
            break
    return rounded_OI


def _settle(weight_OI: NDArray[np.float32], quant: Grid) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weights that quantizing does not change, and step_OB, the scales of their blocks.

    Once is enough but for weights so small that half precision has few digits for their scale. There the scale may
    shrink with every turn, and never grows.
    """
    while True:
        packed_OP = quant.quantize(weight_OI)
        settled_OI = quant.dequantize(packed_OP, weight_OI.shape[1])
        if np.array_equal(settled_OI, weight_OI, equal_nan=True):
            return settled_OI, quant.steps(packed_OP)
        weight_OI = settled_OI


def _extreme(weight_OI: torch.Tensor, block: int) -> torch.Tensor:
    """Return True at the first weight of largest magnitude of each block: the one its scale comes from."""
    O, I = weight_OI.shape
    blocks_OBK = weight_OI.view(O, I // block, block)
    mask_OBK = torch.zeros_like(blocks_OBK, dtype=torch.bool)
    return mask_OBK.scatter_(2, blocks_OBK.abs().argmax(2, keepdim=True), True).view(O, I)
