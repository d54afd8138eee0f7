"""What every family promises, against transformers' own modules."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import build_skeleton
from racdeploy.errors import ModelError
from racdeploy.exporting import gguf
from racdeploy.models import families, family_parts
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.family_lookup import NearestFamily, find_family
from racdeploy.models.family_support import compare_folder
from racdeploy.models.tensor_coverage import check_known_tensors
from tests.support.block_outputs import take_states
from tests.support.errors import raises
from tests.support.tiny_models import FAMILIES, edit_json, make_checkpoint


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path / "model", request.param, tied=False))


def test_the_core_of_a_family_has_no_field_that_one_family_alone_needs() -> None:
    """Such a field belongs in a part, where the other families' files need not know it."""
    plain = families.Family("", "")
    core = []
    for field in fields(plain):
        if str(field.type).removesuffix(" | None") not in vars(family_parts):
            core.append(field.name)

    users = dict.fromkeys(core, 0)
    for name in plugins.list_names("families"):
        family = plugins.load("families", name).FAMILY
        for field_name in core:
            users[field_name] += getattr(family, field_name) != getattr(plain, field_name)

    assert {field_name: count for field_name, count in users.items() if count < 2} == {}


def test_every_tensor_has_a_gguf_name(checkpoint: Checkpoint) -> None:
    """The two tables cover the checkpoint without a rest."""
    family = checkpoint.family
    for name in map(_general, checkpoint.entries):
        inside = name.removeprefix(f"{family.blocks}.")
        known = (
            inside.partition(".")[2] in family.block_tensors
            if inside != name
            else name in family.model_tensors
        )
        assert known, name


def test_a_setting_without_a_value_is_no_crash(checkpoint: Checkpoint) -> None:
    """Any may be null: it is as if it were missing, or the model is refused by a message."""
    family = checkpoint.family
    for key in {*checkpoint.config, *family.defaults}:
        with suppress(ModelError):
            family.find_block_settings(family.complete_config({**checkpoint.config, key: None}))


@pytest.mark.parametrize("value", ["many", 1.5, 1 << 40, [3]])
def test_a_key_of_one_family_alone_has_the_type_of_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    """A family with a new key needs no second file: another type or size is refused as damaged."""
    module = plugins.load("families", "qwen3")
    defaults = {**module.FAMILY.defaults, "new_width": 8}
    monkeypatch.setattr(module, "FAMILY", replace(module.FAMILY, defaults=defaults))
    folder = make_checkpoint(tmp_path / "model", "qwen3")

    edit_json(folder / "config.json", new_width=12)
    assert Checkpoint(folder).config["new_width"] == 12
    edit_json(folder / "config.json", new_width=value)
    with raises("damaged-config", "new_width", "a whole number from 0"):
        Checkpoint(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "rope_parameters.sliding_attention"])
def test_a_null_that_a_family_counts_with_is_named(key: str) -> None:
    """Whichever transformers is installed."""
    family = find_family({"model_type": "gemma4_text"})
    setting, _, inside = key.partition(".")
    config = {**family.defaults, "model_type": "gemma4_text"}
    config[setting] = {inside: None} if inside else None

    with raises("damaged-config", "gemma4_text"):
        family.complete_config(config)


def test_linears_are_exactly_the_blocks_linear_modules(checkpoint: Checkpoint) -> None:
    """No matrix of a block slips past the table, and none is invented."""
    family = checkpoint.family
    found = {
        _general(name).removesuffix(".weight")
        for name, parameter in build_skeleton(checkpoint)
        .get_submodule(family.blocks)
        .named_parameters()
        if parameter.ndim == 2
    }
    found = {name.partition(".")[2] for name in found}
    assert found == {*family.linears, *family.never_pruned}


def test_the_linears_of_a_file_are_those_that_pruning_may_change(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A build knows them by their names in the checkpoint, a bundle by those in its file."""
    result = gguf.export(checkpoint, tmp_path / "model.gguf", quant="f16")
    prunable = set(map(families.generalize_expert, checkpoint.shape.prunable_weights))
    pruned = {tensor.name for tensor in result.tensors if tensor.source in prunable}
    assert gguf.list_linears(checkpoint.family, *gguf.measure(result.path)) == pruned


def test_the_last_linears_of_attention_and_feed_forward_end_their_part(
    checkpoint: Checkpoint,
) -> None:
    """What ends a part gives as many values as a block passes on, and each part has one such
    end.
    """
    family = checkpoint.family
    places = set()
    for block in range(checkpoint.shape.block_count):
        groups = checkpoint.shape.input_groups[block]
        parts = {linear.partition(".")[0] for linear in checkpoint.shape.linears[block]}
        numbered = enumerate(groups)
        ends = {n: each for n, each in numbered if families.ends_part(groups, n)}
        assert len(parts) == len(ends)
        places.add(tuple(ends))

        for (linear,) in ends.values():
            one = linear.replace("*", "0")
            outputs, _ = checkpoint.entries[f"{family.blocks}.{block}.{one}.weight"].shape
            assert checkpoint.shape.hidden_size == outputs, linear

    assert len(places) == 1, "what is kept of a batch between passes is found by its place"


def test_a_part_may_have_any_number_of_groups() -> None:
    """The end of a part follows from its linears, not from how many groups come before it."""
    groups = (
        ("self_attn.q_proj",),
        ("self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.up_proj",),
        ("mlp.down_proj",),
    )
    ends = [families.ends_part(groups, group) for group in range(5)]
    assert ends == [False, False, True, False, True]


def test_defaults_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    """A key that config.json leaves out means what transformers takes for it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(checkpoint.config["model_type"])
    usual = _flatten(config)
    defaults = checkpoint.family.defaults
    assert {key: usual[key] for key in defaults} == defaults
    without = {
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "sliding_window": None,
    }
    if config.model_type == "olmo3":  # the two releases differ, and every file says it
        without["rope_theta"] = usual["rope_theta"]

    silent = {key: usual.get(key) for key in without if key not in defaults}
    assert {
        key: value for key, value in silent.items() if value is not None and value != without[key]
    } == {}


def _flatten(config: Any) -> dict[str, Any]:
    """Return a config's settings with the thetas beside the others, as transformers 4 has them."""
    settings: dict[str, Any] = config.to_dict()
    rope = settings.get("rope_parameters") or {}
    if "sliding_attention" in rope:
        settings["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    moved = ("rope_theta", "partial_rotary_factor")
    return settings | {key: rope[key] for key in moved if key in rope}


def test_the_walk_computes_the_model(checkpoint: Checkpoint) -> None:
    """Embedding and blocks, run one by one as pruning does, give the hidden states of the whole
    model.

    At more tokens than a sliding window has. Both compute in float32 with the same kernels.
    """
    import torch

    from racdeploy.engines.backends.transformers.torch_model import load_model
    from racdeploy.pruning.walk.batches import Batch
    from racdeploy.pruning.walk.block_inputs import BlockInputs
    from racdeploy.pruning.walk.blockwise_model import BlockwiseModel

    ids_BT = torch.randint(0, 480, (2, 60), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids_BT, torch.zeros_like(ids_BT), torch.zeros(2, dtype=torch.long), False)
    blocks, block_inputs = BlockwiseModel(checkpoint), BlockInputs(ids_BT)
    with torch.inference_mode():
        states = load_model(checkpoint)(input_ids=ids_BT, output_hidden_states=True).hidden_states
        (hidden_BTD,) = blocks.embed([batch])
        for index in range(checkpoint.shape.block_count):
            state_BTD = take_states(states[index])
            torch.testing.assert_close(hidden_BTD, state_BTD, rtol=1e-5, atol=1e-5)
            hidden_BTD = blocks.forward(
                blocks.load_block(index), hidden_BTD, block_inputs=block_inputs
            )


def test_linears_of_a_group_share_their_width(checkpoint: Checkpoint) -> None:
    """One statistic serves a group, so its linears take the same input."""
    for block in range(checkpoint.shape.block_count):
        prefix = f"{checkpoint.family.blocks}.{block}"
        for group in checkpoint.shape.input_groups[block]:
            names = families.expand_experts(group, checkpoint.shape.num_experts)
            widths = {checkpoint.entries[f"{prefix}.{name}.weight"].shape[1] for name in names}
            assert len(widths) == 1, group


def test_tensors_of_nobody_are_named(checkpoint: Checkpoint) -> None:
    """Those of an expert beyond the last one, too, which a stack would leave out in silence."""
    check_known_tensors(checkpoint)
    family, entries = checkpoint.family, dict(checkpoint.entries)
    surplus = f"{family.blocks}.0.mlp.experts.{checkpoint.shape.num_experts}.up_proj.weight"
    checkpoint.__dict__["entries"] = entries | {surplus: entries[family.embedding]}
    with raises("unknown-tensors", surplus):
        check_known_tensors(checkpoint)


def _general(name: str) -> str:
    """Return a name with ``*`` for the number of an expert."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def test_an_unsupported_architecture_is_named() -> None:
    """The message says what it is and what would work."""
    with raises("unknown-family", "'mamba' (MambaForCausalLM)", "racdeploy families"):
        find_family({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})


@pytest.mark.parametrize("name", plugins.list_names("families"))
def test_transformers_has_the_family_since_it_says(name: str) -> None:
    """The first release that knows it is the one that an older one's user is told of.

    Gemma 3n's text model is older: without a cache, blocks made keys of their own in it.
    """
    import transformers
    from packaging.version import Version

    since = Version(plugins.load("families", name).FAMILY.min_transformers)
    is_known = name in transformers.CONFIG_MAPPING
    if name == "gemma3n_text" and Version(transformers.__version__) < since:
        is_known = False
    assert (Version(transformers.__version__) >= since) == is_known


def test_the_nearest_family_and_what_differs_are_named(checkpoint: Checkpoint) -> None:
    """A relative of a family, with one more setting, is told so."""
    model_type = checkpoint.config["model_type"]
    changes = {"model_type": f"{model_type}x", "new_thing": 3}
    nearest = f" {model_type},"
    with raises("unknown-family", nearest, "new_thing", f"models/families/{model_type}x.py"):
        find_family(checkpoint.raw_config | changes)

    edit_json(checkpoint.folder / "config.json", **changes)
    compared = compare_folder(checkpoint.folder)
    settings = compared.unknown_settings
    assert "new_thing" in settings
    assert compared == NearestFamily(model_type, settings, [], [])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in plugins.list_names("families")
        if plugins.load("families", name).FAMILY.per_block_arch
    ],
)
def test_the_architecture_for_different_widths_has_the_tensors(name: str) -> None:
    """gguf-py knows the architecture, and every tensor that the family has there."""
    import gguf

    family = plugins.load("families", name).FAMILY.with_per_block_arch()
    (arch,) = [each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == family.gguf_arch]
    kinds = gguf.MODEL_TENSORS[arch]
    known = {gguf.TENSOR_NAMES[kind].removeprefix("blk.{bid}.") for kind in kinds}

    parts = [tensor for tensor in family.block_tensors if not tensor.endswith(".bias")]
    assert {family.block_tensors[part].removesuffix(".weight") for part in parts} <= known
    assert {stored.removesuffix(".weight") for stored in family.biases} <= known
    assert set(family.transforms) <= set(family.block_tensors)


def test_a_model_that_the_installed_transformers_is_too_old_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known to us, so what to install is said, and not that the file is damaged."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3"))
    monkeypatch.setattr(families, "installed_release", lambda name: (4, 50, 3))
    with raises("old-transformers", "Qwen3ForCausalLM", "transformers 4.51"):
        build_skeleton(checkpoint)


def test_llama_cpp_still_lacks_lfm3() -> None:
    """Where this fails, llama.cpp can compute it: write the family, and remove this test."""
    found = find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None
    library = Path(found.origin).parent / "lib" / "libllama.so"
    names = library.read_bytes().split(b"\0")
    assert b"lfm2moe" in names, "names are found as they are stored"
    assert b"lfm3" not in names
