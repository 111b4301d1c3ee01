"""What N held-back patients can tell: how wide intervals are, and how often they hold the truth.

Paired differences of Dice are drawn from a normal and from a skewed distribution of the given
standard deviation; the interval is the one of `fedseg-site validate`. The table stands in
docs/validation.md.

    python benchmarks/few_patients.py [--deviation 0.02] [--trials 1000]
"""

from __future__ import annotations

import argparse

import numpy as np

from fedseg.evaluation.comparisons import MARGIN
from fedseg.evaluation.estimates import estimate
from fedseg.evaluation.statistics import mean_with_interval

PATIENTS = (6, 8, 10, 15, 20, 30, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deviation", type=float, default=0.02, help="of paired differences")
    parser.add_argument("--trials", type=int, default=1000)
    arguments = parser.parse_args()
    print(
        "| N | half width, points | covers | covers, skewed | covers, plain BCa | "
        "equal models shown not worse | failures possible after none |"
    )
    print("|---|---|---|---|---|---|---|")
    for n in PATIENTS:
        print(row(n, arguments.deviation, arguments.trials))


def row(n: int, deviation: float, trials: int) -> str:
    """One line of the table."""
    rng = np.random.default_rng(n)
    normal, skewed = rng.normal(0, 1, (trials, n)), 1 - rng.exponential(1, (trials, n))
    width, covers, equal, plain = _measured(deviation * normal)
    _, covers_skewed, _, _ = _measured(deviation * skewed)  # a long tail of losses
    none_failed = 1 - 0.025 ** (1 / n)
    return (
        f"| {n} | {100 * width:.2f} | {covers:.0%} | {covers_skewed:.0%} | {plain:.0%} | "
        f"{equal:.0%} | {none_failed:.0%} |"
    )


def _measured(drawn: np.ndarray) -> tuple[float, float, float, float]:
    """Mean half width, coverage, how often equal models are "not worse", coverage of plain BCa."""
    widths, covered, not_worse, plain = [], 0, 0, 0
    for values in drawn.tolist():
        found = estimate(values)
        assert found.low is not None and found.high is not None
        widths.append((found.high - found.low) / 2)
        covered += found.low <= 0 <= found.high
        not_worse += found.low > -MARGIN
        _, low, high = mean_with_interval(values)
        assert low is not None and high is not None
        plain += low <= 0 <= high
    trials = len(drawn)
    return float(np.mean(widths)), covered / trials, not_worse / trials, plain / trials


if __name__ == "__main__":
    main()
