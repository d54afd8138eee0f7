"""Which models a search looks at: number formats, alone and together with cuts and with zeros.

A candidate is what it changes of the recipe. Those that cannot be are left out with a reason: a
format that the target does not take, codes that no grid has, widths that no layout allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from racdeploy import export, plugins, quant
from racdeploy import packing as packings
from racdeploy.errors import MissingExtraError, UsageError
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_model
from racdeploy.pipeline.structure import check_format, check_structure
from racdeploy.quant import presets
from racdeploy.recipe import Recipe
from racdeploy.storage.files import canonical_hash
from racdeploy.storage.toml import merge
from racdeploy.targets import Target

_MOST_BITS = 8.5
"""Wider formats answer no better: they are tried only where the recipe names them."""
PLAIN = {
    "prune": {"sparsity": 0.0, "pattern": "unstructured", "joint": False},
    "recover": {"tokens": 0},
    "export": {"packing": "plain"},
}
"""What a candidate does where it says nothing else, whatever the target proposes."""

CHOSEN = ", codes"
"""Behind the name of a candidate whose codes are chosen while pruning."""
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """A candidate before anything is known of it.

    Args:
        kind: what it has in common with others: ``dense``, ``dense codes``, ``cut``, ``zeros``, …;
            errors that are predicted compare well within a kind.
        settings: what it changes of the recipe, by part.
    """

    name: str
    kind: str
    settings: Settings
    job: Job

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned."""
        return self.kind.startswith("dense")

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @property
    def walk(self) -> str:
        """What the weights depend on: candidates that share it are pruned once."""
        recipe = self.recipe
        codes = self.job.joint_quant if recipe.prune.joint else ""
        parts = (recipe.structure, recipe.prune, recipe.recover)
        return canonical_hash([codes, *(part.model_dump() for part in parts)])

    @property
    def given(self) -> dict[str, Any]:
        """What ``racdeploy build`` needs to make it: keys of the recipe, by part."""
        return dict(merge(PLAIN, self.settings))


@dataclass(frozen=True)
class Proposals:
    """All candidates of a job; ``left_out`` has the reasons of those that cannot be."""

    choices: tuple[Choice, ...]
    left_out: Mapping[str, str]


def propose(job: Job) -> Proposals:
    """Return every candidate that a job's recipe, model and target allow, the plainest first."""
    check_model(job.changed(job.recipe.unpruned()))
    found: dict[str, Choice] = {}
    left_out: dict[str, str] = {}

    for name, kind, settings in _combine(job):
        if name in found or name in left_out:
            continue
        try:
            found[name] = make_choice(job, name, kind, settings)
        except (UsageError, MissingExtraError) as error:
            left_out[name] = error.message

    if not any(choice.dense for choice in found.values()):
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise UsageError(
            f"no number format is left to try: {reasons}",
            remedy="name others in tune.quants, or choose another target",
        )
    return Proposals(tuple(found.values()), left_out)


def make_choice(job: Job, name: str, kind: str, settings: Settings) -> Choice:
    """Return a candidate of a job, or raise a UsageError that says why it cannot be."""
    recipe = job.recipe.unpruned().changed(merge(PLAIN, settings))
    own = job.changed(recipe)

    form, prune = recipe.export, recipe.prune
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


def _combine(job: Job) -> Iterator[tuple[str, str, Settings]]:
    """Yield name, kind and settings of all that might be."""
    cuts = list(_list_cuts(job))
    zeros = list(_list_zeros(job))

    for words, codes, encoding in _list_encodings(job):
        yield from _vary(job, words, f"dense{codes}", encoding)

        for cut, settings in cuts:
            whole = merge(settings, encoding)
            yield from _vary(job, f"{cut}, {words}", f"cut{codes}", whole)

        for share, settings in zeros:
            whole = merge(settings, encoding)
            yield from _vary(job, f"{share}, {words}", f"zeros{codes}", whole)


def _vary(
    job: Job, name: str, kind: str, settings: Settings
) -> Iterator[tuple[str, str, Settings]]:
    """Yield a candidate, with fewer tokens in its vocabulary, and with what it learns back."""
    tune = job.recipe.tune
    yield name, kind, settings

    if tune.recover_tokens and not kind.startswith("dense"):
        learned = merge(settings, {"recover": {"tokens": tune.recover_tokens}})
        yield f"{name}, recovered", f"{kind}, recovered", learned

    for tokens in tune.vocabulary:
        own = kind.replace("dense", "cut", 1)
        keep = {"vocabulary": float(tokens)}
        fewer = merge(settings, {"structure": {"keep": keep}})

        yield f"{tokens:,} tokens, {name}", f"{own}, vocabulary", fewer


def _list_encodings(job: Job) -> Iterator[tuple[str, str, Settings]]:
    """Yield words, what the kind says of codes, and settings of each way to store the linears."""
    for name in list_quants(job.recipe):
        encoding = {"export": {"quant": name}}
        yield name, "", encoding
        yield f"{name}{CHOSEN}", " codes", merge(encoding, {"prune": {"joint": True}})


def list_quants(recipe: Recipe) -> list[str]:
    """Return the number formats and presets that are tried, the widest first."""
    form = recipe.export.format
    asked = recipe.tune.quants
    if asked:
        return list(asked)

    allowed = Target.read(recipe.target).allowed_quants
    known = [
        *packings.list_stored(form, "quant"),
        *packings.list_stored(form, "presets"),
    ]

    def bits(name: str) -> float:
        return quant.load(presets.read(name).quant).BITS

    fitting = [name for name in known if not allowed or name in allowed]
    narrow = [name for name in fitting if bits(name) <= _MOST_BITS]
    mixes = plugins.names("presets")
    return sorted(narrow, key=lambda name: (-bits(name), name in mixes, name))


def _list_cuts(job: Job) -> Iterator[tuple[str, Settings]]:
    for share in job.recipe.tune.ffn:
        yield f"ffn {share:g}", {"structure": {"keep": {"ffn": share}}}


def _list_zeros(job: Job) -> Iterator[tuple[str, Settings]]:
    """Yield zeros, packed: in a plain file they are as large as any weight."""
    tune = job.recipe.tune
    packing = find_packing(job.recipe.export.format)
    if not packing:
        return

    packed = {"packing": packing}
    for share in tune.zeros:
        prune: dict[str, Any] = {"sparsity": share}
        yield f"{share:.0%} zeros", {"prune": prune, "export": packed}

    for pattern in tune.patterns:
        kept, of = (int(part) for part in pattern.split(":"))
        prune = {"pattern": pattern, "sparsity": 1 - kept / of}
        yield f"{pattern} zeros", {"prune": prune, "export": packed}


def find_packing(form: str) -> str:
    """Return the packing that leaves zeros out of a format's plain file; empty if there is none."""
    for name in packings.names(form):
        packing = packings.load(name)
        if packing.REQUIRES_ZEROS and not packing.BESIDE_PLAIN:
            return name
    return ""
