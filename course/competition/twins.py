"""Submissions that look like one: equal adapters, or the same wrong answers far more often than others share them."""

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import torch

from course.competition.submission import Submission

EQUAL = 0.99  # cosine of the updates B A
HALF = 0.5  # share of wrong answers that are the same, below which no pair is named: a common base makes some equal
LEVEL = 0.01  # chance of naming any pair of a class in which answers are shared at the base rate


def cosine(first: Submission, second: Submission) -> float:
    """Cosine of the two updates B A of the weights; 0 for different bases or layers. A scaled copy has 1."""
    if first.recipe.base != second.recipe.base or first.lora.target_modules != second.lora.target_modules:
        return 0.0
    norms = _product(first, first) * _product(second, second)
    return _product(first, second) / norms**0.5 if norms > 0 else float(norms == 0)


def _product(first: Submission, second: Submission) -> float:
    """Sum over layers of <B1 A1, B2 A2> = sum((B1' B2) * (A1 A2')), without making the large matrices."""
    total = 0.0
    for name in first.adapter:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            a1, a2 = first.adapter[name].double(), second.adapter[name].double()  # (rank, inputs)
            b1, b2 = first.adapter[other].double(), second.adapter[other].double()  # (outputs, rank)
            total += float(torch.sum((b1.T @ b2) * (a1 @ a2.T)))
    return total


def shared_wrong_answers(
    answers: Sequence[Sequence[str]], grades: np.ndarray
) -> dict[tuple[int, int], tuple[int, int]]:
    """For each pair of rows: on how many tasks both are below 5, and on how many of these they say the same."""
    codes = np.zeros(grades.shape, dtype=int)  # (submissions, tasks): equal texts have equal numbers
    for task, texts in enumerate(zip(*answers, strict=True)):
        codes[:, task] = np.unique(texts, return_inverse=True)[1]
    wrong = grades < 5
    found = {}
    for i, j in combinations(range(len(grades)), 2):
        both = wrong[i] & wrong[j]
        found[i, j] = int(both.sum()), int((both & (codes[i] == codes[j])).sum())
    return found


def binomial_tail(least: int, n: int, share: float) -> float:
    """Chance of at least so many hits among n."""
    return sum(comb(n, hits) * share**hits * (1 - share) ** (n - hits) for hits in range(least, n + 1))


def twins(submissions: Sequence[Submission], answers: Sequence[Sequence[str]], grades: np.ndarray) -> list[tuple]:
    """Pairs (row, row, reason) for a person to look at.

    Adapters of one recipe share many wrong answers. So the base rate is what nine of ten pairs of the class stay below.
    """
    shared = shared_wrong_answers(answers, grades)
    rates = [same / both for both, same in shared.values() if both]
    base_rate = min(float(np.quantile(rates, 0.9)), 1 - 1e-9) if rates else 0.0
    found = []
    for (i, j), (both, same) in shared.items():
        similarity = cosine(submissions[i], submissions[j])
        if similarity > EQUAL:
            found.append((i, j, f"equal adapters (cosine {similarity:.3f})"))
        elif same > HALF * both and binomial_tail(same, both, base_rate) < LEVEL / len(shared):
            found.append((i, j, f"{same} of {both} wrong answers are the same; most pairs share {base_rate:.0%}"))
    return found
