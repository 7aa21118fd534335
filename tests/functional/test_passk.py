"""pass@k and majority@k against a walk over every draw, and against numbers worked by hand."""

import math
from collections import Counter
from itertools import combinations
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.functional import majority_at_k, pass_at_k

NAN = math.nan
RESPONSES = st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.5, NAN]), st.integers(-1, 2)), min_size=0, max_size=7)


def vote(drawn):
    """The outcome of the most frequent answer; equal counts share it, an answer is worth the mean of its responses."""
    votes = Counter(answer for _, answer, _ in drawn if answer >= 0)
    if not votes:
        return fmean(worth for _, _, worth in drawn)
    worth = {answer: w for _, answer, w in drawn}
    return fmean(worth[a] for a, count in votes.items() if count == max(votes.values()))


def over_draws(responses, k, score):
    """The mean of `score` over every draw of k of the measured responses (outcome, answer, worth of the answer)."""
    measured = [(x, a) for x, a in responses if not math.isnan(x)]
    worth = {a: fmean(x for x, b in measured if b == a) for _, a in measured}
    draws = [score([(x, a, worth[a]) for x, a in drawn]) for drawn in combinations(measured, k)]
    return fmean(draws) if draws else NAN


def padded(rows):
    """Outcomes and answers of ragged rows; what is missing is not measured."""
    n = max((len(row) for row in rows), default=0)
    rows = [[*row, *[(NAN, 9)] * (n - len(row))] for row in rows]
    pairs = torch.tensor(rows, dtype=torch.float64).view(len(rows), n, 2)
    return pairs[..., 0], pairs[..., 1].long()


@given(rows=st.lists(RESPONSES, min_size=1, max_size=3), k=st.integers(1, 5))
def test_both_are_the_mean_over_every_draw(rows, k):
    outcomes, answers = padded(rows)
    best = [over_draws(row, k, lambda drawn: max(x for x, _, _ in drawn)) for row in rows]
    voted = [over_draws(row, k, vote) for row in rows]
    assert pass_at_k(outcomes, k).tolist() == pytest.approx(best, nan_ok=True)
    assert majority_at_k(outcomes, answers, k).tolist() == pytest.approx(voted, nan_ok=True)


def test_pass_at_k_by_the_binomials_of_the_paper():
    """n = 200: 1 - C(n-c, k) / C(n, k) in exact integers."""
    n = 200
    for k in (1, 10, 100, 200):
        for c in (0, 1, 3, 100, 199, 200):
            exact = 1 - math.comb(n - c, k) / math.comb(n, k)
            outcomes = torch.tensor([[1.0] * c + [0.0] * (n - c)])
            assert pass_at_k(outcomes, k).item() == pytest.approx(exact, rel=1e-12, abs=0)


def test_a_biased_estimate_would_be_lower():
    """c = 2 of n = 4: 1 - C(2,2)/C(4,2) = 5/6, while 1 - (1 - c/n)^2 = 3/4."""
    assert pass_at_k(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), 2).item() == pytest.approx(5 / 6)


def test_majority_by_hand():
    """Answers a, a, a, b, b (a is right), k = 3: a wins unless both b's are drawn, in 3 of 10 draws: 0.7.

    k = 4: leaving out an a ties 2:2 (3 of 5 draws, 1/2 each), leaving out a b is won: (3/2 + 2) / 5 = 0.7. k = 5: 1.
    """
    outcomes, answers = torch.tensor([[1.0, 1, 1, 0, 0]]), torch.tensor([[4, 4, 4, 7, 7]])
    assert [majority_at_k(outcomes, answers, k).item() for k in (1, 2, 3, 4, 5)] == pytest.approx(
        [0.6, 0.6, 0.7, 0.7, 1.0]
    )


def test_a_majority_may_be_worse_than_one_response():
    """1 of 3 right, and the two wrong ones agree: 0 of 3 votes together, 1/3 alone."""
    outcomes, answers = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0, 1, 1]])
    assert majority_at_k(outcomes, answers, 3).item() == 0.0
    assert pass_at_k(outcomes, 3).item() == 1.0


def test_responses_without_an_answer_do_not_vote():
    """Right, right, none, none, none: the two votes carry every draw that holds one, and C(3,3) = 1 of 10 draws holds none."""
    outcomes, answers = torch.tensor([[1.0, 1, 0, 0, 0]]), torch.tensor([[0, 0, -1, -1, -1]])
    assert majority_at_k(outcomes, answers, 3).item() == pytest.approx(0.9)
    assert majority_at_k(outcomes, answers, 5).item() == 1.0


def test_many_responses_stay_exact():
    """64 responses in 32 pairs of equal answers, one pair right: by symmetry each pair wins in 1 draw of 32."""
    outcomes, answers = torch.zeros(1, 64), torch.arange(64)[None] // 2
    outcomes[0, :2] = 1.0
    for k in (2, 16, 64):
        assert majority_at_k(outcomes, answers, k).item() == pytest.approx(1 / 32, rel=1e-12)


def test_nothing_and_too_little():
    none = torch.zeros(0, 4)
    assert pass_at_k(none, 2).shape == majority_at_k(none, none.long(), 2).shape == (0,)
    few, answers = torch.tensor([[1.0, NAN, NAN]]), torch.zeros(1, 3, dtype=torch.int64)
    assert math.isnan(pass_at_k(few, 2).item())
    assert math.isnan(majority_at_k(few, answers, 2).item())
    assert pass_at_k(few, 1).item() == majority_at_k(few, answers, 1).item() == 1.0


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_at_least_one(k):
    with pytest.raises(ValueError, match=f"k of at least 1; got {k}"):
        pass_at_k(torch.zeros(1, 2), k)
    with pytest.raises(ValueError, match=f"k of at least 1; got {k}"):
        majority_at_k(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), k)


def test_numbers_that_no_float_holds_are_refused():
    wide = torch.zeros(1, 1100)
    with pytest.raises(ValueError, match=r"got n = 1100, k = 550. Use fewer responses"):
        majority_at_k(wide, wide.long(), 550)
