"""Fuzz racdeploy's readers: ``python -m tests.fuzz NAME --seconds 60``, or only ``--replay``.

New inputs go to ``build/fuzz/NAME/corpus``, findings to ``found`` beside it. ``--keep`` puts those
that reach new lines into ``tests/fuzz/corpus/NAME``, and mended findings into
``tests/fuzz/mended/NAME``.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from pathlib import Path

from tests.fuzz import harness, kept, oracle
from tests.fuzz.changed import find_changed_files, select_harnesses
from tests.fuzz.run import run

ROOT = Path(__file__).parents[2]
_WORK = Path("build/fuzz").resolve()


def main() -> int:
    """Carry out what the command line asks; the exit code is 1 where something was found."""
    arguments = _parse()
    found = 0

    names = arguments.names or harness.names()
    if arguments.changed:
        names = select_harnesses(find_changed_files(ROOT))
        print("fuzzing " + (", ".join(names) or "nothing: no reader has changed"), flush=True)

    for name in names:
        chosen = harness.load(name)
        work = arguments.work.resolve() / name
        if arguments.replay:
            said, failed = _replay(chosen)
            print(f"{name}: {said}", flush=True)
            found += failed
        elif arguments.keep:
            print(f"{name}: {kept.keep(chosen, work)}", flush=True)
        elif arguments.lines:
            shares = kept.measure(chosen).items()
            print(f"{name}: {', '.join(f'{module} {share:.0%}' for module, share in shares)}")
        else:
            tally = run(chosen, work, arguments.seconds)
            print(f"{name}: {tally}", flush=True)
            found += len(tally.found)

    return 1 if found else 0


def _replay(chosen: harness.Harness) -> tuple[str, int]:
    """Return what the replay of a harness came to, and 1 where an input broke a promise."""
    try:
        return f"{kept.replay(chosen)} inputs replayed", 0
    except BaseException as error:  # noqa: BLE001 - whatever leaves is what is looked for
        said = " ".join("".join(traceback.format_exception(error)).split())
        return f"failed: {said[-3000:]}", 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(harness.names()))
    parser.add_argument("--seconds", type=int, default=60, help="of each harness")
    parser.add_argument("--replay", action="store_true", help="run seeds and kept inputs alone")
    parser.add_argument(
        "--keep", action="store_true", help="minimise what was found into the corpus"
    )
    parser.add_argument(
        "--changed", action="store_true", help="only what reads otherwise than before the branch"
    )
    parser.add_argument("--lines", action="store_true", help="say which share of lines is reached")
    parser.add_argument(
        "--work", type=Path, default=_WORK, help="folder of new inputs and findings"
    )
    return parser.parse_args()


if __name__ == "__main__":
    oracle.scratch()
    warnings.simplefilter("error", RuntimeWarning)
    sys.exit(main())
