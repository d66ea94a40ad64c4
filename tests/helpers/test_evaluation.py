import math
from fractions import Fraction
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.errors import CourseError
from helpers.evaluation import (
    Score,
    bits_per_byte,
    bootstrap_interval,
    exact_match,
    pass_at_k,
    perplexity,
    score,
    wilson_interval,
    win_rate,
)

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_printed_in_newcombe_1998_table_1(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(counts, st.floats(0.5, 0.999))
def test_the_ends_of_wilson_solve_the_score_equation(count, confidence):
    successes, n = count
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for end in wilson_interval(successes, n, confidence):
        assert (successes / n - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, abs=1e-12)


@given(counts)
def test_wilson_contains_the_share_stays_in_bounds_and_mirrors(count):
    successes, n = count
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and low < high
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))
    assert (low == 0) == (successes == 0) and (high == 1) == (successes == n)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    truth, n, trials = 0.85, 60, 4000
    draws = np.random.default_rng(0).binomial(n, truth, size=trials)
    covered = np.mean([low <= truth <= high for low, high in (wilson_interval(int(c), n) for c in draws)])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("arguments", [(1, 0), (3, 2), (-1, 5), (1, 2, 1.0), (1, 2, 0.0)])
def test_an_interval_that_does_not_exist_is_refused(arguments):
    with pytest.raises(CourseError, match="does not exist"):
        wilson_interval(*arguments)


def test_a_score_reads_as_in_the_lessons():
    assert str(score(188, 200)) == "94 % (90 to 97, n = 200)"
    assert str(Score(1.0, 0.98, 1.0, 200)) == "100 % (98 to 100, n = 200)"


def test_the_bootstrap_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=2)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)
    assert (low, high) == bootstrap_interval(values, seed=2) != bootstrap_interval(values, seed=3)


def test_the_bootstrap_resamples_whole_rows_with_any_statistic():
    pairs = np.array([[x, 2 * x + 1] for x in range(30)])
    assert bootstrap_interval(pairs, lambda rows: np.polyfit(rows[:, 0], rows[:, 1], 1)[0]) == pytest.approx((2, 2))
    assert bootstrap_interval([5.0, 5.0], np.median) == (5.0, 5.0)
    with pytest.raises(CourseError, match="at least one value"):
        bootstrap_interval([])


def test_a_wider_confidence_gives_a_wider_bootstrap_interval():
    values = list(range(50))
    inner, outer = (bootstrap_interval(values, confidence=confidence) for confidence in (0.5, 0.99))
    assert outer[0] < inner[0] < np.mean(values) < inner[1] < outer[1]


def test_exact_match_ignores_only_the_white_space_around():
    result = exact_match([" Oro", "oro", "Oro\n", "Oro Sund"], ["Oro"] * 4)
    assert (result.accuracy, result.n) == (0.5, 4)


@pytest.mark.parametrize("function", [exact_match, win_rate])
def test_lists_of_different_length_or_none_are_refused(function):
    for first, second in ([["a"], []], [[], []]):
        with pytest.raises(CourseError, match="give one of each"):
            function(first, second)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_correct_sample(case):
    n, c, k = case
    subsets = list(combinations(range(n), k))
    expected = Fraction(sum(min(subset) < c for subset in subsets), len(subsets))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected))


def test_pass_at_k_is_exact_where_binomials_overflow_a_float():
    n, c, k = 5000, 3, 2000
    expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), rel=1e-12)
    assert pass_at_k(200, 13, 1) == pytest.approx(13 / 200)


@pytest.mark.parametrize("case", [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)])
def test_pass_at_k_refuses_impossible_counts(case):
    with pytest.raises(CourseError, match="pass_at_k got"):
        pass_at_k(*case)


def test_ties_are_half_a_win_and_the_two_sides_add_up_to_one():
    a, b = [1, 2, 3, 4, 0.5], [1, 1, 3, 5, 0]
    assert win_rate(a, b).accuracy == pytest.approx((2 + 0.5 * 2) / 5)
    assert win_rate(a, b).accuracy + win_rate(b, a).accuracy == pytest.approx(1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_perplexity_weighs_tokens_not_batches(model):
    torch.manual_seed(1)
    short, long = torch.randint(0, 50, (1, 4)), torch.randint(0, 50, (3, 20))
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for ids in (short, long)]
    expected = math.exp((losses[0] * 3 + losses[1] * 57) / 60)
    assert perplexity(model, [{"input_ids": short}, {"input_ids": long}]) == pytest.approx(expected, rel=1e-5)


def test_perplexity_counts_neither_padding_nor_masked_labels(model):
    torch.manual_seed(2)
    ids = torch.randint(0, 50, (1, 10))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = (torch.arange(15) < 10).long()[None]
    plain = perplexity(model, [{"input_ids": ids}])
    assert perplexity(model, [{"input_ids": padded, "attention_mask": mask}]) == pytest.approx(plain, rel=1e-5)
    labels = padded.masked_fill(mask == 0, -100)
    assert perplexity(model, [{"input_ids": padded, "labels": labels}]) == pytest.approx(plain, rel=1e-5)
    with pytest.raises(CourseError, match="at least one token"):
        perplexity(model, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary_and_its_bits(model):
    uniform = AutoModelForCausalLM.from_config(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    value = perplexity(uniform, [{"input_ids": torch.arange(40)[None]}])
    assert value == pytest.approx(50, rel=1e-5)
    assert bits_per_byte(value, num_tokens=10, num_bytes=40) == pytest.approx(math.log2(50) / 4)
