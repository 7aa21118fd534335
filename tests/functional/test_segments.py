import torch

from apportion.functional import (
    at_members,
    segment_any,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_sum,
)

IDS = torch.tensor([2, 0, -1, 2])
X = torch.tensor([1.0, 5.0, 100.0, 4.0])


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_members_without_segment_stay_out_and_empty_segments_are_empty():
    close(segment_sum(X, IDS, 3), [5.0, 0.0, 5.0])
    close(segment_count(IDS, 3), [1.0, 0.0, 2.0])
    close(segment_mean(X, IDS, 3), [5.0, 0.0, 2.5])
    close(segment_min(X, IDS, 3), [5.0, torch.inf, 1.0])
    close(segment_max(X, IDS, 3), [5.0, -torch.inf, 4.0])
    assert segment_any(X > 4, IDS, 3).tolist() == [True, False, False]
    assert at_members(torch.tensor([7.0, 8.0, 9.0]), IDS).tolist() == [9.0, 7.0, 0.0, 9.0]


def test_nothing_at_all():
    none = torch.zeros(0, dtype=torch.int64)
    assert segment_sum(torch.zeros(0), none, 0).shape == (0,)
    assert segment_min(torch.zeros(0), none, 0).shape == (0,)
    assert segment_sum(torch.zeros(0), none, 2).tolist() == [0.0, 0.0]
    assert at_members(torch.zeros(0), torch.tensor([-1])).tolist() == [0.0]


def test_a_nan_outside_every_segment_does_not_leak():
    assert segment_sum(torch.tensor([1.0, torch.nan]), torch.tensor([0, -1]), 1).tolist() == [1.0]


def test_sums_are_not_differences_of_a_running_sum():
    """A small segment after a huge one: a float32 running sum of 2^25 would swallow the 1."""
    x = torch.tensor([2.0**25, 1.0])
    assert segment_sum(x, torch.tensor([0, 1]), 2).tolist() == [2.0**25, 1.0]
