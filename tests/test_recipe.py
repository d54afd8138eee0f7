"""Recipes, targets, gates: precedence, and what is refused."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints, is_typeddict

import pytest
from pydantic import BaseModel

from racdeploy.errors import UsageError
from racdeploy.recipe import EXAMPLE, Pruning, Recipe, Traces, Verification
from racdeploy.recipe.effort import EFFORTS
from racdeploy.recipe_settings import RecipeSettings
from racdeploy.targets import Target
from tests.support.errors import raises


def _file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_options_win_over_the_file_and_the_file_over_the_target(tmp_path: Path) -> None:
    """Defaults, target, file, command line: the later one decides."""
    file = _file(tmp_path, 'target = "browser"\n[export]\nquant = "k_quant"\n[traces]\ncount = 9\n')
    recipe = Recipe.combine(file, {"traces": {"count": 5}, "verify": {"count": None}})
    assert (recipe.export.format, recipe.export.quant) == ("onnx", "k_quant")
    assert recipe.traces.count == 5
    assert Verification().count == recipe.verify.count


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_sets_what_nobody_has_set(tmp_path: Path, effort: str) -> None:
    """Over the target's proposal; a recipe file and an option that set a key are kept."""
    settings = EFFORTS[effort]
    plain = Recipe.combine(None, {})
    recipe = Recipe.combine(None, {"effort": effort})
    expected_tokens = settings.get("calibration", {}).get("max_tokens")
    expected_count = settings.get("verify", {}).get("count")
    assert recipe.calibration.max_tokens == (expected_tokens or plain.calibration.max_tokens)
    assert recipe.verify.count == (expected_count or plain.verify.count)

    file = _file(tmp_path, f'effort = "{effort}"\n[calibration]\nmax_tokens = 5000\n')
    own = Recipe.combine(file, {"verify": {"count": 77}})
    assert (own.effort, own.calibration.max_tokens, own.verify.count) == (effort, 5000, 77)


def test_more_effort_is_more_of_everything() -> None:
    """And from Python as from the command line; a word that is none is refused with the others."""
    efforts = [Recipe.combine(Recipe(effort=name), {}) for name in ("quick", "default", "thorough")]
    for values in (
        [recipe.calibration.max_tokens for recipe in efforts],
        [recipe.verify.count for recipe in efforts],
    ):
        assert sorted(set(values)) == values
    with raises("invalid-settings", "effort: Input should be 'quick', 'default' or 'thorough'"):
        Recipe.combine(None, {"effort": "quik"})


def _find_unknown(settings: type, model: type[BaseModel]) -> set[str]:
    """Return keys of settings that a recipe or its section does not have."""
    unknown = set()
    for name, hint in get_type_hints(settings).items():
        field = model.model_fields.get(name)
        if field is None:
            unknown.add(name)
            continue

        # Of a list, as the rungs are, the entries.
        section, key = ([*get_args(each), each][0] for each in (field.annotation, hint))
        if is_typeddict(key):
            unknown |= {f"{name}.{each}" for each in _find_unknown(key, section)}
    return unknown


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 8_192),
        ({"effort": "quick"}, 2_048),
        ({"effort": "thorough"}, 32_768),
        ({"calibration": {"max_tokens": 0}}, 8_192),
        ({"traces": {"count": 10, "max_new_tokens": 400}}, 1_000),
        ({"traces": {"count": 1000, "max_new_tokens": 400}}, 8_192),
        ({"calibration": {"source": "prompt"}}, 0),
        ({"traces": {"server": "http://127.0.0.1:1/v1"}}, 0),
        ({"calibration": {"source": "prompt", "own_text_tokens": 64}}, 64),
    ],
)
def test_text_calibrates_too_where_the_model_is_here_and_thinks(
    options: RecipeSettings, tokens: int
) -> None:
    """A quarter as much as the traces, unless the recipe says how much."""
    assert Recipe.combine(None, options).own_text_tokens == tokens


def test_settings_before_validation_have_only_keys_of_a_recipe() -> None:
    """An option that sets another key would be refused when it is first given."""
    assert _find_unknown(RecipeSettings, Recipe) == set()


@pytest.mark.parametrize("section", ["structure", "prune", "export", "traces"])
def test_a_value_in_place_of_a_section_is_refused_with_its_name(
    tmp_path: Path, section: str
) -> None:
    """Before a target reads the section, which has no keys."""
    with raises("invalid-settings", f"{section}: Input should be", "got 5"):
        Recipe.combine(_file(tmp_path, f"{section} = 5\n"), {})


def test_the_example_recipe_is_the_default_recipe(tmp_path: Path) -> None:
    """What init writes means what an empty recipe means."""
    assert Recipe.combine(None, {}) == Recipe.combine(_file(tmp_path, EXAMPLE), {})


def test_the_example_recipe_names_every_option(tmp_path: Path) -> None:
    """Without comment signs its keys are all there are, and its values the defaults where these
    show what to write.
    """
    text = re.sub(r"^# (?=\[|\w+ = )", "", EXAMPLE, flags=re.MULTILINE)
    recipe = Recipe.combine(_file(tmp_path, text), {})
    written, default = tomllib.loads(text), Recipe.combine(None, {}).model_dump(mode="json")
    assert {key for key, _ in _leaves(default)} == {key for key, _ in _leaves(written)}
    assert recipe.gate == written["gate"] == {"accuracy": {"margin": 0.05}}
    defaults = dict(_leaves(default))
    changed = {
        key for key, value in _leaves(recipe.model_dump(mode="json")) if value != defaults[key]
    }
    assert changed == {
        *("also", "ladder.no_worse_than", "tasks", "calibration_tasks", "prune.ignore"),
        "verify.controls",
        *("prune.sparsity", "recover.tokens", "recover.methods", "recover.extra_text"),
        *("recover.shorten", "calibration.keep_truncated", "calibration.own_text_tokens"),
        *("traces.server", "traces.server_model", "traces.server_key_env"),
        *("export.importance", "export.packing", "export.pre_tokenizer", "export.tensors", "gate"),
        *("structure.keep", "structure.vocabulary_text", "runtime.thinking.closing"),
        *("export.rounding", "rungs", "tune.quants", "tune.vocabulary", "tune.zeros"),
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in {"tensors", "gate", "keep"}:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("share", [1.5, 0, -0.2, "x"])
def test_shorten_is_true_or_a_share(share: object) -> None:
    with pytest.raises(UsageError, match=r"recover.shorten: true, or a share above 0 and up to 1"):
        Recipe.combine(None, {"recover": {"shorten": share}})
    for allowed in (True, False, 0.6, 1):
        assert Recipe.combine(None, {"recover": {"shorten": allowed}}).recover.shorten == allowed


def test_how_a_server_is_reached_does_not_decide_the_traces() -> None:
    """Neither the key's variable nor the concurrency; the address only where the model has no
    name.
    """
    url = "http://127.0.0.1:8000/v1"
    plain, unnamed = Traces().identity, Traces(server=url).identity
    assert unnamed == plain | {"server": url}
    assert (
        unnamed
        == Traces(
            server=url,
            server_key_env="KEY",
            server_concurrency=3,
            server_timeout_s=9,
        ).identity
    )
    named = [
        Traces(server=address, server_model="r1").identity
        for address in (url, "https://gpu.example/v1")
    ]
    assert named == [plain | {"server": "r1"}] * 2


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8000",
        "ftp://h/v1",
        "http://me:sesame@h/v1",
        "http://h/v1?key=sesame",
        "http://h/ v1",
    ],
)
def test_a_bad_server_address_is_refused_and_not_shown(address: str) -> None:
    """A key in an address would land in reports and logs."""
    with raises("invalid-settings", "traces: server") as caught:
        Recipe.combine(None, {"traces": {"server": address}})
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("name", Target.names())
def test_every_target_gives_a_recipe(name: str) -> None:
    """Each shipped target is complete, says why, and accepts its own defaults."""
    target = Target.read(name)
    recipe = Recipe.combine(None, {"target": name})
    assert target.description
    assert (target.quant, target.format) == (recipe.export.quant, recipe.export.format)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[prune]\nsparsty = 0.5", "'prune.sparsty' (did you mean 'sparsity'?)"),
        ("[traces]\nserver_concurrency = 4", "traces: server_concurrency"),
        ("modle = 'x'", "'modle' (did you mean 'model'?)"),
        ("[prune]\nsparsity = 1.0", "got 1.0"),
        ("[prune]\nsparsity = -0.1", "prune.sparsity: "),
        ("[prune]\npattern = '4:4'", "got '4:4'"),
        ("[prune]\npattern = '2:4'\nsparsity = 0.6", "0.5, not 0.6"),
        ("[prune]\nignore = ['(']", "'('"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(tmp_path: Path, text: str, named: str) -> None:
    """The message names the key, the value and the nearest known key."""
    with raises("invalid-settings", named):
        Recipe.combine(_file(tmp_path, text), {})
    with raises("invalid-toml"):
        Recipe.combine(_file(tmp_path, "[prune\n"), {})


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"target": "raspbery-pi-5"}, "unknown-target", "did you mean 'raspberry-pi-5'"),
        ({"export": {"quant": "q8"}}, "unknown-plugin", "quant 'q8'"),
        ({"prune": {"method": "sparsgpt"}}, "unknown-plugin", "did you mean 'sparsegpt'"),
        ({"structure": {"criterion": "eror"}}, "unknown-plugin", "did you mean 'error'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(options: dict, code: str, named: str) -> None:
    """Plugins and targets are looked up before any work."""
    with raises(code, named):
        Recipe.combine(None, options)


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"target": "android-arm64", "export": {"quant": "f16"}}, "quant-not-on-target", "'f16'"),
        (
            {"target": "ci-smoke", "verify": {"context_tokens": 4096}},
            "context-beyond-target",
            "2048",
        ),
    ],
)
def test_a_recipe_that_contradicts_its_target_is_refused(
    options: dict, code: str, named: str
) -> None:
    """A target's limits bind."""
    with raises(code, named):
        Recipe.combine(None, options)


def test_a_user_target_is_a_toml_file(tmp_path: Path) -> None:
    """A target needs no code: a path to a TOML file will do."""
    file = tmp_path / "board.toml"
    file.write_text(
        'description = "mine"\nmemory_limit_bytes = 1000\nquant = "q4_0"\n', encoding="utf-8"
    )
    assert Recipe.combine(None, {"target": str(file)}).export.quant == "q4_0"


def test_a_resolved_recipe_reads_back() -> None:
    """What a manifest holds, every default written out, is a recipe again."""
    for options in ({}, {"prune": {"pattern": "2:4"}}):
        recipe = Recipe.combine(None, options)
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_magnitude_alone_is_plain_magnitude() -> None:
    """It matches and refits nothing, however it is asked for; who asks for that gets it."""
    plain = Recipe.combine(None, {"prune": {"method": "magnitude"}}).prune
    assert (plain.match_dense, plain.refit_steps) == (False, 0)

    asked = {"method": "magnitude", "target": "dense_output", "refit_steps": 5}
    refitted = Recipe.combine(None, {"prune": asked}).prune
    assert (refitted.match_dense, refitted.refit_steps) == (True, 5)

    other = Recipe.combine(None, {"prune": {"method": "wanda"}}).prune
    assert (other.match_dense, other.refit_steps) == (True, 20)


def test_a_copy_with_a_value_that_the_section_lacks_is_a_mistake() -> None:
    """A property, or a key of an earlier release: it would be kept aside, and change nothing."""
    with pytest.raises(AssertionError, match="Pruning has no match_dense"):
        Pruning().model_copy(update={"match_dense": False})
    assert not Pruning().model_copy(update={"target": "linear_output"}).match_dense
