"""The command that a report prints for a candidate builds it as the search did."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from racdeploy.cli.app import app
from racdeploy.cli.options import BuildOptions, TuneOptions
from racdeploy.pipeline.job import Job, fit_context
from racdeploy.recipe import Recipe
from racdeploy.report.tuning import Tuning
from racdeploy.report.tuning_tables import write_build
from racdeploy.storage.toml import merge
from racdeploy.tune.asked import list_asked
from racdeploy.tune.candidates import Choice, make_choice, propose
from racdeploy.tune.entries import Entry, Takes
from tests.support.sample_tuning import build_tuning

OWN = (
    "traces.max_new_tokens=400",
    "traces.count=88",
    "calibration.weights={thinking=2.0}",
    'prune.method="magnitude"',
    'prune.compute="bfloat16"',
    "verify.context_tokens=512",
    'runtime.thinking.closing="\\n\\nI  must answer.\\n"',
    "gate.accuracy.margin=0.1",
    "tune.ffn=[0.75]",
    "tune.zeros=[0.5]",
)
"""Keys that a user gave the search."""
QUANTS = {
    "gguf": '["q8_0","q4_k_m"]',
    "raspberry-pi-5": '["q4_0"]',
    "ci-smoke": '["q5_0"]',
    "onnx": '["matmulnbits_8"]',
}
MIX: dict[str, Any] = {
    "prune": {"shares": {r"^model\.layers\.0\.mlp\.up_proj$": 0.5}, "sparsity": 0.2},
    "export": {"quant": "q4_0", "tensors": {r"^blk\.(0|1)\.attn_v\.weight$": "q8_0"}},
}


@pytest.fixture(scope="module", params=[*QUANTS])
def job(request: pytest.FixtureRequest) -> Job:
    """The job of a search with much of its own, as the command makes it."""
    own = [*OWN, f"tune.quants={QUANTS[request.param]}"]
    options = TuneOptions(
        target=request.param,
        assignments=own,
        task=["gcd"],
        calibration_task=["gcd", "comparison"],
        recover_tokens=1000,
        tier="smoke" if request.param == "onnx" else "",
    )
    return fit_context(Job.at_tier(options.resolve(), options.tier))


def _write(job: Job, choice: Choice, recipe: dict[str, Any]) -> str:
    row = Entry(choice, Takes(1000, 1000, 100.0)).as_row(on_front=False)
    model, target = job.recipe.model, job.recipe.target
    update = {"model": model, "target": target, "recipe": recipe, "tier": job.tier}
    read = Tuning.model_validate_json(build_tuning().model_copy(update=update).model_dump_json())
    return write_build(read, row)


def _read(command: str) -> Recipe:
    """Return the recipe of a command line, parsed and resolved as the program does it."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("racdeploy", "build")

    build = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = BuildOptions(**build.make_context(name, words).params)
    job = Job.at_tier(options.resolve(), options.tier, options.prompts_asked)
    return fit_context(job).recipe


def _compare(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(exclude={"tune"})


def test_the_command_of_every_candidate_gives_its_recipe(job: Job) -> None:
    """Tasks, traces, pruning, verification and gate are those of the search."""
    asked = list_asked(job.recipe)
    choices = [*propose(job).choices]
    if job.recipe.export.format == "gguf":
        own = merge({"prune": {"method": "sparsegpt"}}, MIX)
        choices.append(make_choice(job, "mix", "zeros mix", own))

    assert len(choices) > 4
    for choice in choices:
        command = _write(job, choice, asked)
        assert _compare(_read(command)) == _compare(choice.recipe), command


def test_without_what_the_search_was_asked_it_is_another_recipe(job: Job) -> None:
    """Each part counts, and none says more than differs."""
    asked = list_asked(job.recipe)
    (choice, *_) = propose(job).choices
    assert "tune" not in asked
    assert asked["calibration"] == {"weights": {"thinking": 2.0}}

    for part in asked:
        fewer = {name: values for name, values in asked.items() if name != part}
        found = _compare(_read(_write(job, choice, fewer)))
        assert found != _compare(choice.recipe), part


def test_words_of_a_command_stay_whole() -> None:
    """Blanks in a path are part of it; a line end would make two commands of one."""
    tuning = build_tuning()
    recipe = {"tasks": ["jsonl:my  file.jsonl", "jsonl:a\nb"]}
    command = write_build(tuning.model_copy(update={"recipe": recipe}), tuning.candidates[0])
    words = shlex.split(command)
    assert words[words.index("--task") + 1] == "jsonl:my  file.jsonl"
    assert "\n" not in command
