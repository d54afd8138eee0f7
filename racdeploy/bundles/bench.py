"""Benchmark of a bundle's artifact against the dense one: medians of alternating rounds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TypedDict

from racdeploy import exporting
from racdeploy.engines import open_engine
from racdeploy.engines.engine import Engine, EngineSettings, Progress, Sampling
from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.files.sha256_cache import refuse_changed, take_states
from racdeploy.files.stages import finished_stages
from racdeploy.manifest import Manifest
from racdeploy.report.files import read_report
from racdeploy.report.tables import ReportTable
from racdeploy.results.report import BUILT_ROLES, COMPARED_ROLES
from racdeploy.runtime.deployed import find_model, find_plain
from racdeploy.runtime.loading import check_artifact_files
from racdeploy.sparse_kernels import AccelMode

_MIN_DECODE_S = 0.5  # shorter measurements are dominated by clock noise
_MAX_ANSWERS = 32
_MAX_SPREAD = 1.5  # of the ratio of both speeds, its highest over its lowest round
Figures = Mapping[str, float]

FIGURES = {
    "load_ms": "ms to load",
    "prefill_tokens_per_s": "prompt tokens/s",
    "decode_tokens_per_s": "tokens/s decoded",
    "peak_rss_bytes": "memory at the peak",
}


@dataclass(frozen=True)
class BenchSettings:
    """Settings of each round.

    ``parallel`` sequences are decoded together and their tokens are added up; 0 ``threads`` uses
    every core. ``accel`` applies to the pruned artifact, see :mod:`racdeploy.sparse_kernels`.
    """

    rounds: int = 5
    prompt_tokens: int = 256
    new_tokens: int = 128
    parallel: int = 1
    threads: int = 0
    accel: AccelMode = "auto"


class BenchSummary(TypedDict):
    """Medians of both artifacts with their paths, their ratios, and the settings."""

    dense: Mapping[str, str | float]
    pruned: Mapping[str, str | float]
    ratio: Mapping[str, float]
    ratio_range: Mapping[str, list[float]]
    file_bytes: Mapping[str, int]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    parallel: int
    threads: int
    kernels: str
    warning: str


@dataclass(frozen=True)
class BenchResult:
    """Figures of both artifacts per round, by the names in ``FIGURES``, and the settings."""

    load: BenchSettings
    dense: Path
    pruned: Path
    dense_rounds: tuple[Figures, ...]
    pruned_rounds: tuple[Figures, ...]
    kernels: str = ""
    dense_bytes: int = 0
    pruned_bytes: int = 0  # of the files; 0 if they are packed
    roles: tuple[str, str] = BUILT_ROLES  # words for both

    def medians(self) -> tuple[Figures, Figures]:
        """Return the median figures of the dense and the pruned artifact."""
        return _take_medians(self.dense_rounds), _take_medians(self.pruned_rounds)

    def ratios(self) -> dict[str, list[float]]:
        """Return the ratios of pruned to dense of all rounds, sorted, by the name of the figure."""
        ratios_by_name = {}
        for name in FIGURES:
            rounds = zip(self.dense_rounds, self.pruned_rounds, strict=True)
            ratios_by_name[name] = sorted(pruned[name] / dense[name] for dense, pruned in rounds)
        return ratios_by_name

    @property
    def warning(self) -> str:
        """Sentence on rounds that differ too much to compare, or an empty string."""
        ratios = self.ratios()["decode_tokens_per_s"]
        if ratios[-1] <= _MAX_SPREAD * ratios[0]:
            return ""
        return "too noisy to compare: raise --rounds, and run nothing else meanwhile"

    def to_table(self) -> ReportTable:
        """Return a table of both medians, and of the median and range of their ratio."""
        medians = self.medians()

        rows = []
        for name, ratios in self.ratios().items():
            sides = [_format_figure(name, side[name]) for side in medians]
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            rows.append((FIGURES[name], *sides, f"{median(ratios):.2f}", spread))

        if self.dense_bytes and self.pruned_bytes:
            sizes = (self.dense_bytes, self.pruned_bytes)
            sides = [_format_figure("file_bytes", size) for size in sizes]
            rows.append(("files", *sides, f"{sizes[1] / sizes[0]:.2f}", ""))

        together = self.load.parallel
        what = f"{together} at once" if together > 1 else "one sequence"
        columns = (what, *self.roles, "ratio", f"range of {self.load.rounds}")

        return ReportTable("", columns, tuple(rows))

    def to_json(self) -> BenchSummary:
        """Return the summary as JSON values."""
        dense, pruned = self.medians()
        load = self.load
        ratios = self.ratios()
        return {
            "dense": {"path": str(self.dense), **dense},
            "pruned": {"path": str(self.pruned), **pruned},
            "ratio": {name: median(values) for name, values in ratios.items()},
            "ratio_range": {name: [values[0], values[-1]] for name, values in ratios.items()},
            "file_bytes": {"dense": self.dense_bytes, "pruned": self.pruned_bytes},
            "rounds": load.rounds,
            "prompt_tokens": load.prompt_tokens,
            "new_tokens": load.new_tokens,
            "parallel": load.parallel,
            "threads": load.threads,
            "kernels": self.kernels,
            "warning": self.warning,
        }


def bench(
    bundle: Path,
    dense: Path,
    load: BenchSettings,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure the first artifact of a bundle, or a plain model, against a dense file.

    Args:
        progress: called with a label, the number of finished loads, and the number of all.

    Raises:
        ArtifactError: the dense file is missing, or the bundle is damaged.
        UsageError: the tokens exceed the context.
    """
    model = find_model(bundle)
    entry = model.entry
    listed = entry.files if model.manifest else {}
    states = take_states(bundle, listed)
    if model.manifest:
        check_artifact_files(bundle, model.manifest, entry)
    if not dense.is_file():
        raise ArtifactError(
            "no-dense-artifact",
            f"{dense} is not a file",
            remedy="give the dense artifact with --dense",
        )

    context_tokens = model.settings.generation.context_tokens
    if load.prompt_tokens + load.new_tokens > context_tokens:
        raise UsageError(
            "load-beyond-context",
            f"{load.prompt_tokens} and {load.new_tokens} tokens are more than the bundle's context "
            f"of {context_tokens}",
            remedy="lower --prompt-tokens or --new-tokens",
        )

    vocabulary = model.encoder.tokenizer.get_vocab_size()
    settings = EngineSettings(context_tokens, load.parallel, load.threads)
    result = measure_pair(
        entry.backend,
        dense,
        model.path,
        load,
        settings=settings,
        vocabulary=vocabulary,
        progress=progress,
    )
    refuse_changed(bundle, listed, states)
    # The engine reads other bytes than those of a packed file, whose size explains no speed.
    size_bytes = entry.size_bytes if entry.packing == "plain" else 0
    roles = BUILT_ROLES if model.manifest else COMPARED_ROLES
    return replace(result, pruned_bytes=size_bytes, roles=roles)


def measure_pair(
    backend: str,
    dense: Path,
    pruned: Path,
    load: BenchSettings,
    settings: EngineSettings,
    vocabulary: int,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure two files of one engine in alternation, on random ids below ``vocabulary``.

    Alternating, and reversing the order each round, spreads slow drifts of the machine (heat, other
    load) evenly over both.
    """
    ids = random.Random(0).choices(range(vocabulary), k=load.prompt_tokens)
    sides = [("dense", dense, settings), ("pruned", pruned, replace(settings, accel=load.accel))]

    progress = progress or (lambda label, done, loads, tokens=0: None)
    loads = 2 * (load.rounds + 1)
    rounds: dict[str, list[Figures]] = {"dense": [], "pruned": []}

    kernels = {}
    for number in range(loads // 2):
        for index, (name, file, side_settings) in enumerate(sides):
            progress("bench", 2 * number + index, loads)
            figures, kernels[name] = _measure(
                backend, file, side_settings, ids, new_tokens=load.new_tokens
            )
            rounds[name].append(figures)

        sides.reverse()

    progress("bench", loads, loads)

    # The first round only warms the page cache.
    return BenchResult(
        load,
        dense,
        pruned,
        dense_rounds=tuple(rounds["dense"][1:]),
        pruned_rounds=tuple(rounds["pruned"][1:]),
        kernels=kernels["pruned"],
        dense_bytes=exporting.count_weight_bytes(dense),
        pruned_bytes=exporting.count_weight_bytes(pruned),
    )


def find_dense_artifact(bundle: Path, work: Path) -> Path:
    """Return the dense artifact that the build left in ``work``."""
    if find_plain(bundle):
        raise ArtifactError(
            "no-dense-artifact",
            f"{bundle} is no bundle, which would name the file to measure it beside",
            remedy="give that file with --dense",
        )

    dense = read_report(bundle).dense_arm
    if file := find_dense_in_work(work, dense.files):
        return file

    manifest = Manifest.read(bundle)
    entry = manifest.artifacts[0]
    raise ArtifactError(
        "no-dense-artifact",
        f"no stage in {work} contains the dense {dense.quant} artifact of {manifest.base.name}",
        remedy=f"racdeploy export MODEL --target {entry.format} --quant {entry.quant}, then give "
        "the file with --dense; or name the build's folder with --work",
    )


def find_dense_in_work(work: Path, files: Mapping[str, str]) -> Path | None:
    """Return the path of an exported artifact with these file hashes, or None."""
    for stage in finished_stages(work, "export"):
        if stage.summary.get("files") == files:
            return stage.folder / str(stage.summary["path"])

    return None


def _format_figure(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _take_medians(rounds: Sequence[Figures]) -> Figures:
    medians = {}
    for name in FIGURES:
        medians[name] = median(figures[name] for figures in rounds)
    return medians


def _measure(
    backend: str, file: Path, settings: EngineSettings, ids: Sequence[int], new_tokens: int
) -> tuple[Figures, str]:
    """Load a file, decode for at least ``_MIN_DECODE_S``, and return figures and kernels."""
    sampling = Sampling(max_new_tokens=new_tokens, stop_ids=())
    max_answers = _MAX_ANSWERS * settings.parallel

    answers = 0
    with open_engine(backend, file, settings) as engine:
        engine.generate([ids[:8]], replace(sampling, max_new_tokens=2))  # warms the caches
        before = _read_stats(engine, backend)

        lasted_s = 0.0
        while not answers or (answers < max_answers and lasted_s < _MIN_DECODE_S):
            # Rotate each prompt by another offset, so that no prefix cache can serve it.
            offsets = [index % len(ids) for index in range(answers, answers + settings.parallel)]
            prompts = [[*ids[offset:], *ids[:offset]] for offset in offsets]
            engine.generate(prompts, sampling)

            answers += settings.parallel
            after = _read_stats(engine, backend)
            lasted_s = after["decode_s"] - before["decode_s"]

        kernels = str(engine.info.get("kernels", ""))

    spent = {name: after[name] - before[name] for name in after}
    figures = {
        "load_ms": after["load_ms"],
        "prefill_tokens_per_s": spent["prompt_tokens"] / spent["prefill_s"],
        # The first new token of each answer is computed with the prompt's last batch.
        "decode_tokens_per_s": (spent["generated_tokens"] - answers) / spent["decode_s"],
        "peak_rss_bytes": after["peak_rss_bytes"],
    }

    return figures, kernels


def _read_stats(engine: Engine, backend: str) -> dict[str, float]:
    if not engine.stats:
        raise EngineError("no-engine-stats", f"the engine {backend!r} reports no time and memory")
    return dict(engine.stats)
