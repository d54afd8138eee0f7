"""How many tokens should a model be calibrated on?

    python -m benchmarks.off_levels MODEL build/model
    python -m benchmarks.calibration_tokens build/model --recipe RECIPE --work build/work

Prints the KL from the dense model on held-out traces and on two sets of text for each number of
tokens, and the seconds of the pruning. All numbers share the traces: they must be enough for the
greatest one. ``--own-text`` adds tokens that the model writes without a prompt. The recipe has
tasks and traces.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from racdeploy.pipeline.build import Build
from racdeploy.pipeline.divergence_stage import DivergenceMeter
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import RecipeSettings
from racdeploy.targets import Rung

RUNGS = (Rung(quant="q4_k_m"), Rung(quant="q4_k", keep={"ffn": 0.75}))
TOKENS = (2_048, 4_096, 8_192, 16_384, 32_768, 65_536)


def main() -> None:
    """Prune on every number of tokens, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--own-text", type=int, nargs="+", default=[0])
    parser.add_argument("--uncut", action="store_true", help="the rung without a cut alone")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    print("| model | tokens | KL, traces | equal | KL, text | equal | KL, other text | equal | s |")
    print("|---" * 9 + "|")
    for rung in RUNGS[: 1 if arguments.uncut else None]:
        settings: RecipeSettings = {
            "model": str(arguments.model),
            "export": {"quant": rung.quant},
            "structure": {"keep": rung.keep},
            "prune": {"sparsity": 0.0},
        }
        recipe = Recipe.combine(arguments.recipe, settings)
        build = Build(Job(recipe), arguments.work, arguments.threads)
        for tokens in arguments.tokens:
            for own_text in arguments.own_text:
                measure(build, rung, tokens, own_text)


def measure(build: Build, rung: Rung, tokens: int, own_text: int) -> None:
    """Prune a rung on a number of tokens, measure its file, and print a row."""
    recipe = build.job.recipe.with_settings(
        {"calibration": {"max_tokens": tokens, "own_text_tokens": own_text}}
    )
    own = replace(build, job=build.job.with_recipe(recipe))
    own.traces()
    began_s = time.perf_counter()
    model = own.prune()
    seconds = time.perf_counter() - began_s

    # The held-out traces do not depend on the number of tokens.
    meter = DivergenceMeter(own)
    exported = own.export_pruned()
    found = meter.measure(exported)
    other = meter.measure(exported, "report").text
    figures = []
    for passages in (found.traces, found.text, other):
        figures += [f"{passages.kl:.3g}", f"{passages.same_share:.1%}"]
    assert model.selection, "the model was pruned by this build"
    used = f"{model.selection.calibration_tokens:,}"
    if own_text:
        used += f" + {model.selection.own_text_tokens:,}"
    print(f"| {rung} | {used} | {' | '.join(figures)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
