"""Commands that run a bundle: ``run`` asks it, ``bench`` measures it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from racdeploy.cli.console import err, out, print_json, reported
from racdeploy.cli.next_steps import WORTH_KERNELS
from racdeploy.cli.options import AccelOpt, JsonOpt, Kernels, ThreadsOpt, WorkOpt


@reported
def run(
    bundle: Path = typer.Argument(help="Bundle folder."),
    prompt: str = typer.Argument(help="What to ask."),
    max_thinking_tokens: int | None = typer.Option(
        None, min=0, help="Close the thinking after so many."
    ),
    temperature: float | None = typer.Option(
        None, min=0, help="0 is greedy; default: the bundle's."
    ),
    seed: int = typer.Option(0, min=0, help="Same seed, same answer."),
    show_thinking: bool = typer.Option(
        False, "--show-thinking", metavar="", help="Print the thinking too."
    ),
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Ask a bundle one question."""
    from racdeploy.manifest import Manifest
    from racdeploy.runtime import load

    # A plain file runs with changed bytes, too.
    Manifest.read(bundle).artifacts[0].check(bundle)

    with load(bundle, threads=threads, accel=accel) as model:
        zeros = model.manifest.pruning.get("sparsity", 0.0)
        _print_kernels(model.engine.about.get("kernels", ""), accel, zeros)
        result = model.generate(
            prompt, max_thinking_tokens=max_thinking_tokens, temperature=temperature, seed=seed
        )

    if json_output:
        print_json(asdict(result))
        return

    if show_thinking:
        err.print(result.thinking, style="dim", markup=False)
    out.print(result.answer, markup=False, soft_wrap=True)
    if result.state == "open":
        unfinished = f"the thinking did not end within {result.thinking_tokens} tokens"
        err.print(unfinished, style="yellow")


@reported
def bench(
    bundle: Path = typer.Argument(help="Bundle folder."),
    dense: Path | None = typer.Option(
        None, help="Dense artifact; default: the one that the build left in --work."
    ),
    artifact: str = typer.Option(
        "", help="Path in the bundle of the artifact; default: the first one."
    ),
    rounds: int = typer.Option(5, min=1, help="Alternating runs of each artifact."),
    prompt_tokens: int = typer.Option(256, min=8, help="Length of the prompt."),
    new_tokens: int = typer.Option(128, min=2, help="Tokens to decode."),
    parallel: int = typer.Option(1, min=1, help="Sequences decoded together."),
    work: WorkOpt = None,
    accel: AccelOpt = "auto",
    threads: ThreadsOpt = 0,
    json_output: JsonOpt = False,
) -> None:
    """Measure speed and memory of an artifact beside the dense one, alternating in one run."""
    from racdeploy.bundles import bench as benchmark
    from racdeploy.cli.progress import show_progress
    from racdeploy.manifest import Manifest
    from racdeploy.report.terminal import print_table
    from racdeploy.storage.caches import default_work

    dense = dense or benchmark.find_dense(bundle, work or default_work(), artifact)
    load = benchmark.Load(rounds, prompt_tokens, new_tokens, parallel, threads, accel)

    with show_progress(err) as progress:
        found = benchmark.bench(bundle, dense, load, progress, artifact=artifact)

    if json_output:
        print_json(found.to_json())
        return

    print_table(found.to_table(), out)
    if payoff := found.payoff():
        out.print(payoff, markup=False, soft_wrap=True)
    err.print(f"dense: {found.dense}\npruned: {found.pruned}", markup=False, soft_wrap=True)
    zeros = Manifest.read(bundle).pruning.get("sparsity", 0.0)
    _print_kernels(found.kernels, accel, zeros)


def _print_kernels(kernels: str, accel: Kernels, zeros: float) -> None:
    """Say in one line what ran a model, where its zeros make that a question."""
    matters = zeros >= WORTH_KERNELS or kernels.startswith("sparse")
    if kernels and matters and accel != "off":
        err.print(f"kernels: {kernels}", style="dim", markup=False, soft_wrap=True)
