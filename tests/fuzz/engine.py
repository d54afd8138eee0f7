"""One run of libFuzzer: ``python -m tests.fuzz.engine NAME FOUND ARGUMENTS``; needs atheris.

A process of its own, since libFuzzer ends the one that it runs in. An input that breaks a promise
is written into the folder ``FOUND``, one for each place where it does, and the run goes on.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
import warnings
from pathlib import Path

import atheris

# Templates are compiled by what is Python, too; the toy has its defects in itself.
_MORE = {"template": ["jinja2"], "_toy": ["tests.fuzz.harnesses._toy"]}
_SEEN = ["racdeploy", *_MORE.get(sys.argv[1], [])]

with atheris.instrument_imports(include=_SEEN):
    from tests.fuzz import harness, oracle


def main() -> None:
    """Fuzz the harness that the command line names."""
    name, folder, *arguments = sys.argv[1:]
    warnings.simplefilter("error", RuntimeWarning)

    found: set[str] = set()

    def test(data: bytes) -> None:
        try:
            oracle.judge(chosen.target, data)
        except BaseException as error:  # noqa: BLE001 - whatever leaves is what is looked for
            place = _describe(error)
            if place not in found:
                found.add(place)
                _keep(Path(folder), data, error)

    # Plugins are imported where they are first used: here they still get their counters.
    with atheris.instrument_imports(include=_SEEN):
        chosen = harness.load(name)
        for seed in chosen.seeds():
            test(seed)

    def mutate(data: bytes, most: int) -> bytes:
        return bytes(atheris.Mutate(data, most))  # looked up now: Fuzz() replaces it

    options = {"custom_mutator": chosen.mutator(mutate)} if chosen.mutates else {}
    atheris.Setup([sys.argv[0], *arguments], test, **options)
    atheris.Fuzz()


def _describe(error: BaseException) -> str:
    """Return the kind of an exception and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if error.__context__ is not None:  # an error of ours whose words are wrong
        frames += traceback.extract_tb(error.__context__.__traceback__)
    own = [each for each in frames if "/racdeploy/" in each.filename]

    places = [f"{each.filename}:{each.lineno}" for each in (*frames[-2:], *own[-1:])]
    return " ".join([type(error).__name__, *places])


def _keep(folder: Path, data: bytes, error: BaseException) -> None:
    name = hashlib.sha256(data).hexdigest()[:16]
    (folder / f"{name}.input").write_bytes(data)
    text = "".join(traceback.format_exception(error))
    (folder / f"{name}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    print(
        f"FOUND {name}: {type(error).__name__}: {str(error)[:300]!r}", file=sys.stderr, flush=True
    )


if __name__ == "__main__":
    main()
