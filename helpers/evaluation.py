"""Measures with their uncertainty: shares with intervals, exact match, pass@k, win rate, perplexity.

It judges texts and losses that others made: it knows nothing about prompts or decoding. Sources: Wilson 1927,
"Probable Inference, the Law of Succession, and Statistical Inference"; Efron and Tibshirani 1993, "An Introduction
to the Bootstrap", chapter 13 (percentile interval); Chen et al. 2021, "Evaluating Large Language Models Trained on
Code", equation 1.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from helpers.errors import CourseError
from helpers.generation import token_log_probs


@dataclass(frozen=True)
class Score:
    """A share of `n` items, between 0 and 1, with the ends of its confidence interval."""

    accuracy: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Return for example "94 % (89 to 97, n = 200)"."""
        return f"{self.accuracy:.0%} ({100 * self.low:.0f} to {100 * self.high:.0f}, n = {self.n})".replace("%", " %")


def score(successes: float, n: int, confidence: float = 0.95) -> Score:
    """Return `successes` of `n` as a `Score` with its Wilson interval."""
    low, high = wilson_interval(successes, n, confidence)
    return Score(successes / n, low, high, n)


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the ends of Wilson's score interval for a share: every p with |successes/n - p| <= z sqrt(p (1 - p) / n).

    Unlike the share plus or minus its standard error it stays in [0, 1] and has a width at 0 and at 1.
    Half successes (ties) are allowed. Raises `CourseError` unless 0 <= successes <= n, n >= 1, 0 < confidence < 1.
    """
    if not (n >= 1 and 0 <= successes <= n and 0 < confidence < 1):
        raise CourseError(
            f"An interval for {successes} of {n} at confidence {confidence} does not exist: "
            "give at least one item, no more successes than items, and a confidence between 0 and 1."
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    # the ends are exact at 0 and 1, where rounding would leave 1e-17
    return (max(0.0, center - half_width) if successes else 0.0), (
        min(1.0, center + half_width) if successes < n else 1.0
    )


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    seed: int = 0,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic` over `values` (n,) or (n, ...), resampled by rows.

    Raises `CourseError` when there are no values.
    """
    values = np.asarray(values)
    if values.ndim == 0 or len(values) == 0:
        raise CourseError("A bootstrap interval needs a list of at least one value, but got none.")
    generator = np.random.default_rng(seed)
    estimates = [statistic(values[generator.integers(len(values), size=len(values))]) for _ in range(resamples)]
    low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> Score:
    """Return the share of predictions that equal their answer, white space at both ends aside.

    Raises `CourseError` when the lists are empty or differ in length.
    """
    _check_pairs(predictions, answers, "predictions", "answers")
    matches = sum(prediction.strip() == answer.strip() for prediction, answer in zip(predictions, answers, strict=True))
    return score(matches, len(answers))


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float]) -> Score:
    """Return how often A's score is above B's on the same item; a tie counts half.

    Raises `CourseError` when the lists are empty or differ in length.
    """
    _check_pairs(scores_a, scores_b, "scores of A", "scores of B")
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(scores_a, scores_b, strict=True))
    return score(wins, len(scores_a))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased chance that one of `k` samples is correct, when `c` of `n` drawn samples were.

    Chen et al. 2021, equation 1: 1 - C(n - c, k) / C(n, k), as a product so that no large number occurs.
    Average it over the problems. Raises `CourseError` unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise CourseError(f"pass_at_k got n={n}, c={c}, k={k}: give 0 <= c <= n and 1 <= k <= n.")
    if n - c < k:
        return 1.0  # any k of the samples hold a correct one
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


@torch.no_grad()
def perplexity(model, batches: Iterable[dict[str, Tensor]]) -> float:
    """Return exp(mean loss per predicted token) over all batches, each token with the same weight.

    A batch holds `input_ids` (batch, seq) and, where needed, `attention_mask` and `labels` (batch, seq; -100 is not
    counted; not shifted, as in transformers). Dropout is as the model has it: call `model.eval()` first.
    Raises `CourseError` when there is no token to predict.
    """
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels", None)
        if labels is None:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            labels = batch["input_ids"].masked_fill(mask == 0, -100)
        logits = model(**batch, use_cache=False).logits  # (batch, seq, vocab)
        total -= token_log_probs(logits[:, :-1], labels[:, 1:]).sum().item()
        count += int((labels[:, 1:] != -100).sum())
    if count == 0:
        raise CourseError("Perplexity needs at least one token to predict, but the batches hold none.")
    return math.exp(total / count)


def bits_per_byte(perplexity: float, num_tokens: int, num_bytes: int) -> float:
    """Turn a perplexity per token into bits per byte of text, which compares models of different tokenizers."""
    return math.log2(perplexity) * num_tokens / num_bytes


def _check_pairs(first: Sequence, second: Sequence, first_name: str, second_name: str) -> None:
    if len(first) != len(second) or len(first) == 0:
        raise CourseError(
            f"There are {len(first)} {first_name} and {len(second)} {second_name}: give one of each for every item."
        )
