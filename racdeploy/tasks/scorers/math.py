r"""Mathematical equality by Hugging Face's Math-Verify: \frac{1}{2} is 0.5, {1, 2} is {2, 1}.

Its parser can hang on a model's text; such an answer counts as wrong.
Source: math-verify 0.8.
"""

from __future__ import annotations

from racdeploy.plugins import require_package
from racdeploy.tasks.scoring import AnswerScore, refuse_argument

SECONDS = 10.0
MEMORY_BYTES = 2**30
FAILURE_IS_WRONG = True


def check(argument: str) -> None:
    """Refuse an argument, and a machine without Math-Verify."""
    refuse_argument("math", argument)
    require_package("math_verify")


def prepare() -> None:
    """Import Math-Verify."""
    check("")
    import math_verify  # noqa: F401


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare an answer with the gold one; both may hold LaTeX or plain expressions."""
    from math_verify import parse, verify

    # Math-Verify finds LaTeX only between dollars or in a box.
    expected = parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$") or parse(gold)
    actual = parse(answer)
    if not expected:
        return AnswerScore(False, None, "the gold answer is no expression")
    if not actual:
        return AnswerScore(False, None, "no expression")

    return AnswerScore(bool(verify(expected, actual)), str(actual[-1]), "math-verify")
