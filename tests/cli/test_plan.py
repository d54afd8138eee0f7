"""The plan: a few sentences in groups, advice, and what is looked at before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy import plugins
from racdeploy.cli import plan as plans
from racdeploy.cli.app import app
from racdeploy.cli.plan import list_groups, list_shortages, write_first_line, write_plan
from racdeploy.recipe import Recipe
from racdeploy.verification.stats.paired import find_min_prompts
from tests.support.commands import environment
from tests.support.errors import raises


def _plan(work: Path, *arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(
        app, ["build", *arguments, "--dry-run", "--json", "--work", str(work)]
    )
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_plan_says_in_words_what_is_built_and_what_can_be_shown(tmp_path: Path) -> None:
    """Every group that has something to say, each line within 80 columns, no word broken."""
    plan = _plan(tmp_path, "--sparsity", "0.5", "--prompts", "24")
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


def test_zeros_that_will_be_lost_are_in_the_plan(tmp_path: Path) -> None:
    """Not only in its JSON."""
    lossy = ("--sparsity", "0.5", "--quant", "q4_k_m", "--allow-losing-zeros")
    lossy += ("--set", 'export.rounding="nearest"')
    lost = "loses zeros: quant q4_k_m does not keep zeros: 24 of 28 linears"
    assert any(line.startswith(lost) for line in list_groups(_plan(tmp_path, *lossy))["prunes"])


def test_the_folder_that_was_asked_for_is_named(tmp_path: Path) -> None:
    """In place of the default one."""
    plan = _plan(tmp_path)
    assert list_groups(plan, "mine")["makes"][0] == "the bundle mine"


def test_enough_prompts_need_no_advice(tmp_path: Path) -> None:
    """The number that is advised is the first one that is enough."""
    assert find_min_prompts(0.1, 0.05, 0.9) == 300
    assert find_min_prompts(0.5, 0.001, 0.9) is None
    assert "advice" not in list_groups(_plan(tmp_path, "--prompts", "300"))


def test_a_stage_without_enough_memory_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it needs and what is free; nothing where the system does not say."""
    plan = {"prune_memory_bytes_at_most": 3 << 30, "artifact_bytes": 9 << 30}
    assert list_shortages(plan, 2 << 30) == ["prune may need 3.0 GiB of memory, 2.0 GiB are free"]
    assert list_shortages(plan, None) == []


def test_recovery_is_planned_with_its_phases() -> None:
    """Tokens, and how they are shared out."""
    plan = {"recover_tokens": 100, "recover_phases": "all 75, own answers 1 25"}
    assert plans.list_groups(plan)["recovers"] == [
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
