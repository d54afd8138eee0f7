"""racdeploy as a library: its functions are the commands, and its recipes are their files."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import racdeploy
from racdeploy.api import functions, options
from racdeploy.api.builds import read_recipe
from racdeploy.api.options import BuildOptions
from racdeploy.cli.app import app
from racdeploy.verification.gate import Gate, read_gate
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

REFERENCE = (Path(__file__).parents[1] / "docs/reference/api.md").read_text(encoding="utf-8")
RECIPE = """
[traces]
count = 8
max_new_tokens = 8
[calibration]
keep_truncated = true
[prune]
sparsity = 0.3
"""
STEPS = ("build", "export", "prune", "recover", "tune", "verify")
PYTHON_ONLY = {"tokenizer", "progress", "on_event"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model, and a recipe that asks little of it."""
    folder = tmp_path_factory.mktemp("api")
    make_checkpoint(folder / "my-model", "llama", intermediate_size=128)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder


def test_every_public_name_is_in_the_reference() -> None:
    """With the place that documents it; the error tree stands there as a whole."""
    documented = set(re.findall(r"^::: [\w.]+?(\w+)$", REFERENCE, re.MULTILINE))
    whole = {"__version__", "RacdeployError"}
    assert set(racdeploy.__all__) - documented == whole


def test_nothing_is_printed(folder: Path, capfd: Any) -> None:
    """What is worth a word comes back in the record, or is logged."""
    recipe = racdeploy.Recipe.read(folder / "recipe.toml")
    racdeploy.prune(folder / "my-model", recipe=recipe, work=folder / "work")
    assert capfd.readouterr() == ("", "")


def test_progress_is_reported(folder: Path) -> None:
    """By stages, from nothing to all."""
    seen: list[tuple[str, int, int]] = []
    racdeploy.prune(
        folder / "my-model",
        recipe=racdeploy.Recipe.read(folder / "recipe.toml", {"traces.count": 9}),
        tasks=["gcd"],
        work=folder / "work",
        progress=lambda label, done, total, tokens=0: seen.append((label, done, total)),
    )
    assert {label for label, *_ in seen} >= {"traces", "prune"}
    assert all(0 <= done <= total for _, done, total in seen)


@pytest.mark.parametrize("step", STEPS)
def test_a_command_takes_the_functions_options(step: str) -> None:
    """Every keyword has an option of its name with a help, and the function explains it."""
    function = getattr(functions, step)
    names = inspect.signature(function).parameters.keys() - PYTHON_ONLY
    command = typer.main.get_command(app).commands[step]  # type: ignore[attr-defined]
    offered = {each.name: each for each in command.params}
    assert names <= offered.keys()
    assert all(offered[name].help for name in names)
    assert inspect.signature(getattr(racdeploy, step)) == inspect.signature(function)


def test_the_rest_of_a_build_is_in_its_recipe() -> None:
    """A model must be named, and there are few keywords beside it."""
    for function in (racdeploy.build, racdeploy.prune, racdeploy.recover, racdeploy.tune):
        model, *others = inspect.signature(function).parameters.values()
        keywords = [each for each in others if each.kind is inspect.Parameter.KEYWORD_ONLY]
        assert model.default is inspect.Parameter.empty
        assert len(keywords) <= 12
    pruned = inspect.signature(racdeploy.recover).parameters["pruned"]
    assert pruned.default is inspect.Parameter.empty


def test_a_recipe_in_memory_is_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What neither sets is the target's; keys that are changed win, and a gate is its file too."""
    monkeypatch.chdir(folder)
    file = BuildOptions(recipe=Path("recipe.toml"), settings={"prune": {"sparsity": 0.4}})
    recipe = racdeploy.Recipe.read("recipe.toml", {"prune.sparsity": 0.4})
    assert read_recipe(BuildOptions(recipe=recipe)) == read_recipe(file)
    assert read_recipe(BuildOptions(recipe=racdeploy.Recipe())) == read_recipe(BuildOptions())

    (folder / "gate.toml").write_text("[accuracy]\nmargin = 0.1\n", encoding="utf-8")
    gate = racdeploy.Gate.read(settings={"accuracy.margin": 0.1})
    by_file, by_gate = (
        read_recipe(BuildOptions(gate=each)) for each in (folder / "gate.toml", gate)
    )
    assert by_gate == by_file
    assert by_gate.gate == {"accuracy": {"margin": 0.1}}
    assert read_gate(gate).required_checks == {"accuracy"}

    with raises("invalid-settings", "did you mean 'sparsity'"):
        racdeploy.Recipe.read(settings={"prune.sparsty": 0.4})
    with raises("key-not-allowed", "--key-host example.org"):
        server = {"server": "http://example.org/v1", "server_key_env": "KEY"}
        read_recipe(BuildOptions(recipe=racdeploy.Recipe.read(settings={"traces": server})))


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="sparsty"):
        racdeploy.prune("my-model", sparsty=0.5)  # type: ignore[call-arg]


OUTSIDE_RECIPE = frozenset({
    "recipe", "settings", "key_host", "pruned", "tier", "out", "work", "threads",
})  # fmt: skip
"""Options that say how a command runs, or that are merged with a recipe elsewhere."""
GIVEN = {
    "gate": Gate(confidence=0.8),
    "keep": {"ffn": 0.5},
}


@pytest.mark.parametrize(
    "kind",
    [
        options.TraceOptions,
        options.PruneOptions,
        options.BuildOptions,
        options.RecoverOptions,
        options.ExportOptions,
        options.TuneOptions,
    ],
)
def test_every_option_reaches_the_recipe(kind: type[options.TraceOptions]) -> None:
    """One that is read and then forgotten would silently build something else."""
    plain = kind(model="tiny-reasoner")
    for field in dataclasses.fields(kind):
        if field.name in OUTSIDE_RECIPE:
            continue
        before = getattr(plain, field.name)
        value = GIVEN.get(field.name, _invent(str(field.type), before))
        changed = dataclasses.replace(plain, **{field.name: value})
        assert _drop_empty(changed.to_settings()) != _drop_empty(plain.to_settings()), field.name


def _invent(annotation: str, before: object) -> object:
    """Return a value of an option's type that is not its default."""
    if isinstance(before, bool):
        return not before
    if isinstance(before, tuple) or "Names" in annotation:
        return ("given",)
    return 3 if "int" in annotation or "float" in annotation else "given"


def _drop_empty(settings: object) -> object:
    """Return nested settings without those that say nothing."""
    if not isinstance(settings, dict):
        return settings
    kept = {key: _drop_empty(value) for key, value in settings.items()}
    return {key: value for key, value in kept.items() if value not in (None, (), {})}
