"""Read files of strangers with a limit on their size; every failure is an ArtifactError.

Files of bundles and model folders may come from anyone. They are opened here, so that a huge file,
a pipe or a device does no harm, and a parser's failure becomes one line that names the file.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from racdeploy.errors import ArtifactError, RacdeployError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Json = dict[str, Any]
"""A JSON object."""
MAX_BYTES = 16_000_000
"""Maximum size of a file, unless another limit is given."""
MAX_LINE_BYTES = 1_000_000
"""Maximum size of a line in JSON Lines."""
MAX_USER_BYTES = 1 << 28
"""Maximum size of a file of questions or text that the user names."""

# An empty list has 3 bytes of text and takes 64 of memory. A tokenizer of 262,144 tokens has 1.6
# million commas and brackets.
_MAX_ITEMS = 4_000_000
_COPY_AGAIN = "copy it again from its source"
_SHOWN_CHARACTERS = 200
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Requests to end the program, not failures of reading.
_EXITS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def describe_validation_error(error: ValidationError) -> str:
    """Return the first problem in a file's values, after the path of its key.

    Keys are any text of the file's author, so white space in them is removed.
    """
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    where = " ".join(key.split())[:_SHOWN_CHARACTERS]

    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def check_version(model: type[BaseModel], values: object, where: object) -> None:
    """Refuse another schema version, before anything else in a file is judged.

    Args:
        model: of the file; the default of its ``schema_version`` is the one that is read.
        values: parsed content; without a version it is of the model's.
        where: the file, for the message.
    """
    known = model.model_fields["schema_version"].default
    version = values.get("schema_version", known) if isinstance(values, dict) else known
    if version == known:
        return

    from racdeploy import __version__

    text = json.dumps(values, default=str)  # TOML has dates
    found = re.search(r'"racdeploy(?:_version)?": "([\w.+]{1,40})"', text)
    writer = f"racdeploy {found[1]}" if found else "another release"
    raise ArtifactError(
        "unknown-schema-version",
        f"{where} has schema version {version!r:.20}, of {writer}; racdeploy {__version__} reads "
        f"{known}",
        remedy=f"open it with {writer}, or make it again with this one",
    )


def read_bytes(file: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        ArtifactError: it has more than ``max_bytes``, or is no regular file.
        OSError: it does not exist, or cannot be opened.
    """
    with open_regular(file) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        # read() allocates a buffer of the size given; one byte more detects a growing file.
        content = stream.read(size_bytes + 1) if size_bytes <= max_bytes else b""

    size_bytes = max(size_bytes, len(content))
    if size_bytes > max_bytes:
        raise _refuse_size(file, size_bytes, max_bytes)
    return content


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a file; see :func:`read_bytes`."""
    return _decode(read_bytes(file, max_bytes), file)


def read_user_text(file: Path, remedy: str) -> str:
    """Return a text of the user without its byte order mark, which Excel and Windows add.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        content = read_bytes(file, MAX_USER_BYTES)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            "file-unreadable", f"{file} cannot be read: {error.strerror}", remedy=remedy
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        copy = f"{file.stem}-utf8{file.suffix}"
        raise UsageError(
            "text-not-utf8",
            f"{file}:{line} is not UTF-8 text: byte {error.start}: {error.reason}",
            remedy=f"save it as UTF-8: iconv -f latin1 -t utf8 {file} > {copy}",
        ) from error


def read_json(file: Path, max_bytes: int = MAX_BYTES, *, strict: bool = False) -> Json:
    """Return the JSON object in a file; ArtifactError for anything else.

    ``strict`` refuses duplicate keys, NaN and Infinity, which programs read differently.
    """
    value = parse_json(read_text(file, max_bytes), str(file), strict=strict)
    if not isinstance(value, dict):
        raise ArtifactError(
            "json-not-an-object", f"{file} holds a {type(value).__name__}, not an object"
        )
    return value


def read_lines(file: Path, max_lines: int) -> Iterator[str]:
    """Yield the lines of a UTF-8 text, each of at most MAX_LINE_BYTES; see :func:`read_bytes`."""
    with open_regular(file) as stream:
        for number in count(1):
            line = stream.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if number > max_lines or len(line) > MAX_LINE_BYTES:
                raise ArtifactError(
                    "file-too-large",
                    f"{file} has more than {max_lines:,} lines, or one of more than "
                    f"{MAX_LINE_BYTES:,} bytes",
                    remedy=_COPY_AGAIN,
                )

            yield _decode(line, file).removesuffix("\n")


def check_size(file: Path, max_bytes: int) -> None:
    """Raise ArtifactError where a file is too large or not regular; a library reads it later."""
    with open_regular(file) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
    if size_bytes > max_bytes:
        raise _refuse_size(file, size_bytes, max_bytes)


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file for reading; ArtifactError for a pipe or a device."""
    # Without O_NONBLOCK, a pipe would be waited for.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    stream = os.fdopen(descriptor, "rb")
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return stream

    stream.close()
    raise ArtifactError(
        "not-a-regular-file", f"{file} is not a regular file", remedy="give a file, not a pipe"
    )


def parse_json(text: str, where: str, *, strict: bool = False, remedy: str = _COPY_AGAIN) -> Any:
    """Return a JSON value; all of its texts can be encoded as UTF-8.

    Raises:
        ArtifactError: it is too large, or is not valid JSON.
    """
    # Limit the memory before it is taken: Python's objects are much larger than their text.
    items = sum(map(text.count, ",[{"))
    if items > _MAX_ITEMS:
        raise ArtifactError(
            "json-too-large",
            f"{where} has {items:,} commas and brackets, and at most {_MAX_ITEMS:,} are read",
        )

    try:
        value = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates if strict else None,
            parse_constant=_refuse_constant if strict else None,
        )
        if _SURROGATE.search(text):  # a lone one is valid JSON and cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            "invalid-json", f"{where} is not valid JSON: {error}", remedy=remedy
        ) from error

    return value


@contextmanager
def artifact_errors(subject: object, remedy: str = _COPY_AGAIN) -> Iterator[None]:
    """Turn all exceptions of the body into an ArtifactError of one line.

    Native libraries raise exceptions that are no ``Exception``. Errors of racdeploy pass, and so
    does OSError, which has the system's reason.
    """
    try:
        yield
    except (RacdeployError, OSError, *_EXITS):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
        kind = type(error).__name__
        cause = f"{kind}: {reason}" if reason else kind
        message = f"{subject} is damaged: {cause}"
        raise ArtifactError("damaged-file", message, remedy=remedy) from error


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            "file-not-utf8", f"{file} is not UTF-8 text: {error}", remedy=_COPY_AGAIN
        ) from error


def _refuse_size(file: Path, size_bytes: int, max_bytes: int) -> ArtifactError:
    return ArtifactError(
        "file-too-large",
        f"{file} has {size_bytes:,} bytes, and at most {max_bytes:,} are read",
        remedy=_COPY_AGAIN,
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs twice")
    return value
