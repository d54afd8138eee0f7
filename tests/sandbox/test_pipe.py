"""Answers of another process are read whole, and waited for no longer than is said."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator

import pytest

from racdeploy.processes.messages import write_message
from racdeploy.sandbox.pipe import AnswerPipe

MAX_BYTES = 1_000_000


@pytest.fixture
def ends() -> Iterator[tuple[AnswerPipe, io.BufferedWriter]]:
    """A pipe, and what writes to it."""
    read, write = os.pipe()
    writer = os.fdopen(write, "wb")
    pipe = AnswerPipe(os.fdopen(read, "rb"), MAX_BYTES)
    yield pipe, writer
    writer.close()
    pipe.close()


def test_frames_that_come_at_once_are_read_one_by_one(
    ends: tuple[AnswerPipe, io.BufferedWriter],
) -> None:
    pipe, writer = ends
    sent = [({"n": number}, bytes(number)) for number in (0, 1, 70_000, 3)]

    def write() -> None:
        for header, payload in sent:
            write_message(writer, header, payload)

    feeder = threading.Thread(target=write)
    feeder.start()
    assert [pipe.receive(10.0) for _ in sent] == sent
    feeder.join()


def test_half_a_frame_is_waited_for_as_long_as_is_said(
    ends: tuple[AnswerPipe, io.BufferedWriter],
) -> None:
    pipe, writer = ends
    writer.write(b"\3\0\0\0\0\0\0\0\0\0\0\0{")
    writer.flush()
    with pytest.raises(TimeoutError):
        pipe.receive(0.2)


def test_a_closed_pipe_and_a_frame_that_is_too_large_are_ends(
    ends: tuple[AnswerPipe, io.BufferedWriter],
) -> None:
    pipe, writer = ends
    writer.write(b"\xff" * 12)
    writer.flush()
    assert pipe.receive(10.0) is None
    writer.close()
    assert pipe.receive(10.0) is None
