"""How sure a rank is: tasks are drawn anew within each kind, the same for all submissions (paired bootstrap)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


def resampled_means(grades: np.ndarray, kinds: Sequence[str], resamples: int = RESAMPLES) -> np.ndarray:
    """Mean grades (resamples, submissions) of `grades` (submissions, tasks), each kind with as many tasks as it has."""
    generator = np.random.default_rng(0)  # the same table for everybody
    kinds = np.array(kinds)
    sums = np.zeros((resamples, len(grades)))
    for kind in sorted(set(kinds)):
        of_kind = grades[:, kinds == kind]  # (submissions, tasks of the kind)
        count = of_kind.shape[1]
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)  # (resamples, tasks)
        sums += drawn @ of_kind.T
    return sums / grades.shape[1]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Standing:
    """Where a submission stands."""

    place: int  # 1 is the best; equal means share a place
    mean: float
    low: float
    high: float
    best_rank: int  # with 95 % of the resamples between best and worst
    worst_rank: int
    group: int  # submissions of a group cannot be told apart from its first


def standings(grades: np.ndarray, kinds: Sequence[str]) -> list[Standing]:
    """The standing of each row of `grades` (submissions, tasks), in the rows' order.

    A group begins with the best submission that is in none yet, and takes in those whose difference to it has an
    interval that reaches 0.
    """
    means, drawn = grades.mean(1), resampled_means(grades, kinds)
    ranks = (drawn[:, None, :] > drawn[:, :, None]).sum(-1) + 1  # (resamples, submissions)
    places = (means[None, :] > means[:, None]).sum(-1) + 1
    groups = np.zeros(len(grades), dtype=int)
    for first in np.argsort(-means, kind="stable"):
        if not groups[first]:
            number = groups.max() + 1
            for other in np.flatnonzero(groups == 0):
                if other == first or interval(drawn[:, first] - drawn[:, other])[0] <= 0:
                    groups[other] = number
    result = []
    for row, mean in enumerate(means):
        low, high = interval(drawn[:, row])
        best, worst = np.quantile(ranks[:, row], [0.025, 0.975], method="nearest")
        result.append(Standing(int(places[row]), float(mean), low, high, int(best), int(worst), int(groups[row])))
    return result
