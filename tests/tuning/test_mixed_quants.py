"""A mix of two number formats uses the bytes that a limit leaves, and its file keeps the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from racdeploy.pipeline.artifact_sizes import SizePredictor
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.tuning.candidates import CandidateSpec, make_spec
from racdeploy.tuning.mixed_quants import propose_mixed_quant


def make_dense(quant: str, **tune: Any) -> CandidateSpec:
    """Return the embedded model, with nothing pruned."""
    job = Job(Recipe.combine(None, {"tune": tune}))
    return make_spec(job, quant, "dense", {"export": {"quant": quant}})


@pytest.mark.parametrize("spare_bytes", [5_000, 60_000, 200_000])
def test_a_mix_uses_the_bytes_there_are(spare_bytes: int, tmp_path: Path) -> None:
    """The most sensitive linears get more bits, and codes are chosen as before."""
    sizes = SizePredictor(tmp_path)
    plain = make_dense("q4_0")
    size = sizes.predict(plain.job)
    most = size.size_bytes + spare_bytes

    mix = propose_mixed_quant(plain, size, most)
    assert mix
    filled = sizes.predict(mix.job).size_bytes
    assert size.size_bytes < filled <= most
    assert mix.job.rounding_quants.keys() == plain.job.rounding_quants.keys()
    first, *others = mix.recipe.export.tensors
    assert "attn_v" in first
    assert bool(others) == (spare_bytes > 5_000)


def test_there_is_no_mix_without_room_or_names_of_tensors(tmp_path: Path) -> None:
    """No spare bytes; a packed file, whose size is only expected."""
    plain = make_dense("q4_0")
    size = SizePredictor(tmp_path).predict(plain.job)
    assert propose_mixed_quant(plain, size, size.size_bytes + 600) is None

    packed = make_spec(
        plain.job,
        "zeros",
        "50% zeros",
        {"prune": {"sparsity": 0.5}, "export": {"quant": "q4_0", "packing": "bitmask"}},
    )
    assert propose_mixed_quant(packed, size, 2 * size.size_bytes) is None


def test_a_mix_has_formats_that_are_tried_alone(tmp_path: Path) -> None:
    """Those that the recipe names, or the target takes."""
    plain = make_dense("q4_0", quants=("q4_0", "q8_0"))
    size = SizePredictor(tmp_path).predict(plain.job)
    mix = propose_mixed_quant(plain, size, size.size_bytes + 300_000)
    assert mix
    assert set(mix.recipe.export.tensors.values()) == {"q8_0"}
