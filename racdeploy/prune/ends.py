"""What rounding the embedding and the head changes: of the first block's output, of the logits.

Both are in the unit of a block's end, so that their bits can be weighed against those of linears.
No importance is known of them, here or in the export.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from racdeploy import quant
from racdeploy.engines.transformers.torch_model import embedding_scale
from racdeploy.prune.batches import Batch
from racdeploy.prune.beside import Beside
from racdeploy.prune.session import Session
from racdeploy.prune.statistics import PAD
from racdeploy.prune.survey import weigh_tokens
from racdeploy.prune.surveyed import Option, Stored

MOST_TOKENS = 512  # on which logits are compared
_ROWS = 4096  # of the head at a time: a vocabulary may be larger than all blocks
_HEAD = "lm_head.weight"


def list_formats(session: Session, options: Sequence[Option]) -> list[str]:
    """Return the number formats of options that an embedding can have: no zeros, no descent."""
    checkpoint = session.blocks.checkpoint
    width = checkpoint.entries[checkpoint.family.embedding].shape[1]
    names = []

    for option in options:
        is_plain = not option.sparsity and not option.joint
        if is_plain and not quant.fits(quant.load(option.quant), width):
            names.append(option.quant)

    return names


def observe_embedding(session: Session, names: Sequence[str], batch: Batch) -> dict[str, Stored]:
    """Return number format → what rounding the embedding changes of the first block's output."""
    blocks = session.blocks
    checkpoint = blocks.checkpoint
    real_BT = blocks.place(batch.stream_BT != PAD)

    used_N = torch.unique(batch.ids_BT)
    row_ND = torch.from_numpy(checkpoint.read_rows(checkpoint.family.embedding, used_N.numpy()))
    place_BT = torch.searchsorted(used_N, batch.ids_BT)

    block = blocks.load(0)
    (hidden_BTD,) = blocks.embed([batch])
    output_BTD = blocks.forward(block, hidden_BTD, beside=Beside(batch.ids_BT))
    output_ND = output_BTD[real_BT]

    found = {}

    for name in names:
        change_ND = _round(row_ND, name) - row_ND
        change_ND *= embedding_scale(checkpoint)
        given_BTD = hidden_BTD + blocks.place(change_ND[place_BT])
        changed_BTD = blocks.forward(block, given_BTD, beside=Beside(batch.ids_BT))

        changed_ND = changed_BTD[real_BT] - output_ND
        share_N = changed_ND.square().sum(1) / output_ND.square().sum(1)
        found[name] = _average(share_N, session, batch)

    block.to("meta")
    return found


def observe_head(
    session: Session, names: Sequence[str], batch: Batch, hidden_BTD: torch.Tensor
) -> dict[str, Stored]:
    """Return number format → what rounding the head changes of the logits, their mean left out.

    Args:
        batch: some of whose tokens are looked at.
        hidden_BTD: what the last block makes of it.
    """
    blocks = session.blocks
    checkpoint = blocks.checkpoint
    real_BT = blocks.place(batch.stream_BT != PAD)
    hidden_ND = blocks.last_norm()(hidden_BTD)[real_BT][:MOST_TOKENS]

    source = checkpoint.family.embedding if checkpoint.tied else _HEAD
    V, _ = checkpoint.entries[source].shape
    N = len(hidden_ND)

    energy = _Spread(N)
    changes = {name: _Spread(N) for name in names}

    for start in range(0, V, _ROWS):
        stop = min(start + _ROWS, V)
        row_MD = torch.from_numpy(checkpoint.read_rows(source, np.arange(start, stop)))
        energy.add(hidden_ND, row_MD)

        for name, change in changes.items():
            change_MD = _round(row_MD, name) - row_MD
            change.add(hidden_ND, change_MD)

    found = {}

    for name, change in changes.items():
        share_N = change.total_N / energy.total_N
        found[name] = _average(share_N, session, batch)

    return found


class _Spread:
    """The squared distance of each token's logits from their mean, which softmax does not see."""

    def __init__(self, tokens: int) -> None:
        self._square_N = torch.zeros(tokens, dtype=torch.float64)
        self._sum_N = torch.zeros(tokens, dtype=torch.float64)
        self._count = 0

    def add(self, hidden_ND: torch.Tensor, row_MD: torch.Tensor) -> None:
        """Add the logits of some candidates."""
        row_MD = row_MD.to(hidden_ND.device)
        logit_NM = hidden_ND @ row_MD.T
        logit_NM = logit_NM.double().cpu()

        self._square_N += logit_NM.square().sum(1)
        self._sum_N += logit_NM.sum(1)
        self._count += len(row_MD)

    @property
    def total_N(self) -> torch.Tensor:
        mean_N = self._sum_N / self._count
        return self._square_N - self._sum_N * mean_N


def _round(row_ND: torch.Tensor, name: str) -> torch.Tensor:
    _, D = row_ND.shape
    form = quant.load(name)
    packed_NP = form.quantize(row_ND.numpy())
    return torch.from_numpy(form.dequantize(packed_NP, D))


def _average(share_N: torch.Tensor, session: Session, batch: Batch) -> Stored:
    """Return the mean over the first tokens of a batch, as they count."""
    weight_N = weigh_tokens(session, batch)[: len(share_N)]
    weight_N = weight_N.to(share_N)
    mean = share_N @ weight_N / weight_N.sum()
    return Stored(float(mean))
