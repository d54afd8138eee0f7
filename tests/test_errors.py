"""Codes of errors: short words, each of one class and so of one exit code.

docs/reference/errors.md lists them with all sentences; test_docs.py compares it with the source.
"""

from __future__ import annotations

import re

import pytest

from racdeploy.errors import MissingExtraError, RacdeployError
from tests.support.error_codes import list_raised
from tests.support.errors import raises

RAISED = list_raised()


def test_codes_are_short_words() -> None:
    for code in {each.code for each in RAISED}:
        assert re.fullmatch(r"(?=.{,30}$)[a-z0-9]+(-[a-z0-9]+){1,4}", code), code


def test_a_code_has_one_class() -> None:
    """So scripts that go by codes know the exit code, too."""
    kinds: dict[str, set[str]] = {}
    for each in RAISED:
        kinds.setdefault(each.code, set()).add(each.kind)
    assert {code: names for code, names in kinds.items() if len(names) > 1} == {}


def test_another_code_is_noticed() -> None:
    with pytest.raises(AssertionError), raises("no-config"):
        raise RacdeployError("no-tokenizer", "there is no tokenizer.json")


@pytest.mark.parametrize(
    ("packages", "said"), [("onnx", "onnx, which is not"), ("onnx, scipy", "scipy, which are not")]
)
def test_a_missing_extra_names_its_packages(packages: str, said: str) -> None:
    assert said in str(MissingExtraError(packages, "onnx"))
