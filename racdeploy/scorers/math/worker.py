"""The child with Math-Verify: ``[answer, gold]`` a line in, ``[correct, extracted, how]`` out."""

from __future__ import annotations

import json
import os
import sys

from math_verify import parse, verify


def judge(answer: str, gold: str) -> tuple[bool, str | None, str]:
    """Compare an answer with the gold one; both may hold LaTeX or plain expressions."""
    wanted = parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$") or parse(gold)
    found = parse(answer)
    if not wanted:
        return False, None, "the gold answer is no expression"
    if not found:
        return False, None, "no expression"

    return bool(verify(wanted, found)), str(found[-1]), "math-verify"


def main() -> None:
    """Answer until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints goes to stderr
    out.write("ready\n")
    out.flush()

    for line in sys.stdin:
        answer, gold = json.loads(line)
        out.write(json.dumps(judge(answer, gold)) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
