"""Predict a candidate's memory, and seconds per token on the device."""

from __future__ import annotations

from racdeploy.targets import Device
from racdeploy.tuning.artifact_sizes import ArtifactSize
from racdeploy.tuning.candidates import CandidateSpec
from racdeploy.tuning.entries import PredictedCost
from racdeploy.tuning.speed import predict_memory, predict_token_s


def predict_cost(device: Device, spec: CandidateSpec, size: ArtifactSize) -> PredictedCost:
    """Return the cost of a candidate; memory includes a key-value cache of full length."""
    memory_bytes = predict_memory(
        device,
        size.checkpoint.shape,
        size.plain_bytes,
        size.read_bytes,
        spec.recipe.verify.context_tokens,
        spec.job.backend,
    )
    return PredictedCost(memory_bytes, predict_token_s(device, size.read_bytes))
