"""Means, shares and differences with 95 % intervals, p values, and pass@k: pure functions of numbers."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, variance
from typing import NamedTuple


class Estimate(NamedTuple):
    mean: float
    low: float  # ends of the 95 % interval
    high: float


# ---- Student's t ----


def t_within(t: float, df: float) -> float:
    """P(|T| < t) of Student's t with df >= 1 degrees of freedom.

    With t = sqrt(df) tan(a) the density is proportional to cos(a)^(df - 1), which Simpson's rule integrates
    to about 1e-9.
    """
    angle, steps = math.atan(abs(t) / math.sqrt(df)), 2000
    values = [math.cos(angle * i / steps) ** (df - 1) for i in range(steps + 1)]
    weighted = values[0] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]) + values[-1]
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2))
    return min(1.0, angle / steps / 3 * weighted / whole)


@cache
def t_quantile(df: float) -> float:
    """The t that |T| exceeds with probability 0.05."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < 0.95 else (low, middle)
    return high


# ---- means and shares ----


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values, and Student's interval; the whole line for a single value."""
    n, mean = len(values), fmean(values)
    half = t_quantile(n - 1) * math.sqrt(variance(values) / n) if n > 1 else math.inf
    return Estimate(mean, mean - half, mean + half)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z, p = 1.96, successes / n
    d = 1 + z * z / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / d), min(1.0, (centre + half) / d)


def share_interval(means: Sequence[float], answers: int) -> Estimate:
    """Mean over problems of their share of right answers, `answers` each, or of their pass@k.

    Wilson's interval for one answer a problem. For several, answers to the same problem are not independent,
    so the interval is that of the mean of the problems' shares; where all are 0 or all 1 it would be empty,
    and Wilson's for as many problems is given.
    """
    mean = fmean(means)
    if answers == 1 or mean in (0.0, 1.0):
        return Estimate(mean, *wilson(math.fsum(means), len(means)))
    _, low, high = mean_interval(means)
    return Estimate(mean, max(0.0, low), min(1.0, high))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent shares; its interval combines their distances to both ends (Newcombe 1998)."""
    n, mean = len(estimates), fmean(e.mean for e in estimates)
    below = math.hypot(*(e.mean - e.low for e in estimates))
    above = math.hypot(*(e.high - e.mean for e in estimates))
    return Estimate(mean, max(0.0, mean - below / n), min(1.0, mean + above / n))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, from n (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


# ---- differences ----


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test: which side alone solved a problem is the toss of a fair coin."""
    n, less = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(less + 1)) / 2**n)


def paired_shares(only_a: int, only_b: int, n: int) -> Estimate:
    """B's share of right answers less A's on the same n problems; Agresti and Min's interval (2005).

    That is Wald's after adding 1/2 to each cell of the 2 x 2 table, which keeps it from being empty where no
    problem changed.
    """
    a, b, m = only_a + 0.5, only_b + 0.5, n + 2
    centre, half = (b - a) / m, 1.96 * math.sqrt(a + b - (b - a) ** 2 / m) / m
    return Estimate((only_b - only_a) / n, max(-1.0, centre - half), min(1.0, centre + half))


def paired_t(differences: Sequence[float]) -> tuple[Estimate, float]:
    """Mean of the problems' differences with Student's interval, and the two-sided p of its being 0."""
    n, estimate = len(differences), mean_interval(differences)
    if not estimate.mean or n == 1:
        return estimate, 1.0
    error = math.sqrt(variance(differences) / n)
    return estimate, 1 - t_within(estimate.mean / error, n - 1) if error else 0.0


def welch(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of b less mean of a, with Welch's interval; independent values, at least two of each."""
    square_a, square_b = variance(a) / len(a), variance(b) / len(b)
    square, difference = square_a + square_b, fmean(b) - fmean(a)
    if not square:
        return Estimate(difference, difference, difference)
    df = square**2 / (square_a**2 / (len(a) - 1) + square_b**2 / (len(b) - 1))
    half = t_quantile(df) * math.sqrt(square)
    return Estimate(difference, difference - half, difference + half)
