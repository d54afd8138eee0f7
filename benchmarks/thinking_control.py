"""What does control of the thinking change? One artifact, with and without, on the same prompts.

    racdeploy build --sparsity 0.7 --prompts 300 --out build/zeros70
    python -m benchmarks.thinking_control build/zeros70 --budgets 240 320 --close-bias 4 8

Each row is a control that is applied to the bundle's first artifact: a budget, a budget with a last
sentence, with a bias on the close tag, or all of it. Differences are to the row without control.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from racdeploy.bundles.bundle import Bundle
from racdeploy.decoding.engine import EngineSettings
from racdeploy.engines import open_engine
from racdeploy.manifest import ThinkingControl
from racdeploy.runtime.control import NO_CONTROL
from racdeploy.verify.evidence import FAULTS, Arm, completion_tokens, is_correct, thinking_tokens
from racdeploy.verify.stats.lengths import length_ratio
from racdeploy.verify.stats.paired import paired_counts, tango_interval

_CONFIDENCE = 0.95
_HEAD = (
    "| control | accuracy | points lost (95 %) | thinking tokens | length ratio (95 %) | "
    "unclosed | loops | forced | tokens in all |\n|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    """A control by name."""

    name: str
    max_tokens: int = 0
    control: ThinkingControl = NO_CONTROL


def main() -> None:
    """Answer under every control, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budgets", type=int, nargs="+", default=[240])
    parser.add_argument("--closing", default="\nI must answer now.\n")
    parser.add_argument("--close-bias", type=float, nargs="*", default=[8.0])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    bundle = Bundle(arguments.bundle)
    entry = bundle.own.manifest.artifacts[0]
    settings = EngineSettings(
        bundle.settings.context_tokens, bundle.settings.parallel, arguments.threads
    )
    asked = bundle.settings.model_copy(update={"temperature": arguments.temperature})
    print(f"{bundle.own.manifest.base['name']}, {len(bundle.problems)} prompts\n\n{_HEAD}")

    with open_engine(entry.backend, bundle.folder / entry.path, settings) as engine:
        asker = bundle.respondent(None)
        free = None

        for row in _rows(arguments):
            budgeted = asked.model_copy(update={"max_thinking_tokens": row.max_tokens})
            respondent = replace(asker, settings=budgeted, control=row.control)
            answers = respondent.answer(lambda: nullcontext(engine), bundle.problems, row.name)
            arm = Arm(row.name, answers.records)
            free = free or arm
            print(_format(free, arm, asked.max_new_tokens), flush=True)


def _rows(arguments: argparse.Namespace) -> list[Row]:
    rows = [Row("none")]
    for budget in arguments.budgets:
        rows.append(Row(f"budget {budget}", budget))
        said = ThinkingControl(closing=arguments.closing)
        rows.append(Row(f"budget {budget}, last sentence", budget, said))

    for budget, bias in product(arguments.budgets, arguments.close_bias):
        biased = ThinkingControl(close_bias=bias)
        rows.append(Row(f"budget {budget}, bias {bias:g}", budget, biased))
        both = ThinkingControl(closing=arguments.closing, close_bias=bias)
        rows.append(Row(f"budget {budget}, bias {bias:g}, last sentence", budget, both))

    return rows


def _format(free: Arm, arm: Arm, most: int) -> str:
    pairs = paired_counts(free.by_prompt(is_correct), arm.by_prompt(is_correct))
    n10, n01, n = map(round, pairs)
    lower, upper = tango_interval(n10, n01, n, _CONFIDENCE)

    before, after = (each.by_prompt(thinking_tokens) for each in (free, arm))
    ratio = length_ratio(before, after, most, _CONFIDENCE)
    mean = sum(map(thinking_tokens, arm.records)) / len(arm.records)
    total = sum(map(completion_tokens, arm.records))
    faults = " | ".join(str(arm.count(FAULTS[name])) for name in ("unclosed", "loops", "forced"))

    return (
        f"| {arm.name} | {arm.count(is_correct) / len(arm.records):.1%} "
        f"| {100 * pairs.drop:+.1f} ({100 * lower:+.1f} to {100 * upper:+.1f}) | {mean:.1f} "
        f"| {ratio.ratio:.3f} ({ratio.lower:.3f} to {ratio.upper:.3f}) | {faults} | {total:,} |"
    )


if __name__ == "__main__":
    main()
