"""Comparison of the whole answer, character by character after white space is normalized."""

from __future__ import annotations

from racdeploy.tasks.scoring import AnswerScore


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare the whole text."""
    text = " ".join(answer.split())
    if not text:
        return AnswerScore(False, None, "no text")
    return AnswerScore(text == " ".join(gold.split()), text, "whole text")
