"""Names beside the marks of a chart: none on another name, on a mark, on a bar or off the picture.

Each name tries places around its mark, near ones first, and takes the first that is free. Where all
are taken it gets the one that covers least. Marks that coincide share one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Anchor = Literal["start", "middle", "end"]
RADIUS, RING = 6.0, 5.0  # of a mark, and how much wider each mark around it is, in pixels
_CHARACTER, _ABOVE, _BELOW = 7.6, 11.0, 4.0  # of bold text of 12.5 pixels; above and below its line
_GAP = 5.0  # from a mark to its name
_LONGEST = 26  # characters of a name
_SAME = 7.0  # marks nearer than that are one
_LEVELS = (0, 16, -16, 30, -30, 46, -46, 62, -62, 80, -80, 100, -100)  # heights that are tried
_MISLEADING = 60.0  # square pixels: as bad as covering so much
_FAR = 24.0  # from there on a line leads from the name to its mark


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box) -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def widened(self, pixels: float) -> Box:
        """Return the rectangle with so much more on each side."""
        return Box(self.left - pixels, self.top - pixels, self.right + pixels, self.bottom + pixels)

    def outside(self, frame: Box) -> float:
        """Return the area that sticks out of a frame."""
        return (self.right - self.left) * (self.bottom - self.top) - self.shared(frame)


@dataclass(frozen=True)
class Label:
    """Text with the place of its first, middle or last character on the line."""

    text: str
    place: complex
    anchor: Anchor
    mark: complex

    @property
    def box(self) -> Box:
        """What the text covers, by the width of a wide character."""
        width = _CHARACTER * len(self.text)
        left = self.place.real - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return Box(left, self.place.imag - _ABOVE, left + width, self.place.imag + _BELOW)

    @property
    def leads(self) -> bool:
        """Whether the name is so far from its mark that a line has to lead there."""
        return abs(self.place.imag - _BELOW - self.mark.imag) > _FAR


def group_marks(places: Sequence[complex]) -> list[list[int]]:
    """Return the indices of marks that coincide, those on their own alone."""
    groups: list[list[int]] = []

    for index, place in enumerate(places):
        for group in groups:
            if abs(places[group[0]] - place) < _SAME:
                group.append(index)
                break
        else:
            groups.append([index])

    return groups


def place_labels(
    names: Sequence[str], places: Sequence[complex], taken: Iterable[Box], frame: Box
) -> list[Label]:
    """Return one label for each mark, or for marks that coincide.

    Args:
        places: of the marks, x + iy in pixels.
        taken: what else is drawn, which no name shall cover.
    """
    marks = [_box_of(place) for place in places]
    used = [*taken, *marks]
    groups = group_marks(places)
    groups.sort(key=lambda group: places[group[0]].imag)

    labels = []
    for group in groups:
        text = shorten(", ".join(names[index] for index in group))
        reach = RADIUS + RING * (len(group) - 1)
        candidates = list(_candidates(text, places[group[0]], reach))
        others = [place for index, place in enumerate(places) if index not in group]

        costs = []
        for each in candidates:
            covered = _cover(each.box, used, frame) + 2 * _cover(each.box, marks, frame)
            costs.append(covered + _mislead(each, others))

        label = candidates[costs.index(min(costs))]
        labels.append(label)
        used.append(label.box)

    return labels


def shorten(name: str, characters: int = _LONGEST) -> str:
    """Return a name that has room beside a mark."""
    return name if len(name) <= characters else f"{name[: characters - 1]}…"


def _cover(box: Box, used: Iterable[Box], frame: Box) -> float:
    return sum(box.shared(other) for other in used) + 4 * box.outside(frame)


def _mislead(label: Label, others: Iterable[complex]) -> float:
    """Return what it costs that a name is nearer to another mark than to its own."""
    middle = label.place - 1j * _BELOW
    own = abs(middle - label.mark)
    return sum(_MISLEADING for other in others if abs(middle - other) < own)


def _candidates(text: str, mark: complex, reach: float) -> Iterator[Label]:
    """Yield places from near to far: beside the mark, above, below, then beside and higher."""
    aside = reach + _GAP
    line = mark + _BELOW * 1j

    for level in _LEVELS:
        shift = line + level * 1j
        yield Label(text, shift + aside, "start", mark)
        yield Label(text, shift - aside, "end", mark)
        if level:
            yield Label(text, shift, "middle", mark)


def _box_of(place: complex) -> Box:
    reach = RADIUS + 2
    return Box(place.real - reach, place.imag - reach, place.real + reach, place.imag + reach)
