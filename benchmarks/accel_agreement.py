"""Does a model answer the same on the sparse kernels? Greedy answers of a bundle, token by token.

    racdeploy build tiny-reasoner --target gguf --out build/bundle
    racdeploy build tiny-reasoner --target onnx --packing bitmask_op --out build/onnx-bundle
    racdeploy accel build
    python benchmarks/accel_agreement.py build/bundle --prompts 200
    python benchmarks/accel_agreement.py build/onnx-bundle --prompts 200

Compares with the engine's own kernels, one sequence at a time: themselves at another number of
sequences, on llama.cpp with flash attention, which sums in another order too, and the sparse
kernels at both numbers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from racdeploy.decoding.engine import Completion, EngineSettings, Sampling
from racdeploy.engines import open_engine
from racdeploy.manifest import Manifest
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.runtime.template import PromptEncoder
from racdeploy.storage.toml import validate


def main() -> None:
    """Answer on each path and print how many answers are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    manifest = Manifest.read(arguments.bundle)
    recipe = validate(Recipe, manifest.recipe, "recipe")
    counted = recipe.model_copy(
        update={"verify": recipe.verify.model_copy(update={"count": arguments.prompts})}
    )
    encoder = PromptEncoder.from_folder(arguments.bundle)
    prompts = [encoder.encode(problem.question) for problem in Job(counted).problems("evaluation")]
    sampling = Sampling(manifest.generation.max_new_tokens, manifest.tokenizer.eos_ids)
    entry = manifest.artifacts[0]
    stock = EngineSettings(
        manifest.generation.context_tokens, parallel=1, threads=arguments.threads
    )
    sides = {
        "stock, 1 sequence": stock,
        "stock, 8 sequences": replace(stock, parallel=8),
        **(
            {"stock, flash attention": replace(stock, flash_attention=True)}
            if entry.backend == "llamacpp"
            else {}
        ),
        "sparse, 1 sequence": replace(stock, accel="require"),
        "sparse, 8 sequences": replace(stock, parallel=8, accel="require"),
    }
    answers: dict[str, list[Completion]] = {}
    for name, settings in sides.items():
        with open_engine(entry.backend, arguments.bundle / entry.path, settings) as engine:
            answers[name] = engine.generate(prompts, sampling)
            print(f"{name}: {engine.about['kernels']}")
    first = answers["stock, 1 sequence"]
    print(f"\n| greedy, {len(prompts)} prompts | the same as stock, 1 sequence |\n|---|---|")
    for name, found in answers.items():
        print(f"| {name} | {sum(a.ids == b.ids for a, b in zip(first, found, strict=True))} |")


if __name__ == "__main__":
    main()
