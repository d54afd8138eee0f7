"""Speed and memory of a bundle's artifact beside the dense one: alternating rounds in one run, medians and ratios.

Each round loads both artifacts, each in a process of its own, the one that comes first changing from round to round: a
machine that grows slower meets both. The ratio is the median of the rounds' ratios. Every load finds the file in the
page cache, since a round that is not counted comes first. Knows no format: the engine is the manifest's.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from racdeploy.accel import Mode
from racdeploy.decoding.engine import Engine, EngineSettings, Sampling
from racdeploy.engines import open_engine
from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.export import ExportResult
from racdeploy.manifest import ArtifactEntry, Manifest
from racdeploy.recipe import Recipe, validate
from racdeploy.runtime.model import check_unpacked
from racdeploy.runtime.template import PromptEncoder
from racdeploy.storage.files import read_json

_LEAST_DECODE_S, _MOST_ANSWERS = 0.5, 32
Progress = Callable[[str, int, int], None]
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

    Args:
        rounds: how often each artifact is loaded and measured.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded after it.
        parallel: sequences decoded together; the figures count the tokens of all of them.
        threads: CPU threads; 0 uses every core.
        accel: kernels for sparse weights, see :func:`racdeploy.accel.enable`; the dense artifact has none to give them.
    """

    rounds: int = 5
    prompt_tokens: int = 256
    new_tokens: int = 128
    parallel: int = 1
    threads: int = 0
    accel: Mode = "auto"


@dataclass(frozen=True)
class Benchmark:
    """Figures of both artifacts, one for each round and by the names in ``FIGURES``, and the pruned one's kernels."""

    load: Load
    dense: Path
    pruned: Path
    dense_rounds: tuple[Round, ...]
    pruned_rounds: tuple[Round, ...]
    kernels: str = ""

    def medians(self) -> tuple[Round, Round]:
        """Return the medians of the dense and of the pruned artifact."""
        sides = self.dense_rounds, self.pruned_rounds
        dense, pruned = (
            {name: median(r[name] for r in rounds) for name in FIGURES} for rounds in sides
        )
        return dense, pruned

    def ratios(self, name: str) -> list[float]:
        """Return pruned over dense in every round, sorted."""
        return sorted(
            p[name] / d[name] for d, p in zip(self.dense_rounds, self.pruned_rounds, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        dense, pruned = self.medians()
        ratios = {name: self.ratios(name) for name in FIGURES}
        return {
            "dense": {"path": str(self.dense), **dense},
            "pruned": {"path": str(self.pruned), **pruned},
            "ratio": {name: median(found) for name, found in ratios.items()},
            "ratio_range": {name: [found[0], found[-1]] for name, found in ratios.items()},
            "rounds": self.load.rounds,
            "prompt_tokens": self.load.prompt_tokens,
            "new_tokens": self.load.new_tokens,
            "parallel": self.load.parallel,
            "threads": self.load.threads,
            "kernels": self.kernels,
        }


def bench(
    bundle: Path, dense: Path, load: Load, progress: Progress | None = None, *, artifact: str = ""
) -> Benchmark:
    """Measure an artifact of a bundle beside the dense one.

    Args:
        bundle: folder that ``racdeploy build`` wrote.
        dense: the dense artifact, for the same engine.
        load: what every round does.
        progress: called with a label, loads done and loads in all.
        artifact: its path in the bundle; empty takes the first one.

    Raises:
        ArtifactError: the bundle is damaged, or there is no dense artifact.
        UsageError: the context does not hold prompt and completion, or there is no such artifact.
        EngineError: the engine cannot run one of them.
    """
    manifest = Manifest.read(bundle)
    entry, context_tokens = find_artifact(bundle, artifact), manifest.generation.context_tokens
    check_unpacked(bundle, entry)
    if not dense.is_file():
        raise ArtifactError(f"{dense} is not a file", remedy="give the dense artifact with --dense")
    if load.prompt_tokens + load.new_tokens > context_tokens:
        raise UsageError(
            f"{load.prompt_tokens} and {load.new_tokens} tokens are more than the bundle's context of {context_tokens}",
            remedy="lower --prompt-tokens or --new-tokens",
        )
    vocabulary = PromptEncoder.from_folder(bundle).tokenizer.get_vocab_size()
    ids = random.Random(0).choices(range(vocabulary), k=load.prompt_tokens)
    stock = EngineSettings(context_tokens, load.parallel, load.threads)
    settings = {"dense": stock, "pruned": replace(stock, accel=load.accel)}
    files = {"dense": dense, "pruned": bundle / entry.path}
    rounds: dict[str, list[Round]] = {name: [] for name in files}
    kernels = ""
    for number in range(load.rounds + 1):  # the first is not counted
        for place, name in enumerate(sorted(files, reverse=number % 2 == 1)):
            if progress:
                progress("bench", 2 * number + place, 2 * load.rounds + 2)
            found, kernels_of = _measure(
                entry.backend, files[name], settings[name], ids, load.new_tokens
            )
            rounds[name].append(found)
            kernels = kernels_of if name == "pruned" else kernels
    if progress:
        progress("bench", 2 * load.rounds + 2, 2 * load.rounds + 2)
    return Benchmark(
        load,
        dense,
        files["pruned"],
        tuple(rounds["dense"][1:]),
        tuple(rounds["pruned"][1:]),
        kernels,
    )


def find_artifact(bundle: Path, path: str = "") -> ArtifactEntry:
    """Return an artifact of a bundle by its path there, the first one where none is given.

    Raises:
        UsageError: the bundle has no such artifact.
    """
    artifacts = Manifest.read(bundle).artifacts
    found = [entry for entry in artifacts if entry.path == (path or artifacts[0].path)]
    if not found:
        known = ", ".join(entry.path for entry in artifacts)
        raise UsageError(
            f"{bundle} has no artifact {path!r}", remedy=f"--artifact is one of {known}"
        )
    return found[0]


def find_dense(bundle: Path, work: Path, artifact: str = "") -> Path:
    """Return the dense artifact that the build of a bundle left among its stage results.

    Args:
        bundle: folder that ``racdeploy build`` wrote.
        work: where its stages are.
        artifact: path in the bundle of the one it is for; a build makes a dense one for the first alone.

    Raises:
        ArtifactError: there is none.
    """
    manifest, entry = Manifest.read(bundle), find_artifact(bundle, artifact)
    remedy = (
        f"racdeploy export MODEL --target {entry.format} --quant {entry.quant}, then give the file with --dense; "
        "or name the build's folder with --work"
    )
    if entry != manifest.artifacts[0]:
        raise ArtifactError(
            f"a build makes no dense artifact beside {entry.path}", remedy=remedy.partition(";")[0]
        )
    recipe = validate(Recipe, manifest.recipe, f"{bundle}/racdeploy.json")
    digest = hashlib.sha256()
    for name, sha256 in manifest.base["files"].items():  # as Checkpoint.sha256
        digest.update(f"{name}\0{sha256}\0".encode())
    export = recipe.export.model_copy(update={"packing": "plain"}).model_dump(
        mode="json", exclude={"importance"}
    )
    wanted = {"model": digest.hexdigest(), "export": export, "metadata": {}}
    found = [
        record.parent
        for record in work.glob("export-*/inputs.json")
        if (record.parent / "stage.json").is_file() and wanted.items() <= read_json(record).items()
    ]
    if not found:
        raise ArtifactError(
            f"no stage in {work} holds the dense {recipe.export.quant} artifact of {manifest.base['name']}",
            remedy=remedy,
        )
    newest = max(found, key=lambda folder: (folder / "stage.json").stat().st_mtime)
    return ExportResult.from_json(newest, read_json(newest / "stage.json")).path


def figure_text(name: str, value: float) -> str:
    """Return a figure as people read it."""
    return (
        f"{value / 1e6:,.1f} MB"
        if name.endswith("_bytes")
        else f"{value:,.1f}"
        if value < 100
        else f"{value:,.0f}"
    )


def _measure(
    backend: str, file: Path, settings: EngineSettings, ids: Sequence[int], new_tokens: int
) -> tuple[Round, str]:
    """Load an artifact, read prompts and decode after them; a few tokens before that warm the caches.

    Small models answer in milliseconds; they get further prompts until the decoding has lasted.

    Returns:
        The figures, and what the engine says of its kernels.
    """
    with contextlib.closing(open_engine(backend, file, settings)) as engine:
        engine.generate([ids[:8]], Sampling(max_new_tokens=2, stop_ids=()))
        before = after = _stats(engine, backend)
        answers = 0
        while not answers or (
            answers < _MOST_ANSWERS * settings.parallel
            and after["decode_s"] - before["decode_s"] < _LEAST_DECODE_S
        ):
            turns = [place % len(ids) for place in range(answers, answers + settings.parallel)]
            prompts = [
                [*ids[turn:], *ids[:turn]] for turn in turns
            ]  # no engine has one in its cache
            engine.generate(prompts, Sampling(max_new_tokens=new_tokens, stop_ids=()))
            after = _stats(engine, backend)
            answers += len(prompts)
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


def _stats(engine: Engine, backend: str) -> dict[str, float]:
    stats: dict[str, float] = dict(engine.stats)
    if not stats:
        raise EngineError(f"the engine {backend!r} does not count its time and memory")
    return stats
