"""Bad input: an exit code, one line on what is wrong, one on what to do, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from racdeploy.cli.app import app
from tests.support.commands import find_error_code
from tests.support.tiny_models import edit_json, make_checkpoint

Change = Callable[[Path], object]


def _run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "qwen2")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


MODELS: dict[str, tuple[Change, str, str]] = {
    "not a model folder": (
        lambda f: (f / "config.json").unlink(),
        "no-config",
        "config.json",
    ),
    "unsupported architecture": (
        lambda f: edit_json(f / "config.json", model_type="mamba"),
        "unknown-family",
        "'mamba'",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "no-tokenizer",
        "tokenizer.json",
    ),
    "no template": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template=None),
        "no-chat-template",
        "model",
    ),
    "truncated weights": (_truncate, "damaged-safetensors", "model.safetensors"),
    "missing weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "no-weights",
        "model.safetensors",
    ),
    "weights in a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pickled-weights",
        "pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_bad_model_is_named(model: Path, tmp_path: Path, case: str) -> None:
    """Exit code 2, the reason, and no bundle."""
    change, error, named = MODELS[case]
    change(model)
    code, output = _run("build", model, "--work", tmp_path / "work", "--out", tmp_path / "bundle")
    assert (code, find_error_code(output)) == (2, error), output
    assert named in output
    assert "→" in output, "the remedy is missing"
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "work").exists()


OPTIONS: dict[str, tuple[list[str], str, str]] = {
    "sparsity of 1": (["--sparsity", "1"], "invalid-settings", "got '1'"),
    "negative sparsity": (["--sparsity", "-0.5"], "invalid-settings", "got '-0.5'"),
    "pattern that keeps all": (["--pattern", "4:4"], "invalid-settings", "got '4:4'"),
    "pattern that does not divide": (["--pattern", "3:7"], "pattern-does-not-divide", "64"),
    "contradiction": (["--pattern", "2:4", "--sparsity", "0.7"], "invalid-settings", "0.5"),
    "target that forbids it": (
        ["--target", "android-arm64", "--quant", "f16"],
        "quant-not-on-target",
        "'f16'",
    ),
    "unknown target": (
        ["--target", "androd-arm64"],
        "unknown-target",
        "did you mean 'android-arm64'",
    ),
    "unknown quant": (["--quant", "q8_1"], "unknown-plugin", "did you mean 'q8_0'"),
    "unknown task": (["--tasks", "gdc"], "unknown-plugin", "did you mean 'gcd'"),
    "task without file": (["--tasks", "jsonl"], "task-needs-file", "--tasks jsonl:FILE"),
    "task file missing": (["--tasks", "jsonl:nowhere.jsonl"], "file-unreadable", "nowhere.jsonl"),
    "recipe missing": (["--recipe", "nowhere.toml"], "missing-toml-file", "nowhere.toml"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_refused_before_any_work(model: Path, tmp_path: Path, case: str) -> None:
    """Exit code 2 and nothing on disk."""
    options, error, named = OPTIONS[case]
    code, output = _run(
        "build", model, *options, "--work", tmp_path / "work", "--out", tmp_path / "bundle"
    )
    assert (code, find_error_code(output)) == (2, error), output
    assert named in output
    assert {"model"} == {path.name for path in tmp_path.iterdir()}


def _extra_linears(folder: Path) -> None:
    file = folder / "model.safetensors"
    names = [f"mlp.adapter_{i}.weight" for i in range(10)] + [
        "self_attn.experts.7.weight",
        "extra_norm.weight",
    ]
    extra = {
        f"model.layers.{block}.{n}": torch.zeros((2,) if "norm" in n else (2, 2))
        for n in names
        for block in (0, 1)
    }
    save_file(
        load_file(file) | extra | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, file
    )


def _fused(folder: Path) -> None:
    tensors = load_file(file := folder / "model.safetensors")
    for block in (0, 1):
        parts = [
            tensors.pop(f"model.layers.{block}.self_attn.{name}_proj.weight") for name in "qkv"
        ]
        tensors[f"model.layers.{block}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    save_file(tensors, file)


@pytest.mark.parametrize("dense", [[], ["mlp.adapter", "experts", "norm", "qkv"]])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            _extra_linears,
            "25 tensors that Qwen2ForCausalLM does not have: model.layers.*.extra_norm.weight (2), "
            "model.layers.*.mlp.adapter_0.weight (2), model.layers.*.mlp.adapter_1.weight (2), ",
        ),
        (
            _fused,
            "2 tensors that Qwen2ForCausalLM does not have: "
            "model.layers.*.self_attn.qkv_proj.weight (2)",
        ),
    ],
)
def test_tensors_that_the_architecture_lacks_are_named(
    model: Path, tmp_path: Path, change: Change, named: str, dense: list[str]
) -> None:
    """All of them, briefly, before any work; no pattern of the recipe makes an engine use them."""
    change(model)
    (tmp_path / "recipe.toml").write_text(f"[prune]\nignore = {json.dumps(dense)}\n")
    for command in (["prune"], ["build", "--out", tmp_path / "bundle"]):
        code, output = _run(
            *command, model, "--recipe", tmp_path / "recipe.toml", "--work", tmp_path / "work"
        )
        assert (code, find_error_code(output)) == (2, "unknown-tensors"), output
        assert named in (told := " ".join(output.split()))
        assert ("and 5 more" in told) == (change is _extra_linears)
        assert "merge adapters" in told
        assert "dense" not in told.replace(str(tmp_path), "")
        assert not (tmp_path / "work").exists()


def test_experts_are_planned(tmp_path: Path) -> None:
    """As linears like others, which a recipe may leave alone, and as what can be cut."""
    model = make_checkpoint(tmp_path / "model", "qwen3_moe")
    found = []
    for options in (
        ["--sparsity", 0.5],
        ["--set", 'prune.ignore=["experts"]', "--sparsity", 0.5],
        ["--keep", "experts=0.5", "--sparsity", 0.5],
        [],
    ):
        code, output = _run("build", model, "--dry-run", "--json", *options)
        assert code == 0, output
        found.append(json.loads(output[output.index("{") :]))

    pruned = [(plan["linears_pruned"], plan["linears_kept_dense"]) for plan in found]
    assert pruned == [(32, 0), (8, 24), (20, 0), (0, 32)]
    whole, _, cut, proposed = found
    assert cut["keeps"].endswith(" and 50.0% of the experts (2 of 4 in each block)")
    gone = 2 * 2 * (3 * 32 * 64 + 64)  # in two blocks two experts, with their rows of the router
    assert whole["parameters"] - cut["parameters_left"] == gone
    assert cut["artifact_bytes"] < whole["artifact_bytes"]
    assert proposed["rungs"] == ["q8_0", "q6_k", "q4_k_m", "q4_k"]
    assert proposed["note"].startswith("nothing is cut, though ffn 0.75 was proposed: ")


RECIPES: dict[str, tuple[str, str, str]] = {
    "unknown key": ("[prune]\nsparsty = 0.5\n", "invalid-settings", "did you mean 'sparsity'"),
    "dense pattern that matches nothing": (
        '[prune]\nignore = ["down_prj$"]\n',
        "pattern-matches-nothing",
        "'down_prj$'",
    ),
    "dense pattern of what is no linear": (
        '[prune]\nignore = ["input_layernorm"]\n',
        "pattern-matches-nothing",
        "'input_layernorm'",
    ),
    "all dense": ('[prune]\nignore = [".*"]\n', "nothing-to-prune", "14 linears"),
    "all dense, by error": (
        '[prune]\nignore = ["attn", "mlp"]\nallocation = "error"\n',
        "nothing-to-prune",
        "14 linears",
    ),
    "all dense, with codes": (
        '[prune]\nignore = ["_proj$"]\n[export]\nrounding = "optimized"\n',
        "nothing-to-prune",
        "14 linears",
    ),
    "no room for the prompt": (
        "[verify]\ncontext_tokens = 64\nmax_new_tokens = 64\n",
        "prompt-beyond-context",
        "verify.max_new_tokens 64",
    ),
    "a task named twice": ('tasks = ["gcd", "gcd"]\n', "task-named-twice", "gcd"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe_is_refused_before_any_work(model: Path, tmp_path: Path, case: str) -> None:
    """The recipe file is checked as strictly as the options."""
    text, error, named = RECIPES[case]
    (tmp_path / "recipe.toml").write_text(text)
    options = [
        "--recipe",
        tmp_path / "recipe.toml",
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "bundle",
    ]
    code, output = _run("build", model, *options)
    assert (code, find_error_code(output)) == (2, error), output
    assert named in output
    assert not (tmp_path / "work").exists()


def test_the_model_of_a_recipe_is_used(model: Path, tmp_path: Path) -> None:
    """Without MODEL on the command line, the recipe names it."""
    (tmp_path / "recipe.toml").write_text(f'model = "{model}"\n')
    code, output = _run("build", "--recipe", tmp_path / "recipe.toml", "--dry-run", "--json")
    assert code == 0, output
    assert json.loads(output[output.index("{") :])["architecture"] == "Qwen2ForCausalLM"


def test_a_file_without_problems_for_a_split_is_refused(model: Path, tmp_path: Path) -> None:
    """One question cannot serve both splits, and nothing is verified on nothing."""
    (tmp_path / "one.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    code, output = _run(
        "build", model, "--tasks", f"jsonl:{tmp_path}/one.jsonl", "--work", tmp_path / "work"
    )
    assert (code, find_error_code(output)) == (2, "no-problems-for-split"), output


def test_files_that_share_questions_are_refused(model: Path, tmp_path: Path) -> None:
    """Calibration and evaluation never see the same question, also where a user names two files."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n')
    tasks = [
        "--tasks",
        f"jsonl:{tmp_path}/a.jsonl",
        "--calibration-tasks",
        f"jsonl:{tmp_path}/b.jsonl",
    ]
    code, output = _run("build", model, *tasks, "--work", tmp_path / "work")
    assert (code, find_error_code(output)) == (2, "shared-questions"), output


def test_a_work_folder_that_is_a_file_is_an_error(model: Path, tmp_path: Path) -> None:
    """What the disk refuses is exit code 4 with a message, not a traceback."""
    (tmp_path / "work").write_text("")
    code, output = _run("prune", model, "--work", tmp_path / "work")
    assert (code, find_error_code(output)) == (4, "write-failed"), output


def test_a_folder_that_does_not_exist_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    """A path is a path: no minutes of retries against a Hub."""
    code, output = _run("build", tmp_path / "nowhere")
    assert (code, find_error_code(output)) == (2, "no-model-folder")


def test_an_existing_folder_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    """Only a bundle is replaced by a bundle."""
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    code, output = _run("build", model, "--out", out, "--work", tmp_path / "work")
    assert (code, find_error_code(output)) == (2, "output-exists")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_error_as_json_is_one_object(model: Path) -> None:
    """A program that reads stdout gets the error there."""
    code, output = _run("build", model, "--quant", "q8_1", "--json")
    error = json.loads(output)
    assert (code, error["exit_code"], error["kind"]) == (2, 2, "UnknownPluginError")
    assert error["code"] == "unknown-plugin"
    assert error["remedy"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["verify", "nowhere"], 2),
        (["run", "nowhere", "hello"], 2),
        (["inspect", "nowhere"], 2),
        (["bild"], 2),
        (["verify", "nowhere", "--junit", "no/where.xml"], 2),
    ],
)
def test_other_commands_refuse_too(arguments: list[str], code: int) -> None:
    """What is not there is wrong usage."""
    assert _run(*arguments)[0] == code


def test_listing_commands_list(tmp_path: Path) -> None:
    """targets, plugins, doctor and init work on a fresh machine."""
    for command in ("targets", "plugins", "doctor"):
        code, output = _run(command, "--json")
        assert code == 0, output
        assert json.loads(output)
    file = tmp_path / "recipe.toml"
    assert _run("init", file)[0] == 0
    assert _run("init", file)[0] == 2
    assert file.read_text().startswith("# A racdeploy recipe")
