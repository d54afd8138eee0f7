"""Names beside marks: whatever the marks are, no name lies on another, on a mark or outside."""

from __future__ import annotations

import itertools
import random

import pytest

from racdeploy.report.labels import RADIUS, Box, Label, group_marks, place_labels

FRAME = Box(56, 0, 460, 254)
NAMES = ("dense", "pruned", "pruned, llamacpp", "dense q4_k", "dense q2_k", "sparse q8_0")


def _marks(places: list[complex]) -> list[Box]:
    return [
        Box(at.real - RADIUS, at.imag - RADIUS, at.real + RADIUS, at.imag + RADIUS) for at in places
    ]


def _collisions(labels: list[Label], others: list[Box]) -> list[tuple[Box, Box]]:
    boxes = [label.box for label in labels]
    pairs = [*itertools.combinations(boxes, 2), *itertools.product(boxes, others)]
    return [(first, second) for first, second in pairs if first.shared(second) > 0]


@pytest.mark.parametrize("seed", range(40))
def test_names_never_collide(seed: int) -> None:
    """Up to six models, crowded in a corner or spread: neither on a name nor on a mark."""
    generator = random.Random(seed)
    spread = generator.choice((8, 40, 150))
    count = generator.randint(2, 6)
    places = [
        complex(
            250 + generator.uniform(-spread, spread), 130 + generator.uniform(-0.7, 0.7) * spread
        )
        for _ in range(count)
    ]
    labels = place_labels(NAMES[:count], places, (), FRAME)

    assert _collisions(labels, _marks(places)) == []
    assert all(label.box.outside(FRAME) == 0 for label in labels)
    assert sorted(", ".join(label.text for label in labels).split(", ")) == sorted(
        ", ".join(NAMES[:count]).split(", ")
    ) or any("…" in label.text for label in labels)


def test_names_beside_the_mark_alone_would_collide() -> None:
    """The spoiled version: the same marks with each name to the right of its own."""
    places = [200 + 100j, 214 + 104j, 226 + 98j]
    naive = [
        Label(name, place + 11 + 4j, "start", place)
        for name, place in zip(NAMES, places, strict=False)
    ]
    assert _collisions(naive, _marks(places))
    assert not _collisions(place_labels(NAMES[:3], places, (), FRAME), _marks(places))


def test_marks_that_coincide_share_a_name() -> None:
    """One mark with both names, and not one name that hides the other."""
    (both, third) = place_labels(
        NAMES[:2] + NAMES[3:4], [100 + 50j, 102 + 51j, 300 + 90j], (), FRAME
    )
    assert (both.text, third.text) == ("dense, pruned", "dense q4_k")
    assert group_marks([100 + 50j, 102 + 51j, 300 + 90j]) == [[0, 1], [2]]


def test_a_name_far_from_its_mark_has_a_line() -> None:
    """Where everything near is taken."""
    wall = [Box(56, 100, 460, 160)]
    (label,) = place_labels(["dense"], [250 + 130j], wall, FRAME)
    assert label.leads
    assert not _collisions([label], wall)
