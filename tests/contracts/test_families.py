"""What every family promises, against transformers' own modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy import families, plugins
from racdeploy.backends._torch_model import skeleton
from racdeploy.checkpoint import Checkpoint
from racdeploy.errors import ModelError
from tests.tiny_models import make_checkpoint


@pytest.fixture(params=plugins.names("families"))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path / "model", request.param, tied=False))


def test_every_tensor_has_a_gguf_name(checkpoint: Checkpoint) -> None:
    """The two tables cover the checkpoint without a rest."""
    family = checkpoint.family
    for name in checkpoint.entries:
        inside = name.removeprefix(f"{family.blocks}.")
        known = inside.partition(".")[2] in family.block_tensors if inside != name else name in family.model_tensors
        assert known, name


def test_linears_are_exactly_the_blocks_linear_modules(checkpoint: Checkpoint) -> None:
    """No linear of a block slips past the table, and none is invented."""
    from torch import nn

    block = skeleton(checkpoint).get_submodule(f"{checkpoint.family.blocks}.0")
    found = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert found == set(checkpoint.family.linears)


def test_linears_of_a_group_share_their_width(checkpoint: Checkpoint) -> None:
    """One statistic serves a group, so its linears take the same input."""
    for group in checkpoint.family.input_groups:
        widths = {checkpoint.entries[f"{checkpoint.family.blocks}.0.{name}.weight"].shape[1] for name in group}
        assert len(widths) == 1, group


def test_an_unsupported_architecture_is_named() -> None:
    """The message says what it is and what would work."""
    with pytest.raises(ModelError, match=r"'mamba' \(MambaForCausalLM\)") as caught:
        families.family_of({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    assert "qwen3" in caught.value.remedy
