"""Use one more plugin of every kind through the product's doors; print what each gave, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy import engines, exporting, harnesses, packing, quant, recovery, tasks
from racdeploy.engines.backends.transformers import open_engine as open_torch
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.recipe import Pruning, Structure, Verification
from racdeploy.tasks import scoring
from racdeploy.traces.trace import Trace
from racdeploy.verification.evidence import Evidence, run_checks
from racdeploy.verification.gate import read_gate
from racdeploy.verification.harness import compare
from tests.support.records import arm_of, record
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_training_run import make_training_run

PROMPT = [5, 90, 3, 40, 41, 42]
SETTINGS = EngineSettings(context_tokens=128, parallel=2, threads=1, cache_dtype="f32")


def use_task(folder: Path) -> Any:
    """Draw an evaluation problem."""
    (problem,) = tasks.load("remainder").draw_problems("evaluation", 0, 1)
    return [problem.task, scoring.score("", rf"\boxed{{{problem.gold}}}", problem.gold).correct]


def use_scorer(folder: Path) -> Any:
    """Score one right and one wrong answer."""
    answers = ("It is Paris.", "It is Rome.")
    return [scoring.score("last_word", answer, "paris").correct for answer in answers]


def use_family(folder: Path) -> Any:
    """Export a model, run it on llama.cpp, and compare its logits with torch's."""
    checkpoint = make_checkpoint(folder / "olmo", "olmo2")
    file = folder / "olmo.gguf"
    exporting.load("gguf").export(
        Checkpoint(checkpoint), file, quant="f32", packing="plain", metadata=None, progress=None
    )

    found = engines.open_engine("llamacpp", file, SETTINGS)
    expected = open_torch(checkpoint, SETTINGS)
    try:
        logits_TV, reference_TV = found.logits(PROMPT), expected.logits(PROMPT)
    finally:
        found.close()
        expected.close()
    return bool(np.abs(logits_TV - reference_TV).max() < 1e-4 * np.abs(reference_TV).max())


def use_quant(folder: Path) -> Any:
    """Quantize a row of ones and read it back."""
    plugin = quant.load("iq4_xs")
    ones_OI = np.ones((1, 256), dtype=np.float32)
    restored_OI = plugin.dequantize(plugin.quantize(ones_OI), 256)
    return bool(np.allclose(restored_OI, ones_OI, atol=0.01))


def use_preset(folder: Path) -> Any:
    """Export with the preset."""
    return sorted(set(_export(folder, quant="sparse_q5").values()))


def use_packing(folder: Path) -> Any:
    """Export packed, and read the label that the file carries."""
    packing.check("gguf", "f16", "twin")
    result = exporting.load("gguf").export(
        Checkpoint(make_checkpoint(folder / "zeros", "llama")),
        folder / "twin.racgguf",
        quant="f16",
        packing="twin",
        metadata=None,
        progress=None,
    )
    plain = gguf.unpack(result.path, folder / "untwinned.gguf")
    metadata, _ = exporting.load("gguf").measure(result.path)
    return [metadata.get("racgguf.packing"), plain.is_file()]


def use_engine(folder: Path) -> Any:
    """Generate on it."""
    _export(folder, quant="f32")
    engine = engines.open_engine("serial", folder / "tiny.gguf", SETTINGS)
    try:
        (completion,) = engine.generate([PROMPT], Sampling(max_new_tokens=4, stop_ids=()))
    finally:
        engine.close()
    return len(completion.ids)


def use_structure(folder: Path) -> Any:
    """Cut by it; return the pairs that stay in each block, and the channels."""
    structure = Structure(keep={"channel_pairs": 2 / 3}, uniform=True)
    _prune(folder, structure, method="sparsegpt")
    outline = read_cut_plan(folder / "method-channel_pairs")
    shape = outline.shape(Checkpoint(folder / "dense").shape, structure)
    return [list(outline.units["channel_pairs"]), list(shape.widths["intermediate_size"])]


def use_criterion(folder: Path) -> Any:
    """Cut by it; return the channels that go from each block."""
    structure = Structure(keep={"ffn": 2 / 3}, criterion="low_numbers", uniform=True)
    _prune(folder, structure, method="magnitude")
    files = sorted((folder / "method-ffn").glob("block-*.json"))
    kept = [json.loads(file.read_text())["kept"]["ffn"] for file in files]
    return [own[0] for own in kept]


def use_recover_method(folder: Path) -> Any:
    """Recover by it; return how many tokens were learned, and whether that helped."""
    place = folder / "recover_method"
    place.mkdir()
    training_run = make_training_run(place, num_hidden_layers=4)
    first, *later = recovery.load("quarter").recover(training_run)
    found = [look.kl_nats or 0.0 for look in later]
    return [later[-1].tokens >= training_run.tokens, min(found) < (first.kl_nats or 0.0)]


def use_objective(folder: Path) -> Any:
    """Train by it; return how many tokens were learned, and whether that helped."""
    place = folder / "objective"
    place.mkdir()
    training_run = make_training_run(place)
    training_run = replace(
        training_run,
        objective="longest",
        train_traces=_answer_alike(training_run.train_traces),
        held_out=_answer_alike(training_run.held_out),
    )
    first, *later = recovery.load("full").recover(training_run)
    found = [look.kl_nats or 0.0 for look in later]
    return [later[-1].tokens >= training_run.tokens, min(found) < (first.kl_nats or 0.0)]


def _answer_alike(traces: Sequence[Trace]) -> list[Trace]:
    """Return two right answers of one token, of two lengths, to each prompt."""
    return [
        replace(
            trace,
            correct=True,
            truncated=False,
            thinking_tokens=length,
            completion_ids=(7,) * (length + 2),
        )
        for trace in traces
        for length in (20, 24)
    ]


def use_prune_method(folder: Path) -> Any:
    """Prune with it."""
    return _prune(folder, method="random_mask")


def use_allocation(folder: Path) -> Any:
    """Prune by it."""
    return _prune(folder, allocation="shielded")


def use_format(folder: Path) -> Any:
    """Export to it, and run the file on its engine."""
    plugin = exporting.load("gguf_twin")
    place = plugin.artifact_path("tiny", "f32", "plain")
    (folder / place.parent).mkdir()
    plugin.export(
        Checkpoint(make_checkpoint(folder / "twin", "llama")),
        folder / place,
        quant="f32",
        packing="plain",
        metadata=None,
        progress=None,
    )
    engine = engines.open_engine(plugin.BACKEND, folder / place, SETTINGS)
    try:
        return [place.as_posix(), list(engine.logits(PROMPT).shape)]
    finally:
        engine.close()


def use_onnx_exporter(folder: Path) -> Any:
    """Export with ``auto``: it is asked first, and the notes say who made the graph."""
    result = exporting.load("onnx").export(
        Checkpoint(make_checkpoint(folder / "onnx", "llama")),
        folder / "model.onnx",
        quant="f32",
        packing="plain",
        metadata=None,
        progress=None,
        exporter="auto",
    )
    return any(note.startswith("ONNX graph by genai_llama") for note in result.notes)


def use_check(folder: Path) -> Any:
    """Verify: it takes part in every verification."""
    arm, file = arm_of([record(index) for index in range(40)]), Path(__file__)
    evidence = Evidence(
        settings=Verification().with_limits(),
        gate=read_gate(None),
        dense=arm,
        pruned=arm,
        artifact=file,
        artifact_files={file.name: ""},
        requested_sparsity=0.5,
    )
    return {check.name: check.verdict for check in run_checks(evidence)}["answered"]


def use_harness(folder: Path) -> Any:
    """Read what it wrote of two models, and compare them."""
    tally = harnesses.load("tally")

    found = []
    for figures in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}):
        (folder / "tally.json").write_text(json.dumps({"sums": figures}))
        found.append(harnesses.read(tally, Path(sys.executable), folder))

    (row,) = compare(*found, 0.90)
    return [row.difference, row.task]


def _export(folder: Path, quant: str) -> dict[str, str]:
    checkpoint = Checkpoint(make_checkpoint(folder / "tiny", "llama"))
    result = exporting.load("gguf").export(
        checkpoint,
        folder / "tiny.gguf",
        quant=quant,
        packing="plain",
        metadata=None,
        progress=None,
    )
    return {tensor.name: tensor.actual_quant for tensor in result.tensors if len(tensor.shape) == 2}


def _prune(folder: Path, structure: Structure | None = None, **settings: str) -> Any:
    """Return the mean sparsity that was reached, and the lowest and the highest."""
    random = np.random.default_rng(0)
    traces = []
    for index in range(4):
        ids = tuple(random.integers(0, 480, 40).tolist())
        traces.append(
            Trace(
                index=index,
                task="random",
                question=f"{index}",
                gold="",
                prompt_ids=ids[:8],
                completion_ids=ids[8:],
                answer_from=None,
                thinking_tokens=32,
                truncated=False,
                correct=True,
            )
        )

    out = folder / "-".join([*settings, *(structure.cut_parts if structure else ())])
    out.mkdir()
    checkpoint = Checkpoint(make_checkpoint(folder / "dense", "llama"))
    rows, _ = prune_blocks(
        checkpoint,
        traces[:3],
        traces[3:],
        Pruning.model_validate({"sparsity": 0.5, **settings}),
        out,
        structure=structure or Structure(),
    )
    reached = [round(row.actual_sparsity, 2) for row in rows]
    return [min(reached), max(reached)]


USES: dict[str, Callable[[Path], Any]] = {
    "tasks": use_task,
    "scorers": use_scorer,
    "families": use_family,
    "quant": use_quant,
    "presets": use_preset,
    "packing": use_packing,
    "engines": use_engine,
    "structures": use_structure,
    "criteria": use_criterion,
    "recover_methods": use_recover_method,
    "objectives": use_objective,
    "prune_methods": use_prune_method,
    "allocations": use_allocation,
    "formats": use_format,
    "onnx_exporters": use_onnx_exporter,
    "checks": use_check,
    "harnesses": use_harness,
}

if __name__ == "__main__":
    print(json.dumps({kind: use(Path(sys.argv[1])) for kind, use in USES.items()}))
