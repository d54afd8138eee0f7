"""What a file that ships contains, read back from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from racdeploy import exporting
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Export
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.shipped_model import ShippedArtifact
from racdeploy.verification.subject import Subject
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

AS_TORCH = Export(format="onnx", quant="f32", exporter="torch")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ShippedArtifact:
    root = tmp_path_factory.mktemp("exported")
    checkpoint = Checkpoint(make_checkpoint(root / "m", "qwen3"))
    result = exporting.write(checkpoint, root / "model.onnx", AS_TORCH)
    subject = Subject(
        backend="onnxruntime",
        path=result.path,
        files=result.files,
        encoder=PromptEncoder.from_folder(checkpoint.folder),
        tags=None,
        stop_ids=checkpoint.eos_ids,
    )
    return ShippedArtifact(
        subject=subject, family=checkpoint.family, format="onnx", packing="plain"
    )


def add_constant(
    artifact: ShippedArtifact, folder: Path, constant: onnx.TensorProto
) -> ShippedArtifact:
    """Return the artifact with one more initializer in its graph."""
    model = onnx.load(str(artifact.subject.path))
    model.graph.initializer.append(constant)
    onnx.save(model, str(folder / "model.onnx"))
    subject = replace(artifact.subject, path=folder / "model.onnx")
    return replace(artifact, subject=subject)


def test_integers_of_an_exporter_are_no_weights(exported: ShippedArtifact, tmp_path: Path) -> None:
    """Axes and shapes of the exporter: a build was refused because of them."""
    axis = onnx.helper.make_tensor("axis", onnx.TensorProto.INT64, [1], [2])
    content = add_constant(exported, tmp_path, axis).content
    names = {row.name for row in content.tensors}
    assert "axis" not in names
    assert content.prunable < names


def test_weights_in_an_unknown_type_are_refused(exported: ShippedArtifact, tmp_path: Path) -> None:
    weights = onnx.helper.make_tensor("weights", onnx.TensorProto.UINT8, [2], [1, 2])
    with raises("unreadable-tensor-type"):
        _ = add_constant(exported, tmp_path, weights).content
