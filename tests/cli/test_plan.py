"""The plan: a few sentences in groups, advice, and what is looked at before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy import plugins
from racdeploy.cli import console
from racdeploy.cli.app import app
from racdeploy.cli.plan import list_groups, list_shortages, write_first_line, write_plan
from racdeploy.recipe import Recipe
from racdeploy.results.plan import Plan, PruningPlan, RecoveryPlan
from racdeploy.verification.stats.paired import find_min_prompts
from tests.support.commands import environment
from tests.support.errors import raises

KEYS = {
    *("model", "architecture", "parameters", "linears_pruned", "linears_kept_dense", "thinks"),
    *("traces_from", "trace_prompts", "trace_tokens_at_most", "evaluation_models"),
    *("evaluation_tokens_at_most", "evaluation_prompts", "samples", "discordant_share"),
    *("accuracy_margin", "accuracy_power", "smallest_detectable_drop", "length_ratio"),
    *("smallest_detectable_ratio", "artifact_bytes", "disk_bytes", "cache_bytes", "artifact"),
    *("verify_memory_bytes_at_least", "trace_memory_bytes_at_most", "prune_tokens_at_most"),
    *("prune_memory_bytes_at_most", "stage_seconds", "seconds_expected"),
}
"""Keys that scripts read from the JSON of every build's plan, before there are traces."""


def _plan(monkeypatch: pytest.MonkeyPatch, work: Path, *arguments: str) -> Plan:
    """Return the plan that a command prints; its JSON has the same values."""
    plans: list[Plan] = []

    def keep(plan: Plan, json_output: bool, out_folder: str = "") -> None:
        plans.append(plan)
        print_plan(plan, json_output, out_folder)

    print_plan = console.print_plan
    with monkeypatch.context() as patch:
        patch.setattr(console, "print_plan", keep)
        done = CliRunner().invoke(
            app, ["build", *arguments, "--dry-run", "--json", "--work", str(work)]
        )
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads(json.dumps(plans[0].to_json()))
    assert printed.keys() >= KEYS
    return plans[0]


def test_a_plan_says_in_words_what_is_built_and_what_can_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every group that has something to say, each line within 80 columns, no word broken."""
    plan = _plan(monkeypatch, tmp_path, "--sparsity", "0.5", "--prompts", "24")
    groups = list_groups(plan)
    assert list(groups) == ["makes", "prunes", "traces", "verifies", "takes", "advice"]
    assert "tiny-reasoner-3.3M-rac-50-v1.0-Q8_0/ (--out names another)" in groups["makes"][0]
    assert "chooses zeros in 28 linears" in groups["prunes"]
    assert "can show a loss of accuracy above 19.1 points" in groups["verifies"]
    assert groups["advice"][-1] == (
        "24 prompts can only show drops above 19.1 points: raise --prompts to 300"
    )

    lines = write_plan(plan, 80)
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).split() == [
        word
        for heading, sentences in groups.items()
        for word in (heading, *" ".join(sentences).split())
    ]


def test_zeros_that_will_be_lost_are_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only in its JSON."""
    lossy = ("--sparsity", "0.5", "--quant", "q4_k_m", "--allow-losing-zeros")
    lossy += ("--set", 'export.rounding="nearest"')
    lost = "loses zeros: quant q4_k_m does not keep zeros: 24 of 28 linears"
    assert any(
        line.startswith(lost)
        for line in list_groups(_plan(monkeypatch, tmp_path, *lossy))["prunes"]
    )


def test_the_folder_that_was_asked_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the default one."""
    plan = _plan(monkeypatch, tmp_path)
    assert list_groups(plan, "mine")["makes"][0] == "the bundle mine"


def test_enough_prompts_need_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that is advised is the first one that is enough."""
    assert find_min_prompts(0.1, 0.05, 0.9) == 300
    assert find_min_prompts(0.5, 0.001, 0.9) is None
    assert "advice" not in list_groups(_plan(monkeypatch, tmp_path, "--prompts", "300"))


def test_a_plan_says_when_the_questions_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And how many are expected; a recipe may ask for all of them."""
    many = ("--prompts", "1000")
    expected = (
        "judged after 64, 128, 256, 512 prompts, until it is clear: asks 1000 at most, about 600 "
        "if both models are equally good"
    )
    assert expected in list_groups(_plan(monkeypatch, tmp_path, *many))["verifies"]

    at_once = _plan(monkeypatch, tmp_path, *many, "--set", "verify.sequential=false")
    assert not any("judged after" in line for line in list_groups(at_once)["verifies"])


def test_a_stage_without_enough_memory_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it needs and what is free; nothing where the system does not say."""
    pruning = PruningPlan(prune_tokens=8, prune_memory_bytes=3 << 30, is_bound=True)
    plan = Plan(pruning=pruning)
    assert list_shortages(plan, 2 << 30) == ["prune may need 3.0 GiB of memory, 2.0 GiB are free"]
    assert list_shortages(plan, None) == []


def test_recovery_is_planned_with_its_phases() -> None:
    """Tokens, and how they are shared out."""
    recovery = RecoveryPlan(
        recover_tokens=100,
        recover_phases="all 75, own answers 1 25",
        recover_memory_bytes_at_most=0,
    )
    assert list_groups(Plan(recovery=recovery))["recovers"] == [
        "100 tokens, in phases: all 75, own answers 1 25"
    ]


def test_a_plan_is_made_without_torch(tmp_path: Path) -> None:
    """Also one with a cut, zeros and a method that says what memory it takes."""
    arguments = ["build", "--dry-run", "--method=admm", "--keep=ffn=0.75", "--sparsity=0.5"]
    code = (
        "import sys\nfrom racdeploy.cli.app import app\n"
        f"try:\n    app({[*arguments, f'--work={tmp_path}']!r})\n"
        "finally:\n    print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert {"torch", "transformers"}.isdisjoint(done.stdout.splitlines()[-1].split())
    assert "makes     the bundle" in done.stdout


@pytest.mark.parametrize("command", ["build", "prune"])
def test_a_trace_server_that_does_not_listen_ends_the_plan(command: str, tmp_path: Path) -> None:
    """Exit code 4, as it would end the run."""
    asked = ["--trace-server", "http://127.0.0.1:9/v1", "--dry-run", "--work", str(tmp_path)]
    done = CliRunner().invoke(app, [command, *asked, "--json"])
    said = json.loads(done.stdout)
    assert (done.exit_code, said["code"]) == (4, "server-unreachable")
    assert "http://127.0.0.1:9/v1" in said["error"]


def test_the_first_line_names_what_is_done() -> None:
    """For every command that asks a model."""
    values = {"structure": {"keep": {"ffn": 0.5, "vocabulary": 4096}}, "prune": {"pattern": "2:4"}}
    recipe = Recipe.combine(None, values | {"recover": {"tokens": 5000}})
    assert write_first_line("build", recipe) == (
        "build: tiny-reasoner for gguf, 50% of ffn kept, 4,096 tokens of vocabulary kept, "
        "2:4 zeros, then 5,000 tokens learned back, stored in q8_0"
    )
    assert write_first_line("traces", recipe) == "traces: tiny-reasoner answers 256 prompts"
    shorter = Recipe.combine(None, {"recover": {"shorten": True}})
    assert write_first_line("prune", shorter).startswith(
        "prune: tiny-reasoner (taught to think less), "
    )


def test_constants_of_a_plugin_are_read_and_not_imported() -> None:
    """Single ones and pairs; what is computed is left out, and an unknown name is refused."""
    assert plugins.read_constants("prune_methods", "wanda") == {"MATRICES": 1, "COPIES": 9}
    assert plugins.read_constants("allocations", "error")["NEEDS_SURVEY"] is True
    assert "FAMILY" not in plugins.read_constants("families", "qwen2")
    with raises("unknown-plugin", "did you mean 'wanda'"):
        plugins.read_constants("prune_methods", "wandaa")
