"""Per-layer inputs of Gemma 3n and Gemma 4, computed from a batch's token ids.

They add a second embedding of the tokens and a projection of the first, over √2. Of both tables
only the rows and columns that one block needs are read.
Source: transformers ``Gemma4TextModel`` and ``Gemma3nTextModel``, ``project_per_layer_inputs``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from racdeploy.engines.backends.transformers.torch_model import embedding_scale
from racdeploy.models.checkpoint import Checkpoint

_EMBEDDING = "model.embed_tokens.weight"
_PER_LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
_PROJECTION = "model.per_layer_model_projection.weight"
_NORM = "model.per_layer_projection_norm.weight"


def compute_per_layer_input(
    checkpoint: Checkpoint, block: int, ids_BT: Tensor, device: torch.device
) -> Tensor:
    """Return the per-layer input of a block for a batch, (B, T, P), read from the checkpoint."""
    P = checkpoint.shape.integer("hidden_size_per_layer_input")
    columns = slice(block * P, (block + 1) * P)
    used_N, row_BT = torch.unique(ids_BT, return_inverse=True)
    ids = used_N.numpy()

    embedded_ND = torch.from_numpy(checkpoint.read_rows(_EMBEDDING, ids)).to(device)
    projected_NP = _project(checkpoint, embedded_ND, columns)

    is_in_table = ids < checkpoint.entries[_PER_LAYER_EMBEDDING].shape[0]
    rows = np.where(is_in_table, ids, 0)  # transformers gives ids beyond it the first row
    table_NP = checkpoint.read_rows(_PER_LAYER_EMBEDDING, rows, columns)
    looked_up_NP = torch.from_numpy(table_NP).to(device)

    per_layer_NP = (projected_NP + looked_up_NP * P**0.5) * 2**-0.5
    per_layer_BTP: Tensor = per_layer_NP[row_BT.to(device)]
    return per_layer_BTP


def _project(checkpoint: Checkpoint, embedded_ND: Tensor, columns: slice) -> Tensor:
    """Return the normed projection of embeddings to the per-layer inputs of one block."""
    device = embedded_ND.device
    D = embedded_ND.shape[1]
    outputs = np.arange(columns.start, columns.stop)
    projection_PD = torch.from_numpy(checkpoint.read_rows(_PROJECTION, outputs)).to(device)
    scaled_ND = embedded_ND * embedding_scale(checkpoint.shape)
    projected_NP = scaled_ND @ projection_PD.T * D**-0.5

    weight_P = torch.from_numpy(checkpoint.read(_NORM)).to(device)
    eps = float(checkpoint.config["rms_norm_eps"])
    square_N1 = projected_NP.square().mean(-1, keepdim=True) + eps
    normed_NP: Tensor = projected_NP * square_N1.pow(-0.5) * weight_P
    return normed_NP
