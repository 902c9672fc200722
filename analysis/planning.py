"""How many runs a study needs, what a study can find, and how to divide a budget between seeds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from analysis.resample import Estimate

ALPHA = 0.05
POWER = 0.8
"""Probability with which a study should find the difference called its minimum detectable one."""

_MOST_RUNS = 1_000_000
_MOST_SIMULATED = 2_000


@dataclass(frozen=True)
class Plan:
    """Runs that find an effect with at least the wanted power."""

    runs: int
    """Per arm where there are arms."""

    effect: float
    """Smallest true effect to be found: a difference in standard deviations, or a correlation."""

    power: float
    """Of this many runs."""

    alpha: float
    method: str


@dataclass(frozen=True)
class Split:
    """A division of a budget between search runs and retrainings of each, and the precision it buys."""

    searches: int
    retrainings: int
    """Of each search's architecture."""

    standard_error: float
    """Of the mean over searches, in the unit of the standard deviations given."""

    cost: float
    """Of the whole, in the unit of the budget."""

    best_retrainings: float
    """The number of retrainings that would be best if it could be any positive number."""

    detectable: float | None
    """Difference between two arms of this design that is found with the power; None for one search."""

    method: str


def power_of_t(shift: float, df: float, alpha: float = ALPHA) -> float:
    """Probability that a two-sided t test at `alpha` is significant, in either direction.

    Args:
        shift: true difference in standard errors.
        df: degrees of freedom.
        alpha: level of the test.
    """
    critical = float(stats.t.ppf(1 - alpha / 2, df))
    # Far from 0, a significant result in the wrong direction is rarer than rounding, and nct fails.
    wrong = float(stats.nct.cdf(-critical, df, abs(shift))) if abs(shift) < 5 else 0.0
    return float(stats.nct.sf(critical, df, abs(shift))) + wrong


def detectable_shift(df: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """True difference, in standard errors, that a two-sided t test at `alpha` finds with `power`."""
    _check_share(alpha, "alpha", "0.05")
    _check_share(power, "power", "0.8")
    if power <= alpha:
        raise ValueError(f"power={power} is at most alpha={alpha}, which needs no difference; ask for more")
    critical = float(stats.t.ppf(1 - alpha / 2, df))
    upper = 4 * critical + 4 + float(special.ndtri(power)) ** 2
    return float(optimize.brentq(lambda shift: power_of_t(shift, df, alpha) - power, 0.0, upper))


def detectable_difference(
    n_a: int, n_b: int, sd: float = 1.0, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Smallest true difference in mean of two arms that runs of this number and spread find with `power`.

    Raises:
        ValueError: an arm has no run, both have one only, or the spread is not positive.
    """
    if min(n_a, n_b) < 1 or n_a + n_b < 3:
        raise ValueError(
            f"n_a={n_a}, n_b={n_b} leave no degree of freedom for the spread; use at least 2 runs in an arm"
        )
    _check_positive(sd, "sd")
    return sd * math.sqrt(1 / n_a + 1 / n_b) * detectable_shift(n_a + n_b - 2, alpha, power)


def runs_for_difference(
    difference: float, sd: float = 1.0, alpha: float = ALPHA, power: float = POWER
) -> Plan:
    """Fewest runs per arm, in two equal arms, with which a t test finds a difference in mean.

    Raises:
        ValueError: the difference is 0, the spread is not positive, or alpha and power are not shares.
    """
    _check_positive(sd, "sd")
    _check_share(alpha, "alpha", "0.05")
    _check_share(power, "power", "0.8")
    effect = abs(difference) / sd
    _check_positive(effect, "difference")

    def reached(n: int) -> float:
        return power_of_t(effect * math.sqrt(n / 2), 2 * n - 2, alpha)

    runs = _fewest(reached, power, 2)
    return Plan(runs, effect, reached(runs), alpha, "two-sample t test, noncentral t")


def runs_for_paired_difference(
    difference: float, sd: float = 1.0, alpha: float = ALPHA, power: float = POWER
) -> Plan:
    """Fewest pairs with which a paired t test finds a mean difference; `sd` is that of the differences."""
    _check_positive(sd, "sd")
    _check_share(alpha, "alpha", "0.05")
    _check_share(power, "power", "0.8")
    effect = abs(difference) / sd
    _check_positive(effect, "difference")

    def reached(n: int) -> float:
        return power_of_t(effect * math.sqrt(n), n - 1, alpha)

    runs = _fewest(reached, power, 2)
    return Plan(runs, effect, reached(runs), alpha, "paired t test, noncentral t")


def runs_for_mann_whitney(
    difference: float, sd: float = 1.0, alpha: float = ALPHA, power: float = POWER
) -> Plan:
    """Fewest runs per arm with which the Mann-Whitney test finds a difference of normal arms, simulated.

    Raises:
        ValueError: as in `runs_for_difference`, or more runs are needed than can be simulated.
    """
    # Of normal arms the t test finds the most, so its number is where to begin.
    least = runs_for_difference(difference, sd, alpha, power).runs
    effect = abs(difference) / sd

    def simulated(n: int) -> Estimate:
        return power_of_mann_whitney(n, n, effect, alpha=alpha)

    return _simulated(simulated, least, effect, alpha, power)


def runs_for_tau(tau: float, alpha: float = ALPHA, power: float = POWER) -> Plan:
    """Fewest runs with which Kendall's test tells a true tau of bivariate normal runs from 0, simulated.

    Raises:
        ValueError: tau is not between 0 and 1 in size, alpha and power are not shares, or more runs are
            needed than can be simulated.

    Source: Fieller, Hartley & Pearson (1957), variance 0.437 / (n - 4) of atanh(tau): where to begin.
    """
    _check_share(alpha, "alpha", "0.05")
    _check_share(power, "power", "0.8")
    if not 0 < abs(tau) < 1:
        raise ValueError(f"tau={tau} must lie between 0 and 1 or between -1 and 0, the ends left out")

    def simulated(n: int) -> Estimate:
        return power_of_tau(n, tau, alpha=alpha)

    wanted = float(special.ndtri(1 - alpha / 2) + special.ndtri(power)) ** 2
    near = 0.437 * wanted / math.atanh(tau) ** 2 + 4
    return _simulated(simulated, max(4, int(0.75 * near)), abs(tau), alpha, power)


def _simulated(
    simulated: Callable[[int], Estimate], least: int, effect: float, alpha: float, power: float
) -> Plan:
    if least > _MOST_SIMULATED:
        raise ValueError(
            f"about {least:,} runs are needed, more than the {_MOST_SIMULATED:,} that are simulated; at such "
            "numbers the formulas hold: leave the simulation out"
        )

    def reached(n: int) -> float:
        return float(simulated(n).value or 0.0)

    runs = _fewest(reached, power, least)
    found = simulated(runs)
    method = f"{found.method} of the power [{found.low:.3f}, {found.high:.3f}]"
    return Plan(runs, effect, float(found.value or 0.0), alpha, method)


def runs_for_correlation(rho: float, alpha: float = ALPHA, power: float = POWER) -> Plan:
    """Fewest runs with which a rank correlation of `rho` is told from 0.

    Source: Bonett & Wright (2000), n = (z_alpha + z_beta)^2 (1 + rho^2 / 2) / atanh(rho)^2 + 3.
    """
    _check_share(alpha, "alpha", "0.05")
    _check_share(power, "power", "0.8")
    if not 0 < abs(rho) < 1:
        raise ValueError(f"rho={rho} must lie between 0 and 1 or between -1 and 0, the ends left out")
    wanted = float(special.ndtri(1 - alpha / 2) + special.ndtri(power)) ** 2
    runs = math.ceil(wanted * (1 + rho**2 / 2) / math.atanh(rho) ** 2 + 3 - 1e-9)
    runs = max(runs, 4)
    error = math.sqrt((1 + rho**2 / 2) / (runs - 3))
    reached = float(special.ndtr(abs(math.atanh(rho)) / error - special.ndtri(1 - alpha / 2)))
    return Plan(
        runs, abs(rho), reached, alpha, "Spearman's rho, Fisher z with the error of Bonett and Wright"
    )


def detectable_correlation(n: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Smallest rank correlation that `n` runs tell from 0 with `power`: `runs_for_correlation` inverted.

    Raises:
        ValueError: n < 4, where the standard error is not defined.
    """
    if n < 4:
        raise ValueError(f"n={n} runs say nothing about a correlation; use at least 4")
    wanted = float(special.ndtri(1 - alpha / 2) + special.ndtri(power))

    def shortfall(rho: float) -> float:
        return math.atanh(rho) * math.sqrt((n - 3) / (1 + rho**2 / 2)) - wanted

    return float(optimize.brentq(shortfall, 1e-9, 1 - 1e-12))


def power_of_mann_whitney(
    n_a: int,
    n_b: int,
    effect: float,
    *,
    alpha: float = ALPHA,
    simulations: int = 2_000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Power of the two-sided Mann-Whitney test for normal arms `effect` deviations apart, simulated."""
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((simulations, n_a)) + effect
    b = draw.standard_normal((simulations, n_b))
    p = stats.mannwhitneyu(a, b, axis=1, method="exact" if max(n_a, n_b) <= 8 else "asymptotic").pvalue
    return _share(p < alpha, f"Mann-Whitney, n = {n_a} and {n_b}, normal arms", level)


def power_of_tau(
    n: int,
    tau: float,
    *,
    alpha: float = ALPHA,
    simulations: int = 2_000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Power of Kendall's two-sided test for a bivariate normal sample whose true tau is `tau`, simulated.

    Source: tau = 2 / pi arcsin(rho) for the bivariate normal distribution.
    """
    if not -1 < tau < 1:
        raise ValueError(f"tau={tau} must lie between -1 and 1")
    if n < 2:
        raise ValueError(f"n={n} runs have no pair; use at least 2")
    rho = math.sin(math.pi * tau / 2)
    draw = np.random.default_rng(seed)
    x, noise = draw.standard_normal((2, simulations, n))
    y = rho * x + math.sqrt(1 - rho**2) * noise
    p = [float(stats.kendalltau(first, second).pvalue) for first, second in zip(x, y, strict=True)]
    return _share(np.asarray(p) < alpha, f"Kendall's tau, n = {n}, bivariate normal", level)


def best_split(
    sd_search: float,
    sd_retrain: float,
    cost_search: float,
    cost_retrain: float,
    budget: float,
    alpha: float = ALPHA,
    power: float = POWER,
) -> Split:
    """Numbers of search seeds and retraining seeds that estimate the mean of a method most precisely.

    The variance sd_search^2 / a + sd_retrain^2 / (a b) is least, among all whole numbers of a searches with b
    retrainings each that cost at most the budget; without rounding
    b = sqrt(sd_retrain^2 cost_search / (sd_search^2 cost_retrain)), whatever the budget.

    Raises:
        ValueError: a spread is negative or both are 0, a cost is not positive, or the budget buys no search
            with one retraining.
    """
    for name, value in {"cost_search": cost_search, "cost_retrain": cost_retrain, "budget": budget}.items():
        _check_positive(value, name)
    if min(sd_search, sd_retrain) < 0 or max(sd_search, sd_retrain) == 0:
        raise ValueError(
            f"sd_search={sd_search}, sd_retrain={sd_retrain}: give spreads of a pilot, one above 0"
        )
    if budget < cost_search + cost_retrain:
        raise ValueError(
            f"budget={budget} buys no search with one retraining, which cost {cost_search + cost_retrain}"
        )
    # Relative to the budget, one part in 1e9 forgives the rounding of costs that divide it exactly.
    room = budget * (1 + 1e-9)
    designs = []
    for searches in range(1, min(int(room / (cost_search + cost_retrain)), _MOST_RUNS) + 1):
        retrainings = int((room / searches - cost_search) / cost_retrain)
        variance = sd_search**2 / searches + sd_retrain**2 / (searches * retrainings)
        designs.append((variance, searches, retrainings))
    variance, searches, retrainings = min(designs)
    best = math.inf if sd_search == 0 else math.sqrt(sd_retrain**2 * cost_search / cost_retrain) / sd_search
    found = None
    if searches > 1:
        found = math.sqrt(2 * variance) * detectable_shift(2 * searches - 2, alpha, power)
    return Split(
        searches,
        retrainings,
        math.sqrt(variance),
        searches * (cost_search + retrainings * cost_retrain),
        best,
        found,
        f"all whole designs within the budget; detectable at p < {alpha} with power {power}, two equal arms",
    )


def _fewest(reached: Callable[[int], float], power: float, least: int) -> int:
    """Smallest number at which a rising power is reached."""
    high = least
    while reached(high) < power:
        high *= 2
        if high > _MOST_RUNS:
            raise ValueError(
                f"more than {_MOST_RUNS:,} runs are needed; the effect is too small to be studied"
            )
    low = max(least, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= power else (middle + 1, high)
    return low


def _share(hits: NDArray[np.bool_], method: str, level: float) -> Estimate:
    """Share of simulations, with Wilson's interval."""
    n, value = len(hits), float(hits.mean())
    interval = stats.binomtest(int(hits.sum()), n).proportion_ci(level, method="wilson")
    low, high = min(float(interval.low), value), max(float(interval.high), value)
    return Estimate(value, low, high, n, n, f"{method}; {n} simulations, Wilson interval", level)


def _check_positive(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be positive and finite")


def _check_share(value: float, name: str, example: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} is not between 0 and 1; use {example}")
