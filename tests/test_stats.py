"""infra/stats.py: intervals, tests and pass@k against hand-worked numbers, counting and scipy."""

import math
from itertools import combinations, product

import pytest

from infra.stats import (
    Estimate,
    mcnemar,
    mean_interval,
    mean_of,
    paired_shares,
    paired_t,
    pass_at_k,
    share_interval,
    t_quantile,
    t_within,
    welch,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 3.8416 / 13.8416),  # z^2 / (n + z^2)
        (10, 10, 10 / 13.8416, 1.0),
        (5, 10, 0.236589, 0.763411),  # (5 + 1.9208 -+ 1.96 sqrt(2.5 + 0.9604)) / 13.8416
    ],
)
def test_wilson_by_hand(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 4), (263, 300), (0.5, 7), (1, 10**6)])
def test_wilson_is_where_the_normal_test_just_rejects(successes, n):
    for p in wilson(successes, n):
        assert abs(successes / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 0, 2) == 0 and pass_at_k(4, 4, 1) == 1 and pass_at_k(4, 3, 2) == 1
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "right"), [(5, 1), (6, 2), (6, 4)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n, right):
    for k in range(1, n + 1):
        choices = list(combinations(range(n), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(min(c) < right for c in choices) / len(choices))


def test_t_distribution_by_tables():
    """Quantiles from any table of Student's t; one degree of freedom is Cauchy, two have a closed form."""
    for df, t in ((1, 12.706), (2, 4.303), (5, 2.571), (29, 2.045), (1000, 1.962), (5000, 1.9604)):
        assert t_quantile(df) == pytest.approx(t, abs=6e-4)
        assert t_within(t_quantile(df), df) == pytest.approx(0.95, abs=1e-9)
    assert t_within(1, 1) == pytest.approx(0.5)
    assert t_within(3, 2) == pytest.approx(3 / math.sqrt(11))
    assert t_within(0, 7) == 0 and t_within(1e6, 3) == pytest.approx(1)


def test_mean_interval_by_hand():
    """1, 2, 3: mean 2, standard error sqrt(1 / 3), t of two degrees of freedom."""
    mean, low, high = mean_interval([1, 2, 3])
    assert mean == 2 and high - 2 == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert low == pytest.approx(4 - high)
    assert mean_interval([5.0]) == (5, -math.inf, math.inf)


def test_share_interval_is_wilsons_for_one_answer_and_clustered_for_several():
    assert share_interval([1, 0, 0, 1], 1) == (0.5, *wilson(2, 4))
    # two answers to each of four problems: shares 1, 1/2, 0, 1/2; sd sqrt(1/6), error sqrt(1/24)
    mean, low, high = share_interval([1, 0.5, 0, 0.5], 2)
    wanted = min(1, 0.5 + 3.18245 * math.sqrt(1 / 24))
    assert mean == 0.5 and high == pytest.approx(wanted, abs=1e-4) and low == 0
    mean, low, high = share_interval([1, 0.5, 0, 0.5] * 4, 2)
    error = math.sqrt(2 / 15 / 16)
    assert high == pytest.approx(0.5 + 2.13145 * error, abs=1e-4) and low == pytest.approx(1 - high)
    assert share_interval([0.0] * 10, 8) == (0, *wilson(0, 10))  # never an empty interval


def test_mean_of_shares_by_hand():
    mean, low, high = mean_of([Estimate(0.5, 0.4, 0.7), Estimate(0.3, 0.0, 0.7)])
    wanted = 0.4, 0.4 - math.hypot(0.1, 0.3) / 2, 0.4 + math.hypot(0.2, 0.4) / 2
    assert (mean, low, high) == pytest.approx(wanted)


def test_mcnemar_by_hand_and_by_counting():
    assert mcnemar(0, 0) == 1 and mcnemar(3, 3) == 1
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(2 * 7 / 64)
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    for a, b in ((2, 7), (4, 5)):
        tosses = [sum(t) for t in product((0, 1), repeat=a + b)]
        assert mcnemar(a, b) == min(1, 2 * sum(t <= min(a, b) for t in tosses) / len(tosses))
    assert mcnemar(600, 700) == pytest.approx(0.006, abs=5e-4)  # normal: z = 99 / sqrt(1300) = 2.746


def test_paired_shares_by_hand():
    """Table (30, 12; 4, 54): centre (4.5 - 12.5) / 102, variance (17 - 64 / 102) / 102^2."""
    mean, low, high = paired_shares(12, 4, 100)
    half = 1.96 * math.sqrt(17 - 64 / 102) / 102
    assert mean == -0.08 and (low, high) == pytest.approx((-8 / 102 - half, -8 / 102 + half))
    mean, low, high = paired_shares(0, 0, 50)
    assert mean == 0 and low == -high and 0.03 < high < 0.05


def test_paired_t_by_hand():
    """0, 1/2, 1/2, 1: mean 1/2, sd sqrt(1/6), t = 1/2 / sqrt(1/24) = 2.449, p = 0.0917 with three degrees."""
    (mean, low, high), p = paired_t([0, 0.5, 0.5, 1])
    assert mean == 0.5 and p == pytest.approx(0.09172, abs=1e-4) and low < 0 < high
    assert paired_t([0.0, 0.0])[1] == 1 and paired_t([0.5, -0.5])[1] == 1 and paired_t([1.0])[1] == 1
    assert paired_t([0.25] * 4)[1] == 0


def test_welch_by_hand():
    """Means 2 and 5, squared errors 1/3 and 4/3: 25 / 17 * 2 degrees of freedom."""
    mean, low, high = welch([1, 2, 3], [3, 5, 7])
    assert mean == 3 and high - 3 == pytest.approx(t_quantile(50 / 17) * math.sqrt(5 / 3))
    assert low == pytest.approx(6 - high)
    assert welch([1, 1], [2, 2]) == (1, 1, 1)


def test_statistics_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    assert t_within(1.7, 12.3) == pytest.approx(1 - 2 * stats.t.sf(1.7, 12.3))
    assert mcnemar(13, 29) == pytest.approx(stats.binomtest(13, 42).pvalue)
    differences = [0.1, -0.2, 0.4, 0.4, 0.0, 0.3]
    assert paired_t(differences)[1] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
