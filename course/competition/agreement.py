"""How far graders agree: weighted kappa of two, Krippendorff's alpha of several.

Sources: Cohen 1968, "Weighted kappa"; Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability" (interval).
"""

import math
from collections.abc import Sequence

import numpy as np


def weighted_kappa(first: Sequence[float], second: Sequence[float]) -> float:
    """Agreement of two graders on the same items with quadratic weights; 1 is perfect, 0 that of chance."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    by_chance = np.mean((a[:, None] - b[None, :]) ** 2)
    return float(1 - np.mean((a - b) ** 2) / by_chance) if by_chance else math.nan


def krippendorff_alpha(grades: np.ndarray) -> float:
    """Agreement of graders (graders, items) whose grades are numbers; NaN where one gave none."""
    items = [column[~np.isnan(column)] for column in grades.T]
    items = [values for values in items if len(values) > 1]
    if not items:
        return math.nan
    pooled = np.concatenate(items)
    within = sum(((v[:, None] - v[None, :]) ** 2).sum() / (len(v) - 1) for v in items) / len(pooled)
    by_chance = ((pooled[:, None] - pooled[None, :]) ** 2).sum() / (len(pooled) * (len(pooled) - 1))
    return float(1 - within / by_chance) if by_chance else math.nan
