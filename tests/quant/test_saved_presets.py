"""Presets that a user keeps: their content counts, shipped names win, bad files are errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy import plugins
from racdeploy.cli.app import app
from racdeploy.errors import UnknownPluginError, UsageError
from racdeploy.quant import saved_presets
from racdeploy.quant.saved_presets import SavedPreset
from racdeploy.recipe import Recipe
from racdeploy.report.tuning_files import write_tuning
from tests.support.fake_bundle import make_fake_bundle
from tests.support.sample_report import HOSTILE
from tests.support.sample_tuning import build_tuning

PATTERN = r'attn_v\.weight$|"quoted" \ü'
MIX = SavedPreset(why="a test", quant="q4_0", tensors={PATTERN: "q5_0", "ffn_down": "q8_0"})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets that is not there yet."""
    place = tmp_path / "config" / "presets"
    monkeypatch.setenv(saved_presets.FOLDER_VARIABLE, str(place))
    return place


def ask(quant: str, **export: object) -> Recipe:
    return Recipe.combine(None, {"export": {"quant": quant, **export}})


def test_a_preset_is_read_as_it_was_written(folder: Path) -> None:
    """Order, quotes and backslashes of patterns included; names are folded as quants are."""
    assert saved_presets.names() == ()
    assert saved_presets.save("My-Mix", MIX) == folder / "my_mix.toml"
    assert saved_presets.names() == ("my_mix",)
    found = saved_presets.read("my_mix")
    assert found == MIX
    assert list(found.tensors) == [PATTERN, "ffn_down"]


def test_the_recipe_has_the_content_and_not_the_name(folder: Path) -> None:
    """So stages are addressed by it, and a bundle needs no file on another machine."""
    saved_presets.save("my-mix", MIX)
    recipe = ask("my-mix")
    assert recipe == ask("q4_0", tensors=MIX.tensors)
    assert "my_mix" not in recipe.model_dump_json()

    changed = MIX.model_copy(update={"tensors": {PATTERN: "q6_k"}})
    saved_presets.save("my-mix", changed, replace=True)
    assert ask("my-mix") != recipe

    (folder / "my_mix.toml").unlink()
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    with pytest.raises(UnknownPluginError):
        ask("my-mix")


def test_patterns_of_the_recipe_come_first() -> None:
    """The first that matches wins; one that is in both is the recipe's."""
    saved_presets.save("my_mix", MIX)
    recipe = ask("MY-MIX", tensors={"attn": "f16", "ffn_down": "q6_k"})
    assert list(recipe.export.tensors.items()) == [
        ("attn", "f16"),
        ("ffn_down", "q6_k"),
        (PATTERN, "q5_0"),
    ]


def test_another_target_takes_a_preset_as_well(tmp_path: Path) -> None:
    """A target's file names one as it names any quant."""
    saved_presets.save("my_mix", MIX)
    file = tmp_path / "mine.toml"
    file.write_text('why = "mine"\nquant = "my-mix"\nmemory_limit_bytes = 1000000000\n')
    assert ask("q8_0").at(str(file)).export.tensors == MIX.tensors
    assert Recipe.combine(None, {"target": str(file)}).export.tensors == MIX.tensors


def test_graphs_have_other_names_than_gguf_files() -> None:
    """Patterns that would name nothing are refused; a preset without any is a quant."""
    saved_presets.save("my_mix", MIX)
    with pytest.raises(UsageError, match="names tensors of GGUF files"):
        ask("my_mix", format="onnx")

    saved_presets.save("eight", SavedPreset(quant="matmulnbits_8"))
    assert saved_presets.resolve({"quant": "eight", "format": "onnx"})["quant"] == "matmulnbits_8"


@pytest.mark.parametrize("name", [*plugins.names("presets")[:2], "Q4-0", "q8_0"])
def test_shipped_names_cannot_be_taken(name: str, folder: Path) -> None:
    """Neither by saving, nor by a file that lies there."""
    with pytest.raises(UsageError, match="ships with racdeploy"):
        saved_presets.save(name, MIX, replace=True)

    folder.mkdir(parents=True)
    (folder / f"{saved_presets.fold(name)}.toml").write_text('quant = "f32"\n')
    assert saved_presets.names() == ()
    assert saved_presets.resolve({"quant": name}) == {"quant": name}


@pytest.mark.parametrize("name", ["", "../up", "a/b", "1st", "a" * 65, ".hidden", "a b", "nul\0"])
def test_a_name_is_one_that_a_file_can_have(name: str, folder: Path) -> None:
    with pytest.raises(UsageError):
        saved_presets.save(name, MIX)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('quant = "q4_9"', "did you mean"),
        ('quant = "q4_0"\nquants = 1', "unknown key 'quants'"),
        ('[tensors]\n"a" = "q4_0"', "quant"),
        ('quant = "q4_0"\n[tensors]\n"(" = "q4_0"', "not a regular expression"),
        ('quant = "q4_0"\n[tensors]\n"a" = "q4_k_m"', "unknown quant 'q4_k_m'"),
        ('quant = "q4_0"\n[tensors]\n"a" = 4', "tensors.a"),
        ('quant = "other_mix"', "unknown quant 'other_mix'"),
        ("quant = ", "not valid TOML"),
        (f"quant = {'[' * 100_000}", "not valid TOML"),
        ("#" * 1_000_001, "bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_file_is_an_error_that_names_it(text: str, message: str, folder: Path) -> None:
    """With a remedy; builds that do not ask for it are not disturbed."""
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match="mine.toml") as caught:
        ask("mine")
    assert message in caught.value.message
    assert caught.value.remedy
    assert ask("q4_0").export.quant == "q4_0"


def test_a_mix_is_saved_from_a_search_a_recipe_and_a_bundle(tmp_path: Path) -> None:
    """The winner's; and what [export] says, whatever else is there."""
    runner = CliRunner()
    found = build_tuning().model_copy(update={"winner": "mix at 3.4 bits"})
    write_tuning(tmp_path, found)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[export]\nquant = "q4-k-m"\ntensors = {"ffn_down" = "Q6_K"}\n')

    exported = {"quant": "q8_0", "tensors": {"attn": "f16"}, "pre_tokenizer": None}
    bundle = make_fake_bundle(tmp_path / "bundle", recipe={"export": exported})

    for name, source in (("one", tmp_path / "tune.json"), ("two", recipe), ("zero", bundle)):
        done = runner.invoke(app, ["presets", "save", name, "--from", str(source)])
        assert done.exit_code == 0, done.output
    assert saved_presets.read("one").tensors == {r"attn_v\.weight$": "q5_0"}
    assert saved_presets.read("one").why == "the winner of tune.json"
    two = saved_presets.read("two")
    assert (two.quant, two.tensors) == ("q4_k_m", {"ffn_down": "q6_k"})

    assert saved_presets.read("zero").tensors == {"attn": "f16"}

    # Of a preset of one's own, what is in it.
    recipe.write_text('[export]\nquant = "two"\ntensors = {"attn" = "f16"}\n')
    again = ["presets", "save", "three", "--from", str(recipe), "--json"]
    assert json.loads(runner.invoke(app, again).stdout)["tensors"] == {
        "attn": "f16",
        "ffn_down": "q6_k",
    }

    listed = json.loads(runner.invoke(app, ["presets", "ls", "--json"]).stdout)["presets"]
    assert [each["name"] for each in listed if each["from"] == "you"] == [
        "one",
        "three",
        "two",
        "zero",
    ]
    assert len(listed) == len(plugins.names("presets")) + 4


def test_nothing_is_saved_from_what_says_no_mix(tmp_path: Path, folder: Path) -> None:
    """Exit code 2 each time, one line and a remedy; a preset is replaced on demand alone."""
    runner = CliRunner()
    empty, hostile = tmp_path / "empty.toml", tmp_path / "hostile.toml"
    empty.write_text("[prune]\nsparsity = 0.5\n")
    hostile.write_text(f"[export]\nquant = {json.dumps(HOSTILE)}\n")
    damaged = tmp_path / "tune.json"
    damaged.write_text("{}")

    for source in (empty, hostile, damaged, tmp_path, tmp_path / "absent.toml"):
        done = runner.invoke(app, ["presets", "save", "mine", "--from", str(source)])
        assert done.exit_code == 2, done.output
        assert "→" in done.output
    assert not folder.exists()

    saved_presets.save("mine", MIX)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[export]\nquant = "q8_0"\n')
    words = ["presets", "save", "mine", "--from", str(recipe)]
    assert runner.invoke(app, words).exit_code == 2
    assert saved_presets.read("mine") == MIX
    assert runner.invoke(app, [*words, "--force"]).exit_code == 0
    assert saved_presets.read("mine").quant == "q8_0"
