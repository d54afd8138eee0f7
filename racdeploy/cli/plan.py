"""What a command is about to do, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from racdeploy.recipe import Recipe


def write_first_line(verb: str, recipe: Recipe) -> str:
    """Return what is going to be made from what, from the recipe alone."""
    model = recipe.model
    asked = f"{recipe.traces.count} prompts"

    if verb == "traces":
        return f"traces: {model} answers {asked}"
    if verb == "recover":
        return f"recover: a pruned model learns {recipe.recover.tokens:,} tokens from {model}"

    done = describe_pruning(recipe)
    if verb == "prune":
        return f"prune: {model}, {done}, calibrated on {asked}"

    targets = " and ".join((recipe.target, *recipe.also))
    return f"build: {model} for {targets}, {done}, stored in {recipe.export.quant}"


def describe_pruning(recipe: Recipe) -> str:
    """Return what is cut and how many zeros are chosen."""
    prune, structure = recipe.prune, recipe.structure

    parts = []
    for part in structure.parts:
        share = structure.share(part)
        amount = f"{int(share):,} tokens" if share > 1 else f"{share:.0%}"
        parts.append(f"{amount} of {part} kept")

    if prune.kept_of:
        parts.append(f"{prune.pattern} zeros")
    elif prune.sparsity:
        parts.append(f"{prune.sparsity:.0%} zeros")
    if recipe.recover.tokens:
        parts.append(f"then {recipe.recover.tokens:,} tokens learned back")

    return ", ".join(parts) or "nothing pruned"
