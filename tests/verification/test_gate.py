"""The gate: limits from files, tiers, the schema, and what is refused.

``python -m tests.verification.test_gate`` writes docs/gate.schema.json again.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from racdeploy import plugins
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe, Verification
from racdeploy.results.checks import CheckResult
from racdeploy.verification.checks import accuracy, logits
from racdeploy.verification.checks import thinking as thinking_check
from racdeploy.verification.evidence import (
    ArmResult,
    Divergence,
    Evidence,
    LogitComparison,
    run_checks,
)
from racdeploy.verification.gate import GATE_EXAMPLE, TIERS, make_gate_model, read_gate
from tests.support.errors import raises
from tests.support.evidence import make_evidence
from tests.support.records import arm_of, record

INVALID = "invalid-settings"
DOCS = Path(__file__).parents[2] / "docs"


def _published() -> str:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema"
    } | make_gate_model().model_json_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _file(folder: Path, text: str) -> Path:
    file = folder / "gate.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_gate_file_replaces_limits_and_nothing_else(tmp_path: Path) -> None:
    """What the file leaves out stays as built, and what both leave out has its default."""
    file = _file(tmp_path, "[accuracy]\nmargin = 0.02\n[tiers.standard]\nprompts = 300\n")
    built = {
        "accuracy": {"margin": 0.1},
        "thinking": {"unclosed": 0.1},
        "tiers": {"standard": {"samples": 4}},
    }
    gate = read_gate(file, built)
    assert gate.limits(accuracy.Limits).margin == 0.02
    assert gate.limits(thinking_check.Limits) == thinking_check.Limits(unclosed=0.1)
    assert (gate.tiers.standard.prompts, gate.tiers.standard.samples) == (300, 4)
    assert gate.required_checks == {"accuracy"}
    assert read_gate(built=built).required_checks == frozenset()


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("[acuracy]\nmargin = 0.02\n", INVALID, "'acuracy' (did you mean 'accuracy'?)"),
        ("margin = 0.02\n", INVALID, "'margin'"),
        (
            "[accuracy]\nmargn = 0.02\n",
            INVALID,
            "'accuracy.margn' (did you mean 'margin'?); known: margin",
        ),
        ("[accuracy]\nmargin = 1.5\n", INVALID, "accuracy.margin: "),
        ("[accuracy]\nmargin = nan\n", INVALID, "accuracy.margin: "),
        ('[accuracy]\nmargin = "low"\n', INVALID, "accuracy.margin: "),
        ("accuracy = 3\n", INVALID, "accuracy: "),
        ("confidence = 90\n", INVALID, "confidence: "),
        ('checks = ["acuracy"]\n', INVALID, "'acuracy' (did you mean 'accuracy'?)"),
        ("[tiers.realease]\nprompts = 3\n", INVALID, "did you mean 'release'?"),
        ("[tiers.smoke]\nprompts = 0\n", INVALID, "tiers.smoke.prompts: "),
        ('[tiers.smoke]\nchecks = ["logit"]\n', INVALID, "did you mean 'logits'?"),
        ("[integrity]\nlimit = 1\n", INVALID, "'integrity.limit'"),
        ("[[accuracy]]\nmargin = 0.1\n", INVALID, "accuracy: "),
        ("this is not TOML", "invalid-toml", "gate.toml"),
        ("margin = \x00", "invalid-toml", "gate.toml"),
    ],
)
def test_a_malformed_gate_is_named(tmp_path: Path, text: str, code: str, named: str) -> None:
    """The file, the key, and the nearest known one."""
    with raises(code, "gate.toml", named):
        read_gate(_file(tmp_path, text))


def test_a_gate_that_is_missing_or_not_text_is_named(tmp_path: Path) -> None:
    """Neither is the empty gate."""
    with raises("missing-toml-file", "nowhere.toml"):
        read_gate(tmp_path / "nowhere.toml")
    (tmp_path / "gate.toml").write_bytes(b"\xff\xfe")
    with raises("invalid-toml"):
        read_gate(tmp_path / "gate.toml")


def test_a_tier_says_how_much_is_run() -> None:
    """Prompts and samples go into the settings, checks and the meaning of too little data into the
    gate.
    """
    built = {
        "tiers": {"smoke": {"prompts": 9, "samples": 2, "temperature": 0.6, "checks": ["tokens"]}}
    }
    gate = read_gate(built=built)
    smoke = gate.for_tier("smoke")
    settings = gate.tiers.smoke.apply(Verification(max_new_tokens=77))
    assert (settings.count, settings.samples, settings.temperature, settings.max_new_tokens) == (
        9,
        2,
        0.6,
        77,
    )
    assert (smoke.is_enabled("tokens"), smoke.is_enabled("accuracy"), smoke.inconclusive) == (
        True,
        False,
        "fail",
    )
    assert read_gate().for_tier("smoke").inconclusive == "fail"
    assert gate.for_tier("") is gate
    with raises("unknown-tier", "'standart' (did you mean 'standard'?)"):
        gate.for_tier("standart")


def test_equal_samples_are_refused() -> None:
    """Two greedy samples are one."""
    with raises("invalid-settings", "2 samples", "temperature 0"):
        Job.at_tier(Recipe(gate={"tiers": {"smoke": {"samples": 2}}}), "smoke")


def test_a_recipe_carries_its_gate() -> None:
    """A bad limit in a recipe is found before any work."""
    assert (
        Job(Recipe(gate={"accuracy": {"margin": 0.3}})).gate.limits(accuracy.Limits).margin == 0.3
    )
    with raises("invalid-settings", "[gate]", "did you mean 'margin'"):
        _ = Job(Recipe(gate={"accuracy": {"magin": 0.3}})).gate


def _evidence(
    gate_file: Path | None, dense: ArmResult, pruned: ArmResult, **more: object
) -> Evidence:
    file = Path(__file__)
    return make_evidence(dense, pruned, gate=read_gate(gate_file), file=file, **more)


def test_what_the_gate_does_not_ask_for_is_skipped(tmp_path: Path) -> None:
    """By name, with the reason; the others decide."""
    arm = arm_of([record(index) for index in range(80)])
    found = {
        check.name: check
        for check in run_checks(_evidence(_file(tmp_path, 'checks = ["accuracy"]'), arm, arm))
    }
    assert found.keys() == set(plugins.list_names("checks"))
    assert {name for name, check in found.items() if check.verdict != "skipped"} == {"accuracy"}
    assert found["tokens"].summary == "the gate does not ask for it"


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("[logits]\npruning_kl_nats = 0.1\n", "logits"),
        ("[speed]\nratio = 1.1\n", "speed"),
        ('checks = ["logits"]\n', "logits"),
    ],
)
def test_a_limit_on_what_was_not_measured_is_an_error(
    tmp_path: Path, text: str, check: str
) -> None:
    """Never a pass: exit code 2, and the check is named."""
    arm = arm_of([record(index) for index in range(80)])
    with raises("check-not-measured", check):
        run_checks(_evidence(_file(tmp_path, text), arm, arm))


def test_a_demanded_check_without_a_limit_is_an_error(tmp_path: Path) -> None:
    """What is measured decides nothing; where the gate does not name it, it is only reported."""
    stats = {"decode_s": 1.0, "generated_tokens": 500.0}
    arm = replace(arm_of([record(index) for index in range(80)]), stats=stats)
    gate = _file(tmp_path, 'checks = ["speed", "accuracy"]')
    with raises("check-not-measured", "speed"):
        run_checks(_evidence(gate, arm, arm))

    found = {check.name: check for check in run_checks(_evidence(None, arm, arm))}
    assert found["speed"].verdict == "measured"


@pytest.mark.parametrize(("kl", "verdict"), [(0.05, "pass"), (0.2, "fail"), (float("nan"), "fail")])
def test_pruning_has_a_limit_of_its_own(tmp_path: Path, kl: float, verdict: str) -> None:
    """The export may be perfect and the pruning too much."""
    arm = arm_of([record(0)])
    comparison = LogitComparison(10, Divergence(1e-6, 1.0, 0.0), Divergence(kl, 0.9, 0.1))
    evidence = _evidence(
        _file(tmp_path, "[logits]\npruning_kl_nats = 0.1\n"), arm, arm, logits=comparison
    )
    found = logits.check(evidence)
    assert (found.verdict, "(limit 0.1)" in found.summary) == (verdict, True)
    assert found.remedy == (
        "" if verdict == "pass" else "lower the sparsity, or calibrate on more traces"
    )


@pytest.mark.parametrize(
    ("text", "export_changed", "pruning_changed", "verdict"),
    [
        ("", 0.0, 0.0, "pass"),  # a model beside itself
        ("", 0.09, 0.9, "pass"),  # only the export has a limit by default: sqrt(0.02 / 2) at 8 bits
        ("", 0.11, 0.0, "fail"),
        ("export_changed = 0\n", 0.01, 0.0, "fail"),
        ("export_kl_nats = 0.5\n", 0.4, 0.0, "pass"),
        ("pruning_changed = 0.2\n", 0.0, 0.1, "pass"),
        ("pruning_changed = 0.2\n", 0.0, 0.3, "fail"),
    ],
)
def test_first_choices_have_limits(
    tmp_path: Path, text: str, export_changed: float, pruning_changed: float, verdict: str
) -> None:
    """A KL within its limit is not enough where the artifact clearly says other tokens."""
    arm = arm_of([record(0)])
    export = Divergence(1e-6, 0.5, export_changed)
    comparison = LogitComparison(10, export, Divergence(0.01, 0.5, pruning_changed))
    evidence = _evidence(_file(tmp_path, f"[logits]\n{text}"), arm, arm, logits=comparison)
    assert logits.check(evidence).verdict == verdict


def test_a_tie_is_no_other_token() -> None:
    """Only a first choice that the reference holds less than half as likely as its own counts."""
    from racdeploy.verification.top_logits import compare_top, take_top

    reference_TV = np.log(
        np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], dtype=np.float32)
    )
    other_TV = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    compared = compare_top(take_top(reference_TV), other_TV)
    assert compared.changed_T.tolist() == [False, False, True]


def test_the_published_schema_is_that_of_the_models() -> None:
    """Every check's limits are in it; ``python -m tests.verification.test_gate`` rewrites it."""
    assert (DOCS / "gate.schema.json").read_text(encoding="utf-8") == _published()


def test_the_page_names_every_limit() -> None:
    """docs/ci.md and the models say the same."""
    page = (DOCS / "ci.md").read_text(encoding="utf-8")
    for name in plugins.list_names("checks"):
        for limit in type(getattr(read_gate(), name)).model_fields:
            assert f"| `{name}` | `{limit}` |" in page, f"{name}.{limit} is missing"
    for tier in TIERS:
        assert f"`{tier}`" in page


def test_the_example_is_a_gate_file(tmp_path: Path) -> None:
    """``racdeploy init --gate``, the file in examples/ci and the defaults are one."""
    assert (DOCS.parent / "examples/ci/racdeploy-gate.toml").read_text(
        encoding="utf-8"
    ) == GATE_EXAMPLE
    written = read_gate(_file(tmp_path, GATE_EXAMPLE))
    assert written.model_dump() == read_gate().model_dump()
    jsonschema.validate(tomllib.loads(GATE_EXAMPLE), json.loads(_published()))
    with pytest.raises(jsonschema.ValidationError, match="acuracy"):
        jsonschema.validate({"acuracy": {}}, json.loads(_published()))


def test_the_verdict_follows_the_gates_confidence(tmp_path: Path) -> None:
    """4 of 200 lost: within 5 points at 90 %, not sure at 99.9 %."""
    dense = arm_of([record(index) for index in range(200)])
    pruned = arm_of([record(index, correct=index >= 4) for index in range(200)])
    verdicts: list[CheckResult] = [
        accuracy.check(_evidence(_file(tmp_path, f"confidence = {level}\n"), dense, pruned))
        for level in (0.9, 0.999)
    ]
    assert [check.verdict for check in verdicts] == ["pass", "inconclusive"]


if __name__ == "__main__":
    (DOCS / "gate.schema.json").write_text(_published(), encoding="utf-8")
