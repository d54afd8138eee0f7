"""Speed and memory of a bundle's artifact beside the dense one: medians of alternating rounds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from racdeploy import export
from racdeploy.engines import open_engine
from racdeploy.engines.engine import Engine, EngineSettings, Progress, Sampling
from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.export import ExportResult
from racdeploy.files.stages import finished_stages
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.report.files import read_report
from racdeploy.report.tables import Table
from racdeploy.runtime.loading import check_what_runs
from racdeploy.runtime.template import PromptEncoder
from racdeploy.sparse_kernels import Mode
from racdeploy.verify.baseline import find_dense_arm

_LEAST_DECODE_S = 0.5  # decoding has to last this long, or the clock's own noise shows
_MOST_ANSWERS = 32
Round = Mapping[str, float]

FIGURES = {
    "load_ms": "ms to load",
    "prefill_tokens_per_s": "prompt tokens/s",
    "decode_tokens_per_s": "tokens/s decoded",
    "peak_rss_bytes": "memory at the peak",
}


@dataclass(frozen=True)
class Load:
    """What every round does.

    ``parallel`` sequences are decoded together, and their tokens counted together; 0 ``threads``
    use every core. ``accel`` is for the pruned artifact, see :mod:`racdeploy.sparse_kernels`.
    """

    rounds: int = 5
    prompt_tokens: int = 256
    new_tokens: int = 128
    parallel: int = 1
    threads: int = 0
    accel: Mode = "auto"


@dataclass(frozen=True)
class Benchmark:
    """Figures of both artifacts for each round, by the names in ``FIGURES``, and what ran."""

    load: Load
    dense: Path
    pruned: Path
    dense_rounds: tuple[Round, ...]
    pruned_rounds: tuple[Round, ...]
    kernels: str = ""
    dense_bytes: int = 0
    pruned_bytes: int = 0  # of the files; 0 where the engine opens another one, made of them

    def medians(self) -> tuple[Round, Round]:
        """Return those of the dense and of the pruned artifact."""
        return _take_medians(self.dense_rounds), _take_medians(self.pruned_rounds)

    def ratios(self) -> dict[str, list[float]]:
        """Return pruned over dense in every round, sorted, by the name of the figure."""
        rounds = list(zip(self.dense_rounds, self.pruned_rounds, strict=True))
        return {
            name: sorted(pruned[name] / dense[name] for dense, pruned in rounds) for name in FIGURES
        }

    def to_table(self) -> Table:
        """Return the medians of both, their ratio and its range over the rounds."""
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
        columns = (what, "dense", "pruned", "ratio", f"range of {self.load.rounds}")

        return Table("", columns, tuple(rows))

    def to_json(self) -> dict[str, Any]:
        dense, pruned = self.medians()
        load = asdict(self.load)
        del load["accel"]

        ratios = self.ratios()
        return {
            "dense": {"path": str(self.dense), **dense},
            "pruned": {"path": str(self.pruned), **pruned},
            "ratio": {name: median(found) for name, found in ratios.items()},
            "ratio_range": {name: [found[0], found[-1]] for name, found in ratios.items()},
            "file_bytes": {"dense": self.dense_bytes, "pruned": self.pruned_bytes},
            **load,
            "kernels": self.kernels,
        }


def bench(
    bundle: Path, dense: Path, load: Load, progress: Progress | None = None, *, artifact: str = ""
) -> Benchmark:
    """Measure an artifact, by its path or the first; ``progress`` gets label, loads done, loads."""
    manifest = Manifest.read(bundle)
    entry = _find_artifact(bundle, manifest, artifact)
    check_what_runs(bundle, manifest, entry)
    if not dense.is_file():
        raise ArtifactError(
            "no-dense-artifact",
            f"{dense} is not a file",
            remedy="give the dense artifact with --dense",
        )

    context_tokens = manifest.generation.context_tokens
    if load.prompt_tokens + load.new_tokens > context_tokens:
        raise UsageError(
            "load-beyond-context",
            f"{load.prompt_tokens} and {load.new_tokens} tokens are more than the bundle's context "
            f"of {context_tokens}",
            remedy="lower --prompt-tokens or --new-tokens",
        )

    vocabulary = PromptEncoder.from_folder(bundle).tokenizer.get_vocab_size()
    settings = EngineSettings(context_tokens, load.parallel, load.threads)
    pruned = bundle / entry.path

    found = compare(entry.backend, dense, pruned, load, settings, vocabulary, progress)
    # Where the engine reads what is unpacked, the size of the packed file says nothing of speed.
    return replace(found, pruned_bytes=0 if entry.unpacked_sha256 else entry.size_bytes)


def compare(
    backend: str,
    dense: Path,
    pruned: Path,
    load: Load,
    settings: EngineSettings,
    vocabulary: int,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure two files of one engine in turns, on a prompt of ids below ``vocabulary``."""
    ids = random.Random(0).choices(range(vocabulary), k=load.prompt_tokens)
    sides = [("dense", dense, settings), ("pruned", pruned, replace(settings, accel=load.accel))]

    progress = progress or (lambda label, done, loads, tokens=0: None)
    loads = 2 * (load.rounds + 1)
    rounds: dict[str, list[Round]] = {"dense": [], "pruned": []}

    kernels: dict[str, str] = {}
    for number in range(loads // 2):
        for place, (name, file, own) in enumerate(sides):
            progress("bench", 2 * number + place, loads)
            figures, kernels[name] = _measure(backend, file, own, ids, load.new_tokens)
            rounds[name].append(figures)

        sides.reverse()

    progress("bench", loads, loads)

    # The first round only fills the page cache.
    dense_rounds = tuple(rounds["dense"][1:])
    pruned_rounds = tuple(rounds["pruned"][1:])

    ran = (load, dense, pruned, dense_rounds, pruned_rounds, kernels["pruned"])
    return Benchmark(*ran, export.weight_bytes(dense), export.weight_bytes(pruned))


def find_dense(bundle: Path, work: Path, artifact: str = "") -> Path:
    """Return the dense artifact that the build left in ``work``; it has one for the first alone."""
    manifest = Manifest.read(bundle)
    entry = _find_artifact(bundle, manifest, artifact)
    build_again = (
        f"racdeploy export MODEL --target {entry.format} --quant {entry.quant}, "
        "then give the file with --dense"
    )
    if entry != manifest.artifacts[0]:
        missing = f"a build makes no dense artifact beside {entry.path}"
        raise ArtifactError("no-dense-artifact", missing, remedy=build_again)

    dense = find_dense_arm(read_report(bundle))

    if found := locate_dense(work, dense.files):
        return found

    name = manifest.base.get("name", "the model")
    raise ArtifactError(
        "no-dense-artifact",
        f"no stage in {work} holds the dense {dense.quant} artifact of {name}",
        remedy=f"{build_again}; or name the build's folder with --work",
    )


def locate_dense(work: Path, files: Mapping[str, str]) -> Path | None:
    """Return where a build left the artifact with these hashes, or None."""
    for stage in finished_stages(work, "export"):
        exported = ExportResult.from_json(stage.folder, stage.summary)
        if exported.files == files:
            return exported.path

    return None


def _format_figure(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _find_artifact(bundle: Path, manifest: Manifest, path: str) -> ArtifactEntry:
    for entry in manifest.artifacts:
        if not path or entry.path == path:
            return entry

    known = ", ".join(entry.path for entry in manifest.artifacts)
    raise UsageError(
        "unknown-artifact",
        f"{bundle} has no artifact {path!r}",
        remedy=f"--artifact is one of {known}",
    )


def _take_medians(rounds: Sequence[Round]) -> Round:
    return {name: median(figures[name] for figures in rounds) for name in FIGURES}


def _measure(
    backend: str, file: Path, settings: EngineSettings, ids: Sequence[int], new_tokens: int
) -> tuple[Round, str]:
    """Return the figures of one load, long enough to be measured, and the engine's kernels."""
    sampling = Sampling(max_new_tokens=new_tokens, stop_ids=())
    most_answers = _MOST_ANSWERS * settings.parallel

    answers = 0
    with open_engine(backend, file, settings) as engine:
        engine.generate([ids[:8]], replace(sampling, max_new_tokens=2))  # warms the caches
        before = _read_stats(engine, backend)

        lasted_s = 0.0
        while not answers or (answers < most_answers and lasted_s < _LEAST_DECODE_S):
            # Every prompt is turned further: no engine has it in its cache.
            turns = [place % len(ids) for place in range(answers, answers + settings.parallel)]
            prompts = [[*ids[turn:], *ids[:turn]] for turn in turns]
            engine.generate(prompts, sampling)

            answers += settings.parallel
            after = _read_stats(engine, backend)
            lasted_s = after["decode_s"] - before["decode_s"]

        kernels = str(engine.about.get("kernels", ""))

    spent = {name: after[name] - before[name] for name in after}
    figures = {
        "load_ms": after["load_ms"],
        "prefill_tokens_per_s": spent["prompt_tokens"] / spent["prefill_s"],
        # The first new token of an answer comes out of the prompt's last batch.
        "decode_tokens_per_s": (spent["generated_tokens"] - answers) / spent["decode_s"],
        "peak_rss_bytes": after["peak_rss_bytes"],
    }

    return figures, kernels


def _read_stats(engine: Engine, backend: str) -> dict[str, float]:
    if not engine.stats:
        raise EngineError(
            "no-engine-stats", f"the engine {backend!r} does not count its time and memory"
        )
    return dict(engine.stats)
