"""Expect an error of racdeploy by its code: the sentence is free to improve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from racdeploy.errors import RacdeployError


@contextlib.contextmanager
def raises(code: str, *values: str) -> Iterator[pytest.ExceptionInfo[RacdeployError]]:
    """Expect an error of this code; its message or remedy says each of the values.

    Args:
        code: what ``RacdeployError.code`` is.
        values: a path, a name, a number, a command: what the user needs, in whatever sentence.
    """
    with pytest.raises(RacdeployError) as caught:
        yield caught
    assert caught.value.code == code, repr(caught.value)
    for value in values:
        assert value in str(caught.value)
