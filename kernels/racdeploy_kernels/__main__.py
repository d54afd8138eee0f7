"""``racdeploy-kernels prove`` tries the kernels on this machine; ``status`` says what is used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import racdeploy_kernels
from racdeploy.errors import EngineError, RacdeployError
from racdeploy.extras import installed_version
from racdeploy_kernels.proof import EngineKernels, Proof


def main() -> int:
    """Run the command line; 0 where an engine's kernels are used."""
    parser = argparse.ArgumentParser(prog="racdeploy-kernels", description=__doc__)
    version = installed_version("racdeploy-kernels")
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True)

    for command in (prove, status):
        added = commands.add_parser(command.__name__, help=str(command.__doc__).splitlines()[0])
        added.set_defaults(command=command)

    try:
        return int(parser.parse_args().command())
    except RacdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def prove() -> int:
    """Compare the kernels of each installed engine with its own, and measure both: a minute."""
    used = []
    for engine, find_kernels in racdeploy_kernels.FINDERS.items():
        kernels = find_kernels()
        if isinstance(kernels, EngineKernels):
            proof = kernels.prove()
            for line in _describe(proof):
                print(f"{engine}, {line}")
        used.append(_print_status(engine))
    return 0 if any(used) else EngineError.exit_code


def status() -> int:
    """Print whether each engine's sparse weights run on the kernels, and which these are."""
    used = [_print_status(engine) for engine in racdeploy_kernels.FINDERS]
    return 0 if any(used) else EngineError.exit_code


def _print_status(engine: str) -> bool:
    reason = racdeploy_kernels.explain(engine)
    if reason:
        print(f"{engine}: its own kernels run: {reason}")
    for name, (_, detail) in racdeploy_kernels.describe(engine).items():
        print(f"{engine}{f', {name}' if name else ''}: {detail}")
    return not reason


def _describe(proof: Proof) -> Iterator[str]:
    for verdict in proof.verdicts:
        for name, speedups in verdict.speedups.items():
            cells = [f"{speedup:.2f}× at {float(at):.0%} zeros" for at, speedup in speedups.items()]
            yield f"{name}: {', '.join(cells)}, one token on {verdict}"


if __name__ == "__main__":
    sys.exit(main())
