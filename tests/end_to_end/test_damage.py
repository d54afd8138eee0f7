"""What verification catches: real damage to a real artifact, and the check that says so.
docs/verification.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from racdeploy import exporting
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import ExportResult
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.gates import GateResult
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.pruning import PrunedModel
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.recipe import Recipe
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report
from racdeploy.verification.checks import sparsity, thinking
from racdeploy.verification.evidence import Evidence
from racdeploy.verification.gate import read_gate
from racdeploy.verification.measurements import encode_probes, list_tensors, probe_tokens
from tests.references import gguf_damage as damage
from tests.support.commands import racdeploy
from tests.support.records import arm_of

PAGE = Path(__file__).parents[2] / "docs" / "verification.md"
OPTIONS = {
    "target": "ci-smoke",
    "prune": {"sparsity": 0.5},
    "traces": {"count": 64},
    "verify": {"count": 32, "max_new_tokens": 300, "logit_traces": 2},
}
"""The longest answer has 227 tokens, and 295 where thoughts are made 30 % longer."""
CLOSE_ID, EOS_ID = 511, 509  # </think> and <|im_end|> of the embedded model


@dataclass(frozen=True)
class Bench:
    """The embedded model, built and exported, ready to be damaged."""

    build: Build
    model: PrunedModel
    dense: ExportResult
    pruned: ExportResult

    def verify(
        self, pruned: ExportResult, build: Build | None = None, model: PrunedModel | None = None
    ) -> tuple[Report, list[AnswerRecord]]:
        """Verify an artifact that got past the gates in front of a build's verification."""
        build = build or self.build
        with open_engine(build.job.backend, pruned.path, EngineSettings(1024, 1)) as engine:
            probes = probe_tokens(engine.tokenize, encode_probes(build.job.encoder))
            findings = GateResult(probes, ())
        return build.evaluation.verify(model or self.model, self.dense, pruned, findings)


@pytest.fixture(scope="module")
def bench(work: Path) -> Bench:
    """Traces, pruned model and artifacts are those of the bundle."""
    build = Build(Job(Recipe.combine(None, OPTIONS)), work)
    model, name = build.prune(), build.job.model.name
    matrix = model.folder / IMPORTANCE_FILE
    dense = build.export(
        build.job.model.folder, f"{name}-dense-q8_0", pruned=False, importance=matrix
    )
    return Bench(build, model, dense, build.export(model.folder, name_artifact(build.job)))


def _said(report: Report, check: str) -> tuple[str, str]:
    found = next(found for found in report.checks if found.name == check)
    return found.verdict, found.summary


def test_the_undamaged_artifact_passes(bench: Bench) -> None:
    """Without damage no check fails, so what follows is the damage's own doing."""
    report, _ = bench.verify(bench.pruned)
    assert not {check.verdict for check in report.checks} & {"fail", "inconclusive"}
    assert report.verdict == "pass"


# Damage to the file: how it is made, the check that must fail, and what it says.
FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "wrong rope theta": (
        lambda file: damage.set_number(file, "qwen3.rope.freq_base", 500.0),
        "logits",
        "file against pruned: KL",
    ),
    "swapped q/k rows": (
        lambda file: [
            damage.move_rows(file, f"attn_{x}.weight", damage.swap_halves(64)) for x in "qk"
        ],  # type: ignore[return-value]
        "logits",
        "file against pruned: KL",
    ),
    "one block zeroed": (lambda file: damage.zero_block(file, 2), "accuracy", "drop "),
    "lost end-of-sequence": (
        lambda file: damage.set_number(file, "tokenizer.ggml.eos_token_id", 508),
        "tokens",
        "names id 508 as its end-of-sequence, the checkpoint",
    ),
    "answers that never end": (
        lambda file: damage.zero_rows(file, "token_embd.weight", [EOS_ID]),
        "thinking",
        "truncated: ",
    ),
    "unclosed thoughts": (
        lambda file: damage.zero_rows(file, "token_embd.weight", [CLOSE_ID]),
        "thinking",
        "unclosed 0 → 32",
    ),
    "template without <think>": (
        lambda file: damage.change_text(file, "tokenizer.chat_template", "<think>", "       "),
        "template",
        "prompts differ by the artifact's own template",
    ),
    "another pre-tokenizer": (
        lambda file: damage.change_text(file, "tokenizer.ggml.pre", "qwen2", "gpt-2"),
        "tokens",
        "of 380 strings differ; the first is",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_exporter_is_caught(bench: Bench, tmp_path: Path, name: str) -> None:
    """The file is whole and has the hash that its exporter gave it; what is in it is wrong."""
    change, check, words = FILES[name]
    file = Path(shutil.copy(bench.pruned.path, tmp_path))
    change(file)
    damaged = replace(bench.pruned, path=file, files={file.name: file_sha256(file)})
    report, _ = bench.verify(damaged)
    verdict, summary = _said(report, check)
    assert verdict == "fail", report.checks
    assert words in summary
    assert report.verdict == "fail"


def test_pruning_on_prompts_alone_is_caught(bench: Bench) -> None:
    """The same method, pattern and number of tokens at 65 % zeros, without the chain of thought.

    It loses 8 of 10 answers. At 60 % it loses a quarter or less, by the number of torch's threads,
    which 32 prompts do not always tell from the margin.
    """
    options = OPTIONS | {
        "prune": {"sparsity": 0.65},
        "calibration": {"source": "prompt"},
        "export": {"rounding": "nearest"},
    }
    other = replace(bench.build, job=Job(Recipe.combine(None, options)))
    model = other.prune()
    report, _ = bench.verify(other.export(model.folder, name_artifact(other.job)), other, model)
    verdict, summary = _said(report, "accuracy")
    assert (verdict, summary.startswith("drop ")) == ("fail", True)


def test_a_quant_that_loses_zeros_is_refused_and_caught(bench: Bench, tmp_path: Path) -> None:
    """Before any work by the build; and a file that got past it fails its sparsity."""
    outcome = racdeploy(
        "build", "--quant", "q4_k", "--packing", "bitmask", "--work", tmp_path / "work"
    )
    assert (outcome.code, outcome.error_code) == (2, "packing-unfit-for-quant"), outcome.err
    settings = bench.build.job.recipe.export.model_copy(update={"quant": "q4_k"})
    exported = exporting.write(Checkpoint(bench.model.folder), tmp_path / "model.gguf", settings)
    linears = [
        tensor for tensor in exported.tensors if tensor.source in bench.build.job.prunable_weights
    ]
    zeros = sum(tensor.zeros for tensor in linears) / len(linears)
    arm = replace(arm_of([]), quant="q4_k", sparsity=zeros)
    evidence = Evidence(
        settings=bench.build.job.recipe.verify,
        gate=read_gate(),
        dense=arm,
        pruned=arm,
        artifact=exported.path,
        artifact_files=exported.files,
        requested_sparsity=0.5,
        tensors=list_tensors(exported.tensors),
        prunable=frozenset(tensor.name for tensor in linears),
        packing="bitmask",
    )
    found = sparsity.check(evidence)
    assert (found.verdict, "q4_k does not keep zeros" in found.summary) == ("fail", True)


def test_longer_thinking_with_equal_accuracy_is_caught(bench: Bench) -> None:
    """The real dense answers against themselves, each thought 30 % longer."""
    _, records = bench.verify(bench.pruned)
    dense = [record for record in records if record.arm == "dense"]
    longer = [
        r.model_copy(update={"thinking_tokens": round(1.3 * r.thinking_tokens)}) for r in dense
    ]
    evidence = Evidence(
        settings=bench.build.job.recipe.verify,
        gate=read_gate(),
        dense=arm_of(dense),
        pruned=arm_of(longer),
        artifact=bench.pruned.path,
        artifact_files={},
        requested_sparsity=0.5,
    )
    found = thinking.check(evidence)
    assert (found.verdict, found.summary.startswith("length: thinking length ratio 1.3")) == (
        "fail",
        True,
    )


def test_the_page_tells_what_is_tested() -> None:
    """Each damage has its row, with the check that fails and what it says."""
    page = PAGE.read_text(encoding="utf-8")
    for name, (_, check, words) in FILES.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert f"| `{check}` |" in row
        assert words.strip() in row
