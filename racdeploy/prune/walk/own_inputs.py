"""The input that each block of some families has of its own, made of a batch's token ids.

Half is a second embedding of the tokens, half a projection of the first; of both tables only what
one block takes is read. Source: transformers ``Gemma4TextModel`` and ``Gemma3nTextModel``,
``project_per_layer_inputs``.
"""

from __future__ import annotations

import numpy as np
import torch

from racdeploy.engines.backends.transformers.torch_model import embedding_scale
from racdeploy.models.checkpoint import Checkpoint

_EMBEDDING = "model.embed_tokens.weight"
_OWN_EMBEDDING = "model.embed_tokens_per_layer.weight"
_PROJECTION = "model.per_layer_model_projection.weight"
_NORM = "model.per_layer_projection_norm.weight"


class OwnInputs:
    """The inputs of all blocks; nothing stays in memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._width = checkpoint.shape.integer("hidden_size_per_layer_input")

    @staticmethod
    def exist(checkpoint: Checkpoint) -> bool:
        """Return whether blocks of a model have such inputs."""
        return _OWN_EMBEDDING in checkpoint.family.model_tensors

    def of(self, block: int, ids_BT: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return what a block gets beside the hidden states of a batch, (B, T, P)."""
        checkpoint = self._checkpoint
        P = self._width
        own = slice(block * P, (block + 1) * P)
        used_N, place_BT = torch.unique(ids_BT, return_inverse=True)
        rows = used_N.numpy()

        embedded_ND = torch.from_numpy(checkpoint.read_rows(_EMBEDDING, rows)).to(device)
        D = embedded_ND.shape[1]
        projection_PD = torch.from_numpy(
            checkpoint.read_rows(_PROJECTION, np.arange(own.start, own.stop))
        ).to(device)
        scaled_ND = embedded_ND * embedding_scale(checkpoint.shape)
        projected_NP = scaled_ND @ projection_PD.T * D**-0.5

        weight_P = torch.from_numpy(checkpoint.read(_NORM)).to(device)
        eps = float(checkpoint.config["rms_norm_eps"])
        square_N1 = projected_NP.square().mean(-1, keepdim=True) + eps
        normed_NP = projected_NP * square_N1.pow(-0.5) * weight_P

        known = rows < checkpoint.entries[_OWN_EMBEDDING].shape[0]
        rows = np.where(known, rows, 0)  # transformers gives tokens without one that of the first
        looked_up_NP = torch.from_numpy(checkpoint.read_rows(_OWN_EMBEDDING, rows, own)).to(device)
        own_NP = (normed_NP + looked_up_NP * P**0.5) * 2**-0.5
        own_BTP: torch.Tensor = own_NP[place_BT.to(device)]
        return own_BTP
