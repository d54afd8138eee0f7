"""What pays at equal bytes: few bits, zeros and more bits, or a cut and more bits? On llama.cpp.

    python -m benchmarks.what_pays --out build/what-pays

Each arm is a model whose linears take about so many bits for each weight that the dense linears
have: dense in a number format of so many bits, rounded or with codes chosen by the descent that
also chooses zeros; zeros, whose file is packed; or narrower feed-forward parts. All arms answer the
same prompts. An arm is compared with its rival: the dense arm of its size, or of the next size that
has one, whose file is nearest to the dense model on held-out traces.

Writes table.md and results.json after every arm. What is finished is kept under --work and not done
again; more --prompts continue where fewer ended. ``--speed`` times every file in turns with its
rival's, one sequence on one thread, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._arms import NARROW, SIZES, WIDE, Arm
from benchmarks._setup import add_settings, with_settings
from benchmarks.calibration import gain, percent
from racdeploy import quant as quants
from racdeploy.bundles.bench import BenchSettings, measure_pair
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import ExportResult, measure_sparsity
from racdeploy.files.caches import default_work_folder
from racdeploy.models.families import generalize_expert
from racdeploy.packing.packers import bitmask
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import nest_settings
from racdeploy.results.answers import AnswerRecord
from racdeploy.verification.answer_sampler import SampledAnswers
from racdeploy.verification.evidence import completion_tokens
from racdeploy.verification.stats.lengths import length_ratio
from racdeploy.verification.stats.paired import wilson_interval
from racdeploy.verification.top_logits import compare_checkpoints

NEAR = 0.03
"""Share of its size by which an arm may miss it without a word."""
EIGHT_BITS = 8.5
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One arm that answered."""

    size: float
    arm: str
    kind: str
    bits: float
    is_ideal: bool  # the bits are those of an ideal packing, which no packer reaches yet
    linears_bytes: int
    zeros: float
    prompts: int
    accuracy: float
    accuracy_lower: float
    accuracy_upper: float
    thinking_tokens: float
    unclosed: int
    kl: float | None = None
    top1: float | None = None
    rival: str = ""
    gain: Mapping[str, float] | None = None
    length_ratio: tuple[float, float, float] | None = None  # with its interval, of 95 %
    # For a correct answer (95 %): 32 at once in the run that answered, and alone.
    served_seconds: tuple[float, float, float] | None = None
    seconds: Mapping[str, tuple[float, float, float]] | None = None  # by kernels


@dataclass(frozen=True)
class Done:
    """What an arm left on disk, and what it answered."""

    arm: Arm
    build: Build
    exported: ExportResult
    answers: SampledAnswers
    row: Row


def main() -> None:
    """Run the arms and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--tasks", nargs="*", default=[], help="all procedural ones by default")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=640)
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--traces", type=int, default=768)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--kl-traces", type=int, default=96, help="held out; 0 leaves KL out")
    parser.add_argument("--arms", nargs="*", default=[], help="their names; all by default")
    parser.add_argument("--sizes", nargs="*", type=float, default=SIZES)
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS")
    add_settings(parser)
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    found: list[Done] = []
    for arm in chosen_arms(arguments):
        found.append(run(arm, arguments))
        write(found, arguments)

    print((arguments.out / "table.md").read_text(encoding="utf-8"))


def known_arms(arguments: argparse.Namespace) -> tuple[Arm, ...]:
    """Return the arms that a model's rows allow."""
    checkpoint = Job(Recipe.combine(None, {"model": arguments.model})).checkpoint
    columns = {checkpoint.entries[name].shape[1] for name in checkpoint.shape.prunable_weights}
    return WIDE if all(each % 256 == 0 for each in columns) else NARROW


def chosen_arms(arguments: argparse.Namespace) -> list[Arm]:
    """Return the arms that the user chose, in our order."""
    known = known_arms(arguments)
    names = arguments.arms or [arm.name for arm in known if arm.size in arguments.sizes]
    if unknown := {*names} - {arm.name for arm in known}:
        raise SystemExit(f"no arm is called {', '.join(sorted(unknown))}")
    return [arm for arm in known if arm.name in names]


def recipe(arm: Arm, arguments: argparse.Namespace, packing: str = "plain") -> Recipe:
    """Return the recipe of one arm."""
    options: dict[str, Any] = {
        "model": arguments.model,
        "tasks": tuple(arguments.tasks),
        "traces": {"count": arguments.traces, "max_new_tokens": arguments.max_new_tokens},
        "calibration": {"max_tokens": arguments.calibration_tokens},
        "export": {"quant": arm.quant, "packing": packing, "allow_losing_zeros": True},
        "verify": {
            "count": arguments.prompts,
            "parallel": 32,
            "max_new_tokens": arguments.max_new_tokens,
            "context_tokens": arguments.context_tokens,
        },
    }
    settings = with_settings(options, [*arm.settings, *arguments.set])
    return Recipe.combine(None, nest_settings(settings))


def run(arm: Arm, arguments: argparse.Namespace) -> Done:
    """Prune, export, answer and describe one arm."""
    build = Build(Job(recipe(arm, arguments)), arguments.work, arguments.threads)
    if arm.rounded:
        folder = build.job.model.folder
        matrix = importance(arguments) if arm.size < EIGHT_BITS else None  # those round alike
        exported = build.export(folder, f"dense-{arm.quant}", pruned=False, importance=matrix)
    else:
        folder = build.prune().folder
        exported = build.export(folder, name_artifact(build.job))

    print(f"{arm.name}: exported", flush=True)
    answers = build.evaluation.answer(exported, arm.name, folder)

    row = Row(
        size=arm.size,
        arm=arm.name,
        kind=arm.kind,
        **measure_bits(arm, arguments, build, exported, folder),
        served_seconds=serve_seconds(answers),
        **describe_answers(answers.records),
        **divergence(build, exported, arguments),
    )
    print(json.dumps(asdict(row)), flush=True)
    return Done(arm, build, exported, answers, row)


def importance(arguments: argparse.Namespace) -> Path:
    """Return the file with the importance of the dense model's own thoughts.

    A walk leaves it that prunes nothing and chooses no codes: what chooses codes needs none.
    """
    found = recipe(Arm(0.0, "dense f16", "f16", ("sparsity=0.0",)), arguments)
    model = Build(Job(found), arguments.work, arguments.threads).prune()
    file = model.folder / IMPORTANCE_FILE
    assert file.is_file()
    return file


def measure_bits(
    arm: Arm, arguments: argparse.Namespace, build: Build, exported: ExportResult, folder: Path
) -> dict[str, Any]:
    """Return what the linears take for each weight of the dense ones: packed where there are zeros.

    Where no packer knows the format, the size is the ideal of one: a bit a weight, and the codes
    that are not zero.
    """
    checkpoint = build.job.checkpoint
    dense_weights = sum(
        math.prod(checkpoint.entries[n].shape) for n in checkpoint.shape.prunable_weights
    )
    sources = set(map(generalize_expert, checkpoint.shape.prunable_weights))
    share = (
        measure_sparsity(exported, checkpoint.shape.prunable_weights)
        if arm.kind == "zeros"
        else 0.0
    )
    is_ideal = bool(share and bitmask.reason_for_plain(arm.quant, share))

    stored = exported
    if share and not is_ideal:
        packed = Build(Job(recipe(arm, arguments, "bitmask")), arguments.work, arguments.threads)
        stored = packed.export(folder, name_artifact(packed.job))

    size_bytes = sum(each.size_bytes for each in stored.tensors if each.source in sources)
    if is_ideal:
        values = quants.load_grid(arm.quant).values
        size_bytes += round(dense_weights * (1 - share * math.log2(len(values))) / 8)

    return {
        "bits": 8 * size_bytes / dense_weights,
        "is_ideal": is_ideal,
        "linears_bytes": size_bytes,
        "zeros": share,
    }


def describe_answers(records: tuple[AnswerRecord, ...]) -> dict[str, Any]:
    """Return accuracy with its interval, thinking length and unclosed thoughts."""
    right = sum(record.correct for record in records)
    interval = wilson_interval(right, len(records))
    return {
        "prompts": len(records),
        "accuracy": right / len(records),
        "accuracy_lower": interval.lower,
        "accuracy_upper": interval.upper,
        "thinking_tokens": sum(record.thinking_tokens for record in records) / len(records),
        "unclosed": sum(record.state == "open" for record in records),
    }


def serve_seconds(answers: SampledAnswers) -> tuple[float, float, float] | None:
    """Return the engine's seconds for a correct answer; None where two runs answered."""
    counted = answers.stats or answers.reused_stats
    if not counted:
        return None

    speed = {
        "prefill_tokens_per_s": counted["prompt_tokens"] / counted["prefill_s"],
        "decode_tokens_per_s": counted["generated_tokens"] / counted["decode_s"],
    }
    return seconds_per_right(answers, speed)


def divergence(
    build: Build, exported: ExportResult, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return KL and top-1 of a file from the dense model, on its held-out traces; kept by hash."""
    if not arguments.kl_traces:
        return {}

    kept = arguments.out / f"kl-{exported.sha256[:16]}-{arguments.kl_traces}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))

    held_out = build.prune_stage.choose_traces(build.traces()[1]).held_out
    exact = EngineSettings(arguments.context_tokens, 1, build.threads, "f32")
    compared = compare_checkpoints(
        lambda: closing(open_engine(build.job.backend, exported.path, exact)),
        lambda: closing(open_engine("transformers", build.job.model.folder, exact)),
        lambda: closing(open_engine(build.job.backend, exported.path, exact)),
        [(each.prompt_ids, each.completion_ids) for each in held_out[: arguments.kl_traces]],
    )
    assert compared
    assert compared.pruning
    values = {"kl": compared.pruning.kl, "top1": compared.pruning.top1}
    kept.write_text(json.dumps(values))
    return values


def write(found: list[Done], arguments: argparse.Namespace) -> None:
    """Write what is known so far."""
    rows = [compared(done, find_rival(done, found), arguments) for done in found]
    text = "\n".join([table(rows), *cuts_over_zeros(found)]) + "\n"
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    values = [asdict(row) for row in rows]
    (arguments.out / "results.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def find_rival(done: Done, found: list[Done]) -> Done | None:
    """Return the dense arm to compare with, None for that arm itself.

    It is chosen by KL on traces and not by answers, which would favour it by chance.
    """
    known = [each for each in found if each.arm.kind == "dense" and each.arm.size >= done.arm.size]
    nearest = min(known, key=lambda each: (each.arm.size, each.row.kl or 0.0), default=None)
    return None if nearest is done else nearest


def cuts_over_zeros(found: list[Done]) -> list[str]:
    """Return what every cut gains over every arm with zeros of its size, a line a pair."""
    lines = []
    for done in found:
        for other in found:
            pair = (done.arm.kind, other.arm.kind)
            if pair == ("cut", "zeros") and done.arm.size == other.arm.size:
                points = signed(gain(other.answers.records, done.answers.records))
                lines.append(f"- {done.arm.size:g}: {done.arm.name} over {other.arm.name} {points}")

    return lines


def compared(done: Done, rival: Done | None, arguments: argparse.Namespace) -> Row:
    """Return a row with what the arm gains over its rival, and what a correct answer takes."""
    row = replace(done.row, seconds=time_answers(done, rival or done, arguments))
    if rival is None:
        return row

    budget = arguments.max_new_tokens
    before, after = rival.answers.records, done.answers.records
    lengths = [[record.thinking_tokens for record in records] for records in (before, after)]
    ratio = length_ratio(lengths[0], lengths[1], budget, confidence=0.95)
    return replace(
        row,
        rival=rival.arm.name,
        gain=gain(before, after),
        length_ratio=(ratio.ratio, ratio.lower, ratio.upper),
    )


def time_answers(
    done: Done, rival: Done, arguments: argparse.Namespace
) -> dict[str, tuple[float, float, float]]:
    """Return seconds for a correct answer, with the interval over the prompts, by kernels."""
    found = {}
    for mode in ("off", "auto") if done.arm.kind == "zeros" else ("off",):
        kept = arguments.out / f"speed-{done.exported.sha256[:16]}-{mode}.json"
        if not kept.is_file() and arguments.speed:
            kept.write_text(json.dumps(time_file(done, rival, mode, arguments.speed)))
        if kept.is_file():
            speed = json.loads(kept.read_text())
            found[speed["kernels"]] = seconds_per_right(done.answers, speed)

    return found


def time_file(done: Done, rival: Done, mode: Any, rounds: int) -> dict[str, Any]:
    """Return tokens a second of a file on one thread, timed in turns with its rival's."""
    load = BenchSettings(rounds, prompt_tokens=64, new_tokens=128, threads=1, accel=mode)
    settings = EngineSettings(512, 1, 1)
    vocabulary = done.build.job.checkpoint.shape.vocab_size
    files = (rival.exported.path, done.exported.path)
    timed = measure_pair(done.build.job.backend, *files, load, settings, vocabulary)

    _, own = timed.medians()
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    ratio = median(timed.ratios()["decode_tokens_per_s"])
    return {name: own[name] for name in names} | {"ratio": ratio, "kernels": timed.kernels}


def seconds_per_right(
    answers: SampledAnswers, speed: Mapping[str, float]
) -> tuple[float, float, float]:
    """Return seconds for a correct answer; the interval is a bootstrap over the prompts."""
    read_N = np.array([len(record.prompt_ids) for record in answers.records])
    written_N = np.array([completion_tokens(record) for record in answers.records])
    right_N = np.array([record.correct for record in answers.records])

    seconds_N = read_N / speed["prefill_tokens_per_s"] + written_N / speed["decode_tokens_per_s"]
    drawn_MN = np.random.default_rng(0).integers(len(right_N), size=(RESAMPLES, len(right_N)))
    means_M = seconds_N[drawn_MN].mean(1) / np.maximum(right_N[drawn_MN].mean(1), 1e-9)

    lower, upper = np.quantile(means_M, (0.025, 0.975))
    return float(seconds_N.mean() / max(right_N.mean(), 1e-9)), float(lower), float(upper)


def table(rows: list[Row]) -> str:
    """Return Markdown: a line an arm, smallest first."""
    columns = [
        *("bits", "arm", "accuracy (95 %)", "gain over the rival (95 %)", "thinking tokens"),
        *("length ratio (95 %)", "unclosed", "KL, nats", "s per correct answer, 32 at once"),
        "alone (95 %)",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    for row in sorted(rows, key=lambda row: row.size):
        cells = [
            f"{row.size:g}: {row.bits:.2f}{miss(row)}",
            row.arm,
            percent(row.accuracy, row.accuracy_lower, row.accuracy_upper),
            "rival" if row.gain is None else signed(row.gain),
            f"{row.thinking_tokens:.1f}",
            "{:.3f} ({:.3f} to {:.3f})".format(*row.length_ratio) if row.length_ratio else "",
            str(row.unclosed),
            "" if row.kl is None else f"{row.kl:.2g}",
            "{:.3g} ({:.3g} to {:.3g})".format(*row.served_seconds) if row.served_seconds else "",
            "; ".join("{:.3g} ({:.3g} to {:.3g})".format(*s) for s in (row.seconds or {}).values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")

    lines += ["", f"{rows[0].prompts} prompts. Ideal: no packer has that format yet."]
    return "\n".join(lines) + "\n"


def miss(row: Row) -> str:
    """Return by how much an arm misses its size, if by more than it may, and what its bits are."""
    off = row.bits / row.size - 1
    words = [f"{off:+.0%}"] if abs(off) > NEAR else []
    words += ["ideal"] if row.is_ideal else []
    return f" ({', '.join(words)})" if words else ""


def signed(gained: Mapping[str, float]) -> str:
    """Return points gained, with their interval."""
    points = [100 * gained[key] for key in ("accuracy", "lower", "upper")]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)


if __name__ == "__main__":
    main()
