"""The fine-tuning of examples/smol_reasoner, on a tiny random model."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import make_checkpoint

SCRIPT = Path(__file__).parents[2] / "examples" / "smol_reasoner" / "finetune.py"
STEPS, TOKENS_PER_STEP, RATE = 4, 1024, 1e-2


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """Return the names that the script defines."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def run(
    example: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], None]:
    """Return a function that fine-tunes a tiny Llama into a folder, with a checkpoint every second
    step.
    """
    model = make_checkpoint(tmp_path_factory.mktemp("model"), "llama")
    example["finetune"].__globals__["SAMPLED_TOKENS"] = 256  # the vocabulary is a large one
    settings = example["Settings"](str(model), STEPS, TOKENS_PER_STEP, RATE, 0)
    return lambda out: example["finetune"](settings, out, 2, example["draw_batches"])


@pytest.fixture(scope="module")
def finished(run: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without interruption."""
    out = tmp_path_factory.mktemp("finished")
    run(out)
    return out


def test_a_run_that_is_killed_and_started_again_ends_the_same(
    example: dict[str, Any],
    run: Callable[[Path], None],
    finished: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Killed within step 4, it resumes at the checkpoint of step 2, to the same bytes."""
    loss, steps = example["completion_loss"], list[int]()

    def killed(
        model: Any, ids_BT: torch.Tensor, labels_BT: torch.Tensor, seed: int
    ) -> torch.Tensor:
        steps.append(seed)
        if steps == [1, 2, 3, 4]:
            raise KeyboardInterrupt
        return loss(model, ids_BT, labels_BT, seed)

    monkeypatch.setitem(example["finetune"].__globals__, "completion_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    run(tmp_path)
    assert steps == [1, 2, 3, 4, 3, 4]
    assert (finished / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_the_model_learns_and_keeps_its_embedding(
    example: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    """Every trained weight has moved, the embedding has not."""
    from safetensors.torch import load_file

    before = load_file(make_checkpoint(tmp_path / "model", "llama") / "model.safetensors")
    after = load_file(finished / "model.safetensors")
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert {"model.embed_tokens.weight"} == same
    assert all(value.dtype == torch.bfloat16 for value in after.values())


def test_the_chat_template_opens_the_thinking(finished: Path) -> None:
    """The prompt ends as the ones that the model was trained on."""
    settings = json.loads((finished / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "<|im_start|>assistant\n<think>\n" in settings["chat_template"]


def test_a_checkpoint_of_other_settings_is_refused(example: dict[str, Any], finished: Path) -> None:
    """The message names what it was begun with."""
    other = example["Settings"]("elsewhere", STEPS, TOKENS_PER_STEP, RATE, 0)
    with pytest.raises(SystemExit, match=f"'steps': {STEPS}"):
        example["restore"](finished / "checkpoint.pt", other, [], {})
