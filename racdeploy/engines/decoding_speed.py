"""Speed of decoding with a file: a few short answers in a child process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling

ENGINE = "llamacpp"
"""The engine whose speed on a device is known; others get a rough estimate."""
_PROMPT_TOKENS, _NEW_TOKENS, _REPEATS = 8, 16, 3
_ROUNDS = 9  # of alternating runs
_MIN_ROUND_S = 0.1  # three answers of a tiny model take a few milliseconds, which are mostly noise


@dataclass(frozen=True)
class DecodeSample:
    """Measured decoding of one file."""

    token_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class SpeedRatio:
    """Decoding speed of a file to that of another, in rounds that time both.

    Args:
        median: of the rounds.
        upper: upper bound of the median, of 98 % confidence with nine rounds.
    """

    median: float
    upper: float

    @classmethod
    def of_rounds(cls, ratios: Sequence[float]) -> SpeedRatio:
        """Return the ratio over some rounds.

        The second largest of nine is below the median of all rounds if at least eight of them are:
        10 of 512 times. That holds for any noise, one outlier in either direction included.
        """
        return cls(median(ratios), sorted(ratios)[-2])


def measure_file(
    file: Path,
    threads: int,
    engine: str = ENGINE,
    prompt_tokens: int = _PROMPT_TOKENS,
    min_s: float = 0.0,
) -> DecodeSample:
    """Decode a few short answers in a child process, and return the fastest.

    A single thread is timed in CPU time, so that other processes do not matter.

    Args:
        min_s: seconds of decoding until which answers are repeated.
    """
    spent = "decode_cpu_s" if threads == 1 else "decode_s"
    prompt = [number % 251 for number in range(prompt_tokens)]
    sampling = Sampling(max_new_tokens=_NEW_TOKENS, stop_ids=())
    settings = EngineSettings(prompt_tokens + 2 * _NEW_TOKENS, 1, threads)
    times: list[float] = []

    with open_engine(engine, file, settings) as opened:
        opened.generate([prompt[:4]], Sampling(max_new_tokens=2, stop_ids=()))

        while len(times) < _REPEATS or sum(times) < min_s:
            # Another prompt each time, so that no engine has it in its prompt cache.
            turn = len(times) % prompt_tokens
            turned = [*prompt[turn:], *prompt[:turn]]
            before = opened.stats[spent]
            opened.generate([turned], sampling)
            times.append(opened.stats[spent] - before)

        peak = int(opened.stats["peak_rss_bytes"])

    # The first new token belongs to the prompt's batch.
    return DecodeSample(min(times) / (_NEW_TOKENS - 1), peak)


def compare_speed(file: Path, other: Path, engine: str, threads: int) -> SpeedRatio:
    """Return how fast the first of two files decodes, to the other."""
    ratios = []
    for _ in range(_ROUNDS):
        # In turn, so that a busy minute slows both.
        own = measure_file(file, threads, engine, min_s=_MIN_ROUND_S)
        others = measure_file(other, threads, engine, min_s=_MIN_ROUND_S)
        ratios.append(others.token_s / own.token_s)
    return SpeedRatio.of_rounds(ratios)
