"""Reading what a stranger may have sent: a bound on its bytes first, and one error for the rest.

Files of bundles and model folders come from anybody. They are opened here, so that a file of any
size, a pipe or a device costs nothing, and whatever a parser makes of bytes that were meant to harm
it becomes one line that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from pydantic import ValidationError

from racdeploy.errors import ArtifactError, RacdeployError

Json = dict[str, Any]
"""A JSON object."""
MOST_BYTES = 16_000_000
"""Of a file for which no other bound is given."""
MOST_LINE_BYTES = 1_000_000
"""Of a line of JSON Lines."""

# An empty list takes 3 bytes of text and 64 of memory. The tokenizer of 262,144 tokens has 1.6
# million commas and brackets.
_MOST_ITEMS = 4_000_000
_COPY = "copy it again from its source"
_SHOWN = 200
_BINARY = getattr(os, "O_BINARY", 0)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# What is no failure of reading: somebody wants the program to end.
_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def name_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a file's values, and its place if it has one.

    The names of keys are those of whoever wrote the file.
    """
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    where = " ".join(place.split())[:_SHOWN]

    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def read_bytes(file: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return what a regular file holds.

    Raises:
        ArtifactError: it holds more than ``most_bytes``, or is no regular file.
        OSError: it is not there, or cannot be opened.
    """
    with open_regular(file) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        # A buffer is made for all that is asked for; one byte more shows that the file grows.
        content = stream.read(min(size_bytes, most_bytes) + 1)

    if max(size_bytes, len(content)) > most_bytes:
        raise _refuse_size(file, max(size_bytes, len(content)), most_bytes)

    return content


def read_text(file: Path, most_bytes: int = MOST_BYTES) -> str:
    """Return the UTF-8 text of a file; see :func:`read_bytes`."""
    return _decode(read_bytes(file, most_bytes), file)


def read_json(file: Path, most_bytes: int = MOST_BYTES, *, once: bool = False) -> Json:
    """Return the JSON object in a file; anything else is an ArtifactError.

    ``once`` refuses a key that stands twice, and NaN and Infinity: programs disagree about them.
    """
    value = parse_json(read_text(file, most_bytes), str(file), once=once)
    if not isinstance(value, dict):
        raise ArtifactError(
            "json-not-an-object", f"{file} holds a {type(value).__name__}, not an object"
        )
    return value


def read_lines(file: Path, most_lines: int) -> Iterator[str]:
    """Yield the lines of a UTF-8 text, each of at most a million bytes; see :func:`read_bytes`."""
    with open_regular(file) as stream:
        for number in count(1):
            line = stream.readline(MOST_LINE_BYTES + 1)
            if not line:
                return
            if number > most_lines or len(line) > MOST_LINE_BYTES:
                raise ArtifactError(
                    "file-too-large",
                    f"{file} has more than {most_lines:,} lines, or one of more than "
                    f"{MOST_LINE_BYTES:,} bytes",
                    remedy=_COPY,
                )

            yield _decode(line, file).removesuffix("\n")


def check_size(file: Path, most_bytes: int) -> None:
    """Raise ArtifactError where a file that something else reads is too large, or no file."""
    with open_regular(file) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
    if size_bytes > most_bytes:
        raise _refuse_size(file, size_bytes, most_bytes)


def open_regular(file: Path) -> BinaryIO:
    """Open a file to read it; ArtifactError where it is a pipe, which would wait, or a device."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    stream = os.fdopen(descriptor, "rb")
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return stream

    stream.close()
    raise ArtifactError("not-a-regular-file", f"{file} is no regular file", remedy=_COPY)


def parse_json(text: str, where: str, *, once: bool = False) -> Any:
    """Return a JSON value of which every text can be written again as UTF-8."""
    items = sum(map(text.count, ",[{"))
    if items > _MOST_ITEMS:
        raise ArtifactError(
            "json-too-large",
            f"{where} has {items:,} commas and brackets, and at most {_MOST_ITEMS:,} are read",
        )

    try:
        value = json.loads(
            text,
            object_pairs_hook=_refuse_twice if once else None,
            parse_constant=_refuse_constant if once else None,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            "invalid-json", f"{where} is not valid JSON: {error}", remedy=_COPY
        ) from error

    return value


@contextlib.contextmanager
def refusing(what: object, remedy: str = _COPY) -> Iterator[None]:
    """Turn whatever reading something raises into an ArtifactError of one line.

    Native libraries end in exceptions that are no ``Exception``; our own errors pass, and OSError,
    which says what the system has against it.
    """
    try:
        yield
    except (RacdeployError, OSError, *_ENDS):
        raise
    except BaseException as error:
        said = " ".join(str(error).split())[:_SHOWN]
        kind = type(error).__name__
        if said:
            message = f"{what} is damaged: {kind}: {said}"
        else:
            message = f"{what} is damaged: {kind}"
        raise ArtifactError("damaged-file", message, remedy=remedy) from error


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            "file-not-utf8", f"{file} is not UTF-8 text: {error}", remedy=_COPY
        ) from error


def _refuse_size(file: Path, size_bytes: int, most_bytes: int) -> ArtifactError:
    return ArtifactError(
        "file-too-large",
        f"{file} has {size_bytes:,} bytes, and at most {most_bytes:,} are read",
        remedy=_COPY,
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found
