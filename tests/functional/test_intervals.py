"""Intervals of a mean over problems: Wilson's by hand, the bootstrap's against the normal one, and their coverage."""

import math

import pytest
import torch

from apportion.functional import mean_intervals


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_right_or_wrong_gives_wilsons_interval(right, of, low, high):
    """8 of 10: (0.8 + 3.8415/20 -+ 1.96 sqrt(0.016 + 3.8415/400)) / 1.38415 = (0.9921 -+ 0.3136) / 1.38415."""
    values = torch.tensor([[1.0]] * right + [[0.0]] * (of - right))
    assert mean_intervals(values)[0].tolist() == pytest.approx([low, high], abs=1e-4)


def test_graded_numbers_give_the_bootstraps():
    """400 problems at 0.25 or 0.75: standard error 0.25 / sqrt(400) = 0.0125, so 0.5 -+ 0.0245."""
    values = torch.tensor([0.25, 0.75]).repeat(200)[:, None]
    assert mean_intervals(values)[0].tolist() == pytest.approx([0.4755, 0.5245], abs=1e-3)


def test_columns_do_not_meet():
    values = torch.stack([torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.5, 0.0, 0.25, 1.0])], 1)
    together = mean_intervals(values)
    for i in range(2):
        assert together[i].tolist() == mean_intervals(values[:, i : i + 1])[0].tolist()


def test_it_says_the_same_every_time_and_orders_do_not_matter_much():
    values = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean_intervals(values), mean_intervals(values))
    assert torch.allclose(mean_intervals(values), mean_intervals(values.flip(0)), atol=0.01)


def test_equal_values_and_no_problems():
    assert mean_intervals(torch.full((5, 1), 0.5)).tolist() == [[0.5, 0.5]]
    assert mean_intervals(torch.zeros(0, 2)).isnan().all()
    assert mean_intervals(torch.zeros(0, 2)).shape == (2, 2)


def test_it_covers_the_truth_about_as_often_as_it_says():
    """60 problems of chance 0.1, 400 times: the truth lies inside in 95 % of them, give or take 3 %."""
    drawn = (torch.rand(60, 400, generator=torch.Generator().manual_seed(1)) < 0.1).double()
    low, high = mean_intervals(drawn).unbind(1)
    assert math.isclose(((low <= 0.1) & (high >= 0.1)).double().mean().item(), 0.95, abs_tol=0.03)
