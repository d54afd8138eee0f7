"""Paired statistics of a comparison between a dense and a pruned model over the same prompts.

Accuracy: the drop d = (n10 - n01) / n, with n10 prompts that only the dense model answers and n01 that only
the pruned one does, judged by non-inferiority. Length: the ratio of restricted means E[min(T, budget)]. Two engines
or two arms that shall be alike: equivalence by two one-sided tests. Power: how many prompts a verdict needs. Knows
nothing of models, prompts or files, and is one module although it is long: a verdict and its power must not drift
apart.

Level: every ``confidence`` is that of a two-sided interval, and a gate looks at one end only. **A two-sided
90 % interval gives a one-sided 5 % test**: in general the gate's level is (1 - confidence) / 2. Counts are
whole, so it is met approximately: a model at the margin passes at most 5.5 % of the time from 50 prompts on, and
fails as rarely.

Tango's score test alone does not hold that. Where one arm never wins it passes up to 6.8 % (n10 is then binomial, and
skewed), so :func:`drop_interval` also takes the exact binomial interval of the other count. And it fails up to 7.5 %,
since few flips jump over the quantile: the end that can make a verdict "fail", which is the one between no drop and the
observed one, is solved with a continuity correction of half a prompt. The other end, and with it the power to pass,
stays as it is.

Several samples of a prompt are no independent prompts. :func:`paired_counts` counts each prompt's net difference and
scales the number of prompts by how large those differences are, after adding one prompt that flips wholly: with one
sample nothing changes, with many the prompt stays the unit (Rao and Scott's correction, made to lean to the safe side).

Sources: T. Tango, Statistics in Medicine 17 (1998) 891-908, for the paired drop; C. J. Clopper and E. S. Pearson,
Biometrika 26 (1934) 404-413; F. Yates, Supplement to JRSS 1 (1934) 217-235, for the correction; J. N. K. Rao and A. J.
Scott, Biometrics 48 (1992) 577-585; D. J. Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15 (1987) 657-680, for
two one-sided tests; E. B. Wilson, JASA 22 (1927) 209-212; Abramowitz and Stegun, Handbook of Mathematical Functions,
26.7, for Student's quantile.
"""

from __future__ import annotations

import math
from numbers import Integral
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from racdeploy.report.model import Verdict

_BISECTIONS = 60  # 2 · 2⁻⁶⁰ is below the spacing of floats near 1
_TAIL_SIGMAS = 8.5  # a binomial's mass outside is below 1e-15
_LARGEST_N = 1_000_000
_HALF_A_PROMPT = 0.5
_ROUNDING = 1e-9  # of sums of shares that would be whole


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    lower: float
    upper: float


class Pairs(NamedTuple):
    """Disagreements of two arms, in prompts; not whole where prompts have several samples.

    ``n10`` only the first arm is right, ``n01`` only the second, ``n`` prompts in all.
    """

    n10: float
    n01: float
    n: float


class RatioEstimate(NamedTuple):
    """A ratio of means over ``n`` prompts with its two-sided interval."""

    ratio: float
    lower: float
    upper: float
    n: int


def tango_interval(n10: int, n01: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of the paired drop (n10 - n01) / n.

    The interval holds every drop that Tango's score test does not reject. It exists for any table, also
    without discordant prompts.

    Args:
        n10: prompts with a right answer from the dense model only.
        n01: prompts with a right answer from the pruned model only.
        n: all prompts, at least 1.
        confidence: of the two-sided interval, in (0, 1).

    Raises:
        ValueError: the counts do not fit together.
    """
    _check_counts(n10, n01, n)
    quantile = _normal_quantile(confidence)
    # Swapping the arms turns the drop round, so one end is enough to solve for.
    return Interval(-_upper_bound(n01, n10, n, quantile), _upper_bound(n10, n01, n, quantile))


def paired_counts(first_right: ArrayLike, second_right: ArrayLike) -> Pairs:
    """Count the disagreements of two arms over the same prompts.

    Args:
        first_right: right_N, or right_NS with S samples of each prompt, 0 or 1 each.
        second_right: the same for the other arm; the order of the samples does not matter.
    """
    first_N, second_N = _shares_N(first_right), _shares_N(second_right)
    if first_N.shape != second_N.shape:
        raise ValueError(f"{len(first_N)} and {len(second_N)} prompts: not the same ones")
    net_N = first_N - second_N
    more, fewer = float(np.maximum(net_N, 0).sum()), float(np.maximum(-net_N, 0).sum())
    # Mean size of a difference, one whole flip added: 1 with one sample, so that the counts stay as they are.
    scale = (float((net_N**2).sum()) + 1) / (more + fewer + 1)
    return Pairs(more / scale, fewer / scale, len(net_N) / scale)


def drop_interval(n10: float, n01: float, n: float, confidence: float = 0.90) -> Interval:
    """Return the interval of the paired drop (n10 - n01) / n on which verdicts are based.

    Tango's score interval, widened by the exact binomial one of the other count where one arm never wins. Where
    it does not hold zero, its end nearer zero is continuity-corrected.

    Args:
        n10: prompts that only the first arm answers right; see :class:`Pairs`.
        n01: prompts that only the second does.
        n: all prompts, at least 1.
        confidence: of the two-sided interval, in (0, 1).
    """
    _check_pairs(n10, n01, n)
    quantile, tail = _normal_quantile(confidence), (1 - confidence) / 2
    lower, upper = -_upper_bound(n01, n10, n, quantile), _upper_bound(n10, n01, n, quantile)
    if lower > 0:
        lower = max(-_upper_bound(n01, n10, n, quantile, _HALF_A_PROMPT), 0.0)
    if upper < 0:
        upper = min(_upper_bound(n10, n01, n, quantile, _HALF_A_PROMPT), 0.0)
    if n01 == 0:
        lower, upper = (
            min(lower, _exact_lower(n10, n, tail)),
            max(upper, _exact_upper(n10, n, tail)),
        )
    if n10 == 0:
        lower, upper = (
            min(lower, -_exact_upper(n01, n, tail)),
            max(upper, -_exact_lower(n01, n, tail)),
        )
    return Interval(lower, upper)


def non_inferiority(
    n10: float, n01: float, n: float, margin: float, confidence: float = 0.90
) -> Verdict:
    """Judge whether the accuracy drop stays below ``margin``.

    Args:
        n10: prompts that only the first arm answers right; see :class:`Pairs`.
        n01: prompts that only the second does.
        n: all prompts, at least 1.
        margin: largest acceptable drop as a fraction, in [0, 1).
        confidence: of the two-sided interval; 0.90 makes "pass" a one-sided 5 % test.

    Returns:
        "pass" if the whole interval lies below the margin, "fail" if it lies above, else "inconclusive".
    """
    _check_margin(margin)
    return judge(drop_interval(n10, n01, n, confidence), margin)


def equivalence(
    n10: float, n01: float, n: float, margin: float, confidence: float = 0.90
) -> Verdict:
    """Judge by two one-sided tests whether two arms are equally accurate within ``margin``.

    Args:
        n10: prompts that only the first arm answers right; see :class:`Pairs`.
        n01: prompts that only the second does.
        n: all prompts, at least 1.
        margin: largest acceptable difference either way as a fraction, in [0, 1).
        confidence: of the two-sided interval; 0.90 makes each of the two tests one of 5 %.

    Returns:
        "pass" if the whole interval lies within ±margin, "fail" if it lies outside, else "inconclusive".
    """
    _check_margin(margin)
    return judge_within(drop_interval(n10, n01, n, confidence), -margin, margin)


def equivalent_lengths(
    first_lengths: ArrayLike,
    second_lengths: ArrayLike,
    budget: float,
    limit: float,
    confidence: float = 0.90,
) -> Verdict:
    """Judge by two one-sided tests whether two arms think equally long: a ratio between 1 / limit and limit.

    Args:
        first_lengths: lengths_N or lengths_NS in tokens, see :func:`length_ratio`.
        second_lengths: the same for the other arm, prompt by prompt.
        budget: the cap in tokens, above 0.
        limit: largest acceptable ratio either way, above 1.
        confidence: of the two-sided interval, in (0, 1).
    """
    if not (math.isfinite(limit) and limit > 1):
        raise ValueError(f"the limit is {limit}; it is a ratio above 1, such as 1.1")
    return judge_within(
        length_ratio(first_lengths, second_lengths, budget, confidence), 1 / limit, limit
    )


def judge(estimate: Interval | RatioEstimate, limit: float) -> Verdict:
    """Return "pass" if the interval lies below ``limit``, "fail" if it lies above, else "inconclusive".

    The same rule for a drop with its margin and for a length ratio with its limit.
    """
    if not math.isfinite(limit):
        raise ValueError(f"the limit is {limit}; a limit that is not a number gates nothing")
    if estimate.upper < limit:
        return "pass"
    return "fail" if estimate.lower > limit else "inconclusive"


def judge_within(estimate: Interval | RatioEstimate, lowest: float, highest: float) -> Verdict:
    """Return "pass" if the interval lies within both limits, "fail" if it lies outside, else "inconclusive"."""
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        raise ValueError(f"the limits are {lowest} and {highest}; the first is below the second")
    if lowest < estimate.lower and estimate.upper < highest:
        return "pass"
    return "fail" if estimate.lower > highest or estimate.upper < lowest else "inconclusive"


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of a single accuracy.

    Args:
        successes: right answers, at most ``n``.
        n: prompts, at least 1.
        confidence: of the two-sided interval, in (0, 1).
    """
    _check_counts(successes, 0, n)
    quantile = _normal_quantile(confidence)
    share, spread = successes / n, quantile**2 / n
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    lower = 0.0 if successes == 0 else max(0.0, center - half)
    upper = 1.0 if successes == n else min(1.0, center + half)
    return Interval(lower, upper)


def restricted_mean_lengths(lengths: ArrayLike, budget: float) -> float:
    """Return E[min(T, budget)], the mean thinking length under a cap.

    A truncated run belongs in ``lengths`` with the tokens it reached: it counts as the budget, which is what
    it cost. Leaving it out would reward a model for never stopping.

    Args:
        lengths: lengths_N in tokens, or lengths_NS with S samples of each prompt; zeros allowed.
        budget: the cap in tokens, above 0, the same for every arm.
    """
    return float(_restricted_N(lengths, budget).mean())


def length_ratio(
    dense_lengths: ArrayLike, pruned_lengths: ArrayLike, budget: float, confidence: float = 0.90
) -> RatioEstimate:
    """Return the ratio of restricted mean lengths, pruned over dense, over the same prompts.

    The prompt is the unit: the samples of one prompt are averaged first. With x and y the restricted lengths
    of a prompt, the delta method on log(mean y / mean x) gives the variance var(y / mean y - x / mean x) / n,
    which holds the paired covariance. The interval uses Student's quantile with n - 1 degrees of freedom.

    Identical arms give a ratio of 1 with a degenerate interval. One prompt, or an arm whose mean is zero (the
    logarithm does not exist), gives the interval from 0 to infinity: no limit is passed on such data.

    Args:
        dense_lengths: lengths_N or lengths_NS in tokens, truncated runs included at what they reached.
        pruned_lengths: the same for the pruned model, prompt by prompt.
        budget: the cap in tokens, above 0, the same for both.
        confidence: of the two-sided interval, in (0, 1).
    """
    dense_N, pruned_N = _restricted_N(dense_lengths, budget), _restricted_N(pruned_lengths, budget)
    if dense_N.shape != pruned_N.shape:
        raise ValueError(
            f"{len(dense_N)} dense and {len(pruned_N)} pruned lengths: not the same prompts"
        )
    _check_confidence(confidence)
    n, dense_mean, pruned_mean = len(dense_N), float(dense_N.mean()), float(pruned_N.mean())
    if dense_mean == 0 or pruned_mean == 0:
        ratio = 1.0 if dense_mean == pruned_mean else math.inf if dense_mean == 0 else 0.0
        return RatioEstimate(ratio, 0.0, math.inf, n)
    ratio = pruned_mean / dense_mean
    if n == 1:
        return RatioEstimate(ratio, 0.0, math.inf, n)
    deviation = _deviation(dense_N, pruned_N) / math.sqrt(n)
    half = _student_quantile((1 + confidence) / 2, n - 1) * deviation
    factor = math.exp(half) if half < 700 else math.inf
    return RatioEstimate(ratio, ratio / factor, ratio * factor, n)


def power(
    n: int, discordant_rate: float, margin: float, confidence: float = 0.90, drop: float = 0.0
) -> float:
    """Return the probability that :func:`non_inferiority` says "pass".

    Exact: a sum over the tables that can occur, not an approximation. With ``drop`` equal to ``margin`` it is
    the type-I error.

    Args:
        n: prompts, 1 to a million.
        discordant_rate: share of prompts on which the arms disagree, in [0, 1].
        margin: largest acceptable drop, in [0, 1).
        confidence: of the two-sided interval, in (0, 1).
        drop: the true drop; its size is at most ``discordant_rate``.
    """
    _check_counts(0, 0, n)
    _check_margin(margin)
    if n > _LARGEST_N:
        raise ValueError(f"n is {n}; power is computed up to {_LARGEST_N} prompts")
    if not 0 <= discordant_rate <= 1 or not abs(drop) <= discordant_rate:
        raise ValueError(
            f"a drop of {drop} needs a discordant rate in [{abs(drop)}, 1], not {discordant_rate}"
        )
    quantile = _normal_quantile(confidence)
    share = 0.5 if discordant_rate == 0 else (discordant_rate + drop) / (2 * discordant_rate)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    discordant_D = _likely_counts(n, discordant_rate)
    mass_D = _binomial_masses(discordant_D, n, discordant_rate, log_factorials)
    passing_D = _most_passing(discordant_D, n, margin, quantile)
    # Where only the dense model wins, the exact binomial test has to pass too; see drop_interval.
    lenient_D = _binomial_cdf(discordant_D, n, margin) >= (1 - confidence) / 2
    passing_D = np.where((passing_D == discordant_D) & lenient_D, discordant_D - 1, passing_D)
    total = 0.0
    for discordant, mass, passing in zip(discordant_D, mass_D, passing_D, strict=True):
        counts = _likely_counts(int(discordant), share)
        counts = counts[counts <= passing]
        total += mass * _binomial_masses(counts, int(discordant), share, log_factorials).sum()
    return float(min(total, 1.0))


def required_n(
    discordant_rate: float,
    margin: float,
    confidence: float = 0.90,
    drop: float = 0.0,
    target_power: float = 0.8,
) -> int:
    """Return how many prompts make "pass" as likely as ``target_power``.

    Counts are whole, so power climbs in a saw-tooth; this is a crossing of it, and a few prompts more may
    fall a little below.

    Raises:
        ValueError: the drop is not below the margin, or more than a million prompts would be needed.
    """
    if not 0 < target_power < 1:
        raise ValueError(f"target_power is {target_power}; it lies between 0 and 1")
    if not drop < margin:
        raise ValueError(
            f"a true drop of {drop} is not below the margin of {margin}: no n is enough"
        )
    high = 1
    while power(high, discordant_rate, margin, confidence, drop) < target_power:
        if high == _LARGEST_N:
            raise ValueError(
                f"more than {_LARGEST_N} prompts would be needed for a margin of {margin}"
            )
        high = min(2 * high, _LARGEST_N)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if power(middle, discordant_rate, margin, confidence, drop) < target_power:
            low = middle
        else:
            high = middle
    return high


def smallest_detectable_drop(
    n: int, discordant_rate: float, confidence: float = 0.90, target_power: float = 0.8
) -> float:
    """Return the smallest margin that a model without any drop passes with ``target_power`` on ``n`` prompts.

    A gate with a smaller margin mostly answers "inconclusive". 1.0 means that no margin is small enough.
    """
    if not 0 < target_power < 1:
        raise ValueError(f"target_power is {target_power}; it lies between 0 and 1")
    low, high = 0.0, 1.0
    for _ in range(20):  # to a millionth
        middle = (low + high) / 2
        if power(n, discordant_rate, middle, confidence) < target_power:
            low = middle
        else:
            high = middle
    return high


def length_deviation(dense_lengths: ArrayLike, pruned_lengths: ArrayLike, budget: float) -> float:
    """Return the standard deviation by prompt that decides the width of :func:`length_ratio`'s interval."""
    return _deviation(_restricted_N(dense_lengths, budget), _restricted_N(pruned_lengths, budget))


def length_power(
    n: int, deviation: float, limit: float, confidence: float = 0.90, ratio: float = 1.0
) -> float:
    """Return the probability that a length ratio stays below its limit, by the normal approximation.

    Args:
        n: prompts, at least 2.
        deviation: see :func:`length_deviation`.
        limit: largest ratio that passes.
        confidence: of the two-sided interval, in (0, 1).
        ratio: the true ratio.
    """
    _check_confidence(confidence)
    if n < 2 or limit <= 0 or ratio <= 0 or deviation < 0:
        raise ValueError(
            f"no power for n = {n}, deviation {deviation}, limit {limit}, ratio {ratio}"
        )
    room = math.log(limit / ratio)
    if deviation == 0:
        return 1.0 if room > 0 else 0.0
    needed = _student_quantile((1 + confidence) / 2, n - 1)
    return NormalDist().cdf(room * math.sqrt(n) / deviation - needed)


def smallest_detectable_ratio(
    n: int, deviation: float, confidence: float = 0.90, target_power: float = 0.8
) -> float:
    """Return the smallest limit that a model of unchanged length passes with ``target_power`` on ``n`` prompts."""
    if n < 2 or not 0 < target_power < 1:
        raise ValueError(f"no ratio for n = {n} and target_power {target_power}")
    needed = _student_quantile((1 + confidence) / 2, n - 1) + NormalDist().inv_cdf(target_power)
    return math.exp(needed * deviation / math.sqrt(n))


def _exact_upper(count: float, n: float, tail: float) -> float:
    """Return Clopper and Pearson's upper bound of a share, rounded to the safe side where counts are not whole."""
    count, n = math.ceil(count - _ROUNDING), math.floor(n + _ROUNDING)
    if count >= n:
        return 1.0
    low, high = count / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float(_binomial_cdf(np.array([count]), n, middle)[0]) < tail:
            high = middle
        else:
            low = middle
    return high


def _exact_lower(count: float, n: float, tail: float) -> float:
    """Return Clopper and Pearson's lower bound of a share."""
    whole_n = math.ceil(n - _ROUNDING)
    return 1 - _exact_upper(whole_n - math.floor(count + _ROUNDING), whole_n, tail)


def _upper_bound(
    n10: float, n01: float, n: float, quantile: float, continuity: float = 0.0
) -> float:
    """Bisect for the largest drop that the score test does not reject; the score falls with the drop.

    ``continuity`` is how many flips are taken off the difference that is tested.
    """
    low, high = (n10 - n01) / n, 1.0
    if low == high:
        return 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float(_score(n10, n01, n, middle, continuity)) < -quantile:
            high = middle
        else:
            low = middle
    return high


def _score(
    n10: ArrayLike, n01: ArrayLike, n: float, drop: float, continuity: float = 0.0
) -> NDArray[np.float64]:
    """Return Tango's score statistic for the hypothesis that the true drop is ``drop``.

    Its variance takes the maximum-likelihood p01 under the hypothesis, the larger root of
    2n p² + b p + c = 0, written so that nothing cancels.
    """
    n10, n01 = np.asarray(n10, dtype=np.float64), np.asarray(n01, dtype=np.float64)
    b = -n10 - n01 + (2 * n - n10 + n01) * drop
    c = -n01 * drop * (1 - drop)
    root = np.sqrt(np.maximum(b * b - 8 * n * c, 0.0))
    p01 = np.where(b > 0, -2 * c / np.where(b > 0, root + b, 1.0), (root - b) / (4 * n))
    variance = n * np.maximum(2 * p01 + drop * (1 - drop), 0.0)
    difference = n10 - n01 - n * drop
    difference = np.copysign(np.maximum(np.abs(difference) - continuity, 0.0), difference)
    # Without variance any difference is infinitely surprising, and none is no surprise.
    surprise = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.where(
        variance > 0, difference / np.sqrt(np.where(variance > 0, variance, 1.0)), surprise
    )


def _most_passing(
    discordant_D: NDArray[np.int64], n: int, margin: float, quantile: float
) -> NDArray[np.int64]:
    """Return the largest n10 that passes for each number of discordant prompts; -1 where none does."""
    low_D, high_D = np.full_like(discordant_D, -1), discordant_D + 1
    while np.any(high_D - low_D > 1):
        middle_D = (low_D + high_D) // 2
        passes_D = (_score(middle_D, discordant_D - middle_D, n, margin) < -quantile) | (
            middle_D < 0
        )
        low_D, high_D = np.where(passes_D, middle_D, low_D), np.where(passes_D, high_D, middle_D)
    return low_D


def _likely_counts(n: int, rate: float) -> NDArray[np.int64]:
    """Return the counts that hold all but a negligible part of a binomial's mass."""
    reach = (
        _TAIL_SIGMAS * math.sqrt(n * rate * (1 - rate)) + 25
    )  # the constant covers small, skewed cases
    return np.arange(max(0, math.floor(n * rate - reach)), min(n, math.ceil(n * rate + reach)) + 1)


def _binomial_masses(
    counts: NDArray[np.int64], n: int, rate: float, log_factorials: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return P(X = count) for X ~ Binomial(n, rate)."""
    log_rate, log_rest = math.log(max(rate, 1e-300)), math.log(max(1 - rate, 1e-300))
    log_choose = log_factorials[n] - log_factorials[counts] - log_factorials[n - counts]
    masses: NDArray[np.float64] = np.exp(log_choose + counts * log_rate + (n - counts) * log_rest)
    return masses


def _binomial_cdf(counts: NDArray[np.int64], n: int, rate: float) -> NDArray[np.float64]:
    """Return P(X <= count) for X ~ Binomial(n, rate)."""
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    masses = _binomial_masses(np.arange(int(counts.max()) + 1), n, rate, log_factorials)
    cdf: NDArray[np.float64] = np.cumsum(masses)[counts]
    return cdf


def _deviation(dense_N: NDArray[np.float64], pruned_N: NDArray[np.float64]) -> float:
    return float((pruned_N / pruned_N.mean() - dense_N / dense_N.mean()).std(ddof=1))


def _shares_N(right: ArrayLike) -> NDArray[np.float64]:
    """Return the share of right samples by prompt."""
    raw = np.asarray(right, dtype=np.float64)
    if raw.ndim not in (1, 2) or raw.size == 0 or not np.isin(raw, (0.0, 1.0)).all():
        raise ValueError(
            f"right answers are 0 or 1, one or one row of samples per prompt; got shape {raw.shape}"
        )
    return raw if raw.ndim == 1 else raw.mean(axis=1)


def _restricted_N(lengths: ArrayLike, budget: float) -> NDArray[np.float64]:
    """Return min(length, budget) by prompt, averaged over its samples."""
    raw = np.asarray(lengths, dtype=np.float64)
    if raw.ndim not in (1, 2) or raw.size == 0:
        raise ValueError(
            f"lengths are one number, or one row of samples, per prompt; got shape {raw.shape}"
        )
    if not np.isfinite(raw).all() or (raw < 0).any():
        raise ValueError("a length is negative or not finite")
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"the budget is {budget}; it is a number of tokens above 0")
    restricted = np.minimum(raw, budget)
    return restricted if raw.ndim == 1 else restricted.mean(axis=1)


def _normal_quantile(confidence: float) -> float:
    _check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _student_quantile(probability: float, freedom: int) -> float:
    """Return Student's quantile for a probability of at least one half.

    Bisects the angle of Abramowitz and Stegun 26.7.3 and 26.7.4, whose sums are finite for whole degrees of
    freedom; above 1000 the first term of 26.7.5 is within 1e-6.
    """
    if freedom > 1000:
        normal = NormalDist().inv_cdf(probability)
        return normal + (normal**3 + normal) / (4 * freedom)
    odd, steps = freedom % 2, np.arange(1, freedom // 2)
    factors = (2 * steps - 1 + odd) / (2 * steps + odd)
    low, high = 0.0, math.pi / 2
    for _ in range(_BISECTIONS):
        angle = (low + high) / 2
        series = 1 + np.cumprod(factors * math.cos(angle) ** 2).sum() if freedom > 1 else 0.0
        inside = math.sin(angle) * series
        if odd:
            inside = 2 / math.pi * (angle + math.cos(angle) * inside)
        if inside < 2 * probability - 1:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(high)


def _check_counts(n10: int, n01: int, n: int) -> None:
    if not all(isinstance(count, Integral) for count in (n10, n01, n)):
        raise ValueError(f"counts are whole numbers, not {n10!r}, {n01!r}, {n!r}")
    if n < 1 or n10 < 0 or n01 < 0 or n10 + n01 > n:
        raise ValueError(f"counts {n10} and {n01} do not fit into {n} prompts")


def _check_pairs(n10: float, n01: float, n: float) -> None:
    if not (math.isfinite(n) and n >= 1 and n10 >= 0 and n01 >= 0 and n10 + n01 <= n + _ROUNDING):
        raise ValueError(f"counts {n10} and {n01} do not fit into {n} prompts")


def _check_margin(margin: float) -> None:
    if not 0 <= margin < 1:
        raise ValueError(
            f"the margin is {margin}; it is a fraction from 0 up to 1, such as 0.02 for 2 points"
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is {confidence}; it lies between 0 and 1, such as 0.90")
