"""Measure how often 95% intervals of a mean over few seeds contain the true mean.

    python benchmarks/intervals.py

The intervals are Student's t and the BCa bootstrap, on normal samples. zofo/statistics/estimates.py
chooses its interval for each number of seeds by these results.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=999)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    print("seeds  t      BCa")
    for num in (3, 5, 9, 10, 20):
        samples = generator.normal(size=(arguments.trials, num))
        half = stats.t.ppf(0.975, num - 1) * stats.sem(samples, axis=1)
        by_t = np.mean(np.abs(samples.mean(axis=1)) <= half)
        covered = 0
        for sample in samples:
            found = stats.bootstrap(
                (sample,),
                np.mean,
                n_resamples=arguments.resamples,
                method="BCa",
                rng=generator,
            ).confidence_interval
            covered += found.low <= 0 <= found.high
        print(f"{num:5}  {by_t:.3f}  {covered / arguments.trials:.3f}")


if __name__ == "__main__":
    main()
