"""Which models a search looks at: number formats, alone, with cuts and with zeros.

A candidate is what it changes of the recipe. Codes are chosen with the pruning's statistic
(``prune.joint``) wherever that pays: rounding is never better, and 6 bits and more need neither.
Those that cannot be are left out with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from racdeploy import export, quant
from racdeploy import packing as packings
from racdeploy.errors import MissingExtraError, UsageError
from racdeploy.files.toml import merge
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_model
from racdeploy.pipeline.structure import check_format, check_structure
from racdeploy.quant import presets
from racdeploy.recipe import Recipe, Zeros, count_zeros
from racdeploy.targets import Target

MAX_BITS = 8.5  # wider formats answer no better: they are tried where the recipe names them
_MAX_CODED_BITS = 6.0
_PACKING = "bitmask"  # of GGUF files: zeros in ONNX never paid
PLAIN = {
    "prune": {"sparsity": 0.0, "pattern": "unstructured", "joint": False},
    "recover": {"tokens": 0},
    "export": {"packing": "plain"},
}
"""What a candidate does where it says nothing else, whatever the target proposes."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """A candidate before anything is known of it.

    Args:
        kind: what is pruned: ``dense``, ``ffn 0.75``, ``50% zeros``, …
        settings: what it changes of the recipe, by part.
    """

    name: str
    kind: str
    settings: Settings
    job: Job

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned."""
        return self.kind == "dense"

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @property
    def given(self) -> dict[str, Any]:
        """What ``racdeploy build`` needs to make it: keys of the recipe, by part."""
        return dict(merge(PLAIN, self.settings))


def propose(job: Job) -> tuple[list[Choice], dict[str, str]]:
    """Return every candidate that a job's recipe, model and target allow, the plainest first.

    With them come the reasons of those that cannot be, by name.
    """
    check_model(job.changed(job.recipe.unpruned()))
    choices: list[Choice] = []
    left_out: dict[str, str] = {}

    for kind, settings in _list_kinds(job):
        for name in list_quants(job.recipe):
            title = name if kind == "dense" else f"{kind}, {name}"
            try:
                own = merge(settings, {"export": {"quant": name}})
                choices.append(choose_codes(make_choice(job, title, kind, own)))
            except (UsageError, MissingExtraError) as error:
                left_out[title] = error.message

    if not any(choice.dense for choice in choices):
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise UsageError(
            "no-quant-left",
            f"no number format is left to try: {reasons}",
            remedy="name others in tune.quants, or choose another target",
        )
    return choices, left_out


def make_choice(job: Job, name: str, kind: str, settings: Settings) -> Choice:
    """Return a candidate of a job, or raise a UsageError that says why it cannot be."""
    recipe = job.recipe.unpruned().changed(merge(PLAIN, settings))
    own = job.changed(recipe)

    form = recipe.export
    prune = recipe.prune
    target = Target.read(recipe.target)
    target.check(form.format, form.quant, recipe.verify.context_tokens)
    export.check(form)

    check_structure(own)
    check_format(own)
    if prune.joint:
        _ = own.joint_quant
    for weight in own.weights_to_prune:
        prune.check_width(weight, own.checkpoint.entries[weight].shape[1])
    return Choice(name, kind, settings, own)


def choose_codes(choice: Choice) -> Choice:
    """Return the candidate with codes that are chosen, where a narrow format allows it."""
    if _count_bits(choice.recipe.export.quant) > _MAX_CODED_BITS:
        return choice
    try:
        settings = merge(choice.settings, {"prune": {"joint": True}})
        return make_choice(choice.job, choice.name, choice.kind, settings)
    except UsageError:  # no grid, or none for rows of this length
        return choice


def list_quants(recipe: Recipe) -> list[str]:
    """Return the number formats that are tried, the widest first."""
    if recipe.tune.quants:
        return list(recipe.tune.quants)

    allowed = Target.read(recipe.target).allowed_quants
    fitting = []
    for name in packings.list_stored(recipe.export.format, "quant"):
        is_allowed = not allowed or name in allowed
        if is_allowed and _count_bits(name) <= MAX_BITS:
            fitting.append(name)

    return sorted(fitting, key=lambda name: (-_count_bits(name), name))


def _count_bits(name: str) -> float:
    return quant.load(presets.read(name).quant).BITS


def _list_kinds(job: Job) -> Iterator[tuple[str, Settings]]:
    """Yield what may be pruned, nothing first, each also with fewer tokens and with recovery."""
    tune = job.recipe.tune
    whole: list[tuple[str, Settings]] = []
    for share in tune.ffn:
        whole.append((f"ffn {share:g}", {"structure": {"keep": {"ffn": share}}}))
    if job.recipe.export.format == "gguf":
        whole += _list_zeros(tune.zeros)

    pruned = list(whole)
    for tokens in tune.vocabulary:
        keep = {"structure": {"keep": {"vocabulary": float(tokens)}}}
        pruned.append((f"{tokens:,} tokens", keep))
        for kind, own in whole:
            pruned.append((f"{tokens:,} tokens, {kind}", merge(keep, own)))

    yield "dense", {}
    for kind, settings in pruned:
        yield kind, settings
        if tune.recover_tokens:
            learned = {"recover": {"tokens": tune.recover_tokens}}
            yield f"{kind}, recovered", merge(settings, learned)


def _list_zeros(zeros: tuple[Zeros, ...]) -> Iterator[tuple[str, Settings]]:
    """Yield zeros, packed: in a plain file they are as large as any weight."""
    for each in zeros:
        prune: dict[str, Any] = {"sparsity": count_zeros(each)}
        if isinstance(each, str):
            prune["pattern"] = each
        name = each if isinstance(each, str) else f"{each:.0%}"
        yield f"{name} zeros", {"prune": prune, "export": {"packing": _PACKING}}
