"""A harness: a file in ``harnesses/`` with what the command and the tests need of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.fuzz.oracle import Target

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MENDED = HERE / "mended"
Mutate = Callable[[bytes, int], bytes]
Mutator = Callable[[bytes, int, int], bytes]


@dataclass(frozen=True)
class Harness:
    """A harness.

    Args:
        target: reads an input as the product does, and compares what it reads.
        seeds: valid inputs, made from small files.
        readers: the modules whose lines an input should reach.
        dictionary: words of the format.
        mutates: whether it changes inputs in a way of its own, which ``mutator`` returns, given
            libFuzzer's.
        survives: whether the product lives through an input that ended this process; None where
            nothing may end it.
    """

    name: str
    target: Target
    seeds: Callable[[], Iterator[bytes]]
    readers: tuple[str, ...]
    dictionary: tuple[bytes, ...]
    mutates: bool
    mutator: Callable[[Mutate], Mutator]
    survives: Callable[[bytes], bool] | None

    @property
    def kept(self) -> list[Path]:
        """The inputs that are kept of earlier runs."""
        return sorted((CORPUS / self.name).glob("*"))

    @property
    def mended(self) -> list[Path]:
        """Those that broke a promise once."""
        return sorted((MENDED / self.name).glob("*"))


def names() -> list[str]:
    """Return the names of all harnesses."""
    return sorted(file.stem for file in (HERE / "harnesses").glob("[a-z]*.py"))


def load(name: str) -> Harness:
    """Import a harness."""
    module: ModuleType = importlib.import_module(f"tests.fuzz.harnesses.{name}")
    mutator = getattr(module, "mutator", None)
    return Harness(
        name,
        module.target,
        module.seeds,
        module.READERS,
        getattr(module, "DICTIONARY", ()),
        mutator is not None,
        mutator or _no_mutator,
        getattr(module, "survives", None),
    )


def _no_mutator(mutate: Mutate) -> Mutator:
    raise AssertionError("the harness has no mutator of its own")
