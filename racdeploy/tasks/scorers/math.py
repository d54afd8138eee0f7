r"""Mathematical equality by Hugging Face's Math-Verify: \frac{1}{2} is 0.5, {1, 2} is {2, 1}.

Its parser can hang on what a model writes: that answer is wrong then.
Source: math-verify 0.8.
"""

from __future__ import annotations

from racdeploy.plugins import require
from racdeploy.tasks.scoring import Scored, refuse_argument

SECONDS = 10.0
MEMORY_BYTES = 2**30
GIVES_UP = True


def check(argument: str) -> None:
    """Refuse an argument, and a machine without Math-Verify."""
    refuse_argument("math", argument)
    require("math_verify")


def prepare() -> None:
    """Import Math-Verify."""
    check("")
    import math_verify  # noqa: F401


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare an answer with the gold one; both may hold LaTeX or plain expressions."""
    from math_verify import parse, verify

    wanted = parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$") or parse(gold)
    found = parse(answer)
    if not wanted:
        return Scored(False, None, "the gold answer is no expression")
    if not found:
        return Scored(False, None, "no expression")

    return Scored(bool(verify(wanted, found)), str(found[-1]), "math-verify")
