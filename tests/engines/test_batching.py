"""Continuous batching on decoders that predict the successor of each token."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from racdeploy.engines.batching import Batcher, BatchToken, SequenceGroup, TokenUpdates
from racdeploy.engines.engine import Sampling
from racdeploy.engines.sequence import GeneratedSequence
from racdeploy.errors import EngineError
from tests.support.waiting import PATIENCE_S

SHORT = Sampling(max_new_tokens=6, stop_ids=(50,))
ENDLESS = Sampling(max_new_tokens=1_000_000, stop_ids=())


class Recorder:
    """A decoder that checks what it is given; ``gate`` makes it wait before each batch."""

    slots = 3
    batch_tokens = 8

    def __init__(self, gate: threading.Semaphore | None = None) -> None:
        self.batches: list[int] = []
        self.together: list[int] = []  # slots in each batch
        self.shares: list[int] = []
        self._seen: dict[int, list[int]] = {slot: [] for slot in range(self.slots)}
        self._rows: Sequence[BatchToken] = []
        self._gate = gate

    def decode(self, rows: Sequence[BatchToken]) -> None:
        time.sleep(0.0002)  # as a real one, it lets other threads run meanwhile
        if self._gate:
            self._gate.acquire()
        assert 0 < len(rows) <= self.batch_tokens
        # Neighbours are computed together.
        assert [row.slot for row in rows] == sorted(row.slot for row in rows)
        for row in rows:
            assert row.position == len(self._seen[row.slot])
            self._seen[row.slot].append(row.token)
        self._rows = rows
        self.batches.append(len(rows))
        self.together.append(len({row.slot for row in rows}))

    def logits_V(self, place: int) -> np.ndarray:
        assert self._rows[place].wants_logits
        return np.eye(100, dtype=np.float32)[(self._rows[place].token + 1) % 100]

    def clear_slot(self, slot: int) -> None:
        self._seen[slot] = []

    def share_threads(self, busy: int) -> None:
        self.shares.append(busy)


@dataclass
class Asked:
    """A request: its job, what it was told, and whether it has ended."""

    job: SequenceGroup
    told: dict[int, list[int]]
    ended: threading.Event = field(default_factory=threading.Event)
    ends: int = 0

    @classmethod
    def of(cls, prompts: Sequence[list[int]], sampling: Sampling) -> Asked:
        sequences = [
            GeneratedSequence(i, ids, sampling, 2_000_000) for i, ids in enumerate(prompts)
        ]
        told: dict[int, list[int]] = {i: [] for i in range(len(prompts))}

        def on_news(news: TokenUpdates) -> None:
            for index, ids, ended in news:
                told[index] += ids
                assert ended is None or list(ended.ids) == told[index]

        def on_end() -> None:
            asked.ends += 1
            asked.ended.set()

        asked = cls(SequenceGroup(sequences, on_news, on_end), told)
        return asked

    def ids(self) -> list[list[int]]:
        assert self.ended.wait(PATIENCE_S)
        ids = [sequence.ids for sequence in self.job.sequences]
        assert list(self.told.values()) == ids
        assert self.ends == 1
        return ids


def test_slots_are_refilled_and_long_prompts_come_in_pieces() -> None:
    """Seven sequences in three slots: positions run on, no batch is too large, every result is
    right.
    """
    asked = Asked.of([[40 + i] * (1 + 5 * i) for i in range(7)], SHORT)
    decoder = Recorder()
    Batcher([decoder]).start(asked.job)
    assert asked.ids() == [list(range(41 + i, min(47 + i, 51))) for i in range(7)]
    assert max(decoder.batches) == decoder.batch_tokens


def test_decoders_share_the_work_and_each_answers_alike() -> None:
    """Twenty sequences over two decoders: all are told, both worked, each with half the threads,
    and no result depends on which one it was.
    """
    asked = Asked.of([[20 + i] for i in range(20)], SHORT)
    decoders = [Recorder(), Recorder()]
    Batcher(decoders).start(asked.job)
    assert asked.ids() == [list(range(21 + i, min(27 + i, 51))) for i in range(20)]
    assert all(2 in decoder.shares for decoder in decoders)


def test_a_request_joins_what_runs() -> None:
    """A second request is decoded beside a first that has no end; the first does not notice."""
    decoder = Recorder()
    batcher = Batcher([decoder])
    endless = Asked.of([[10]], ENDLESS)
    batcher.start(endless.job)

    joining = Asked.of([[20], [30]], SHORT)
    batcher.start(joining.job)
    assert joining.ids() == [list(range(21, 27)), list(range(31, 37))]
    assert 3 in decoder.together
    assert not endless.ended.is_set()

    batcher.cancel(endless.job)
    (ids,) = endless.ids()
    assert ids == [(11 + i) % 100 for i in range(len(ids))]


def test_requests_take_turns() -> None:
    """One sequence is not kept waiting by a request of a hundred that came first."""
    gate = threading.Semaphore(0)
    batcher = Batcher([Recorder(gate)])
    many, one = Asked.of([[10]] * 100, SHORT), Asked.of([[20]], SHORT)
    batcher.start(many.job)
    batcher.start(one.job)
    gate.release(40)
    assert one.ids() == [list(range(21, 27))]
    assert len(many.job.waiting) > 50
    gate.release(1000)
    assert len(many.ids()) == 100


def test_a_request_that_is_cancelled_frees_its_slots() -> None:
    """Also those that wait; cancelling again does nothing."""
    batcher = Batcher([Recorder()])
    endless, waiting = Asked.of([[10]] * 5, ENDLESS), Asked.of([[20]], SHORT)
    batcher.start(endless.job)
    batcher.start(waiting.job)
    batcher.cancel(endless.job)
    assert waiting.ids() == [list(range(21, 27))]
    assert len(endless.ids()) == 5
    batcher.cancel(endless.job)
    assert endless.ends == 1


def test_a_decoder_that_fails_ends_what_it_ran() -> None:
    """The error is its requests' alone, and nobody goes on for answers that are lost."""

    class Broken(Recorder):
        def decode(self, rows: Sequence[BatchToken]) -> None:
            if any(row.token == 99 for row in rows):
                raise EngineError("decode-failed", "the decoder broke")
            super().decode(rows)

    batcher = Batcher([Broken(), Broken()])
    broken = Asked.of([[90], [91], [92], [93]], ENDLESS)
    batcher.start(broken.job)
    assert broken.ended.wait(PATIENCE_S)
    assert broken.job.error is not None
    assert broken.job.error.code == "decode-failed"

    well = Asked.of([[20]], SHORT)
    batcher.start(well.job)
    assert well.ids() == [list(range(21, 27))]
    assert well.job.error is None


def test_logits_that_are_no_numbers_end_their_request_only() -> None:
    """The sequences beside it go on."""

    class Overflowing(Recorder):
        def logits_V(self, place: int) -> np.ndarray:
            bad = self._rows[place].token == 66
            return np.full(100, np.nan, dtype=np.float32) if bad else super().logits_V(place)

    batcher = Batcher([Overflowing()])
    bad, well = Asked.of([[65]], SHORT), Asked.of([[20]], SHORT)
    batcher.start(bad.job)
    batcher.start(well.job)
    assert well.ids() == [list(range(21, 27))]
    assert bad.ended.wait(PATIENCE_S)
    assert bad.job.error is not None
    assert bad.job.error.code == "logits-not-finite"


def test_a_pause_waits_for_all_requests() -> None:
    gate = threading.Semaphore(0)
    batcher = Batcher([Recorder(gate)])
    asked = Asked.of([[20]], SHORT)
    batcher.start(asked.job)
    threading.Timer(0.1, gate.release, (100,)).start()
    with batcher.paused():
        assert asked.ended.is_set() or not batcher.running
    assert asked.ids() == [list(range(21, 27))]


def test_a_request_without_sequences_ends_at_once() -> None:
    asked = Asked.of([], SHORT)
    Batcher([Recorder()]).start(asked.job)
    assert asked.ended.is_set()


@pytest.mark.parametrize("requests", [1, 8])
def test_many_requests_give_what_each_gives_alone(requests: int) -> None:
    batcher = Batcher([Recorder(), Recorder()])
    asked = [Asked.of([[10 + i], [20 + i]], SHORT) for i in range(requests)]
    threads = [threading.Thread(target=batcher.start, args=(a.job,)) for a in asked]
    for thread in threads:
        thread.start()
    for i, one in enumerate(asked):
        assert one.ids() == [list(range(11 + i, 17 + i)), list(range(21 + i, 27 + i))]
