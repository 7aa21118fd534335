import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.functional import group_statistics, row_moments

ZERO = torch.zeros(16, dtype=torch.int64)


@pytest.mark.parametrize("value", [0.99, 0.1, 1 / 3, 0.7, -0.3, 1e-9, 1e9 + 0.1, 0.0])
@pytest.mark.parametrize("count", [2, 3, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_members_have_no_signal_at_all(value, count, dtype):
    s = group_statistics(torch.full((count,), value, dtype=dtype), ZERO[:count], 1)
    assert s.flat.all()
    assert (s.y == 0).all()
    assert (s.squares == 0).all()
    assert s.spread(1, 0.0, "std").isinf().all()


def test_almost_equal_is_signal():
    s = group_statistics(torch.tensor([0.5, 0.5 + 5e-7], dtype=torch.float64), ZERO[:2], 1)
    assert not s.flat.any()
    torch.testing.assert_close(s.y, torch.tensor([0.0, 5e-7], dtype=torch.float64), rtol=1e-9, atol=0)


def test_equal_up_to_rounding_is_no_signal():
    """0.1 + 0.2 and 0.3 differ in the last bit of float64."""
    assert group_statistics(torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64), ZERO[:2], 1).flat.all()


def test_unmeasured_members_and_members_without_group_stay_out():
    s = group_statistics(torch.tensor([1.0, torch.nan, 3.0, 50.0]), torch.tensor([0, 0, 0, -1]), 2)
    assert s.count.tolist() == [2.0, 0.0]
    assert (s.low + s.mean).tolist() == [2.0, 0.0]
    assert s.measured.tolist() == [True, False, True, False]
    # members 1 and 3: sample deviation sqrt(2), population deviation 1
    assert s.spread(0, 0.5, "std")[0] == 1.5
    torch.testing.assert_close(s.spread(1, 1.0, "var")[0], torch.tensor(3.0, dtype=torch.float64).sqrt())


def test_spread_of_others():
    """Without 7 the rest is 1, 3 with sample deviation sqrt(2); without 1 it is 3, 7 with sqrt(8); without 3, sqrt(18)."""
    s = group_statistics(torch.tensor([1.0, 3.0, 7.0]), ZERO[:3], 1)
    torch.testing.assert_close(
        s.spread_of_others(1, 0.0, "std"), torch.tensor([8.0, 18.0, 2.0], dtype=torch.float64).sqrt()
    )


def test_spread_of_others_that_are_equal_or_too_few_is_infinite():
    ids = torch.tensor([0, 0, 0, 1, 1])
    s = group_statistics(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]), ids, 2)
    others = s.spread_of_others(1, 1e-6, "std")
    assert others.isinf().tolist() == [True, False, False, True, True]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16), st.sampled_from([0, 1]))
def test_statistics_match_the_textbook(xs, ddof):
    x = torch.tensor(xs, dtype=torch.float64)
    s = group_statistics(x, ZERO[: len(xs)], 1)
    if s.flat.any():
        assert x.max() - x.min() <= 1e-12 * x.abs().max()
    else:
        torch.testing.assert_close(s.low + s.mean, x.mean()[None])
        torch.testing.assert_close(s.spread(ddof, 0.0, "std"), x.std(correction=ddof)[None], rtol=1e-6, atol=1e-9)


def whitened(x: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    m = row_moments(torch.where(mask, x, 0.0), mask, ZERO[: len(x)], 1)
    return torch.where(mask, (x - m.low - m.mean) / m.spread(1, eps, "var"), 0.0)


def test_moments_of_the_rows_of_one_response():
    """The advantages of a worked PPO example (2406.09279), whitened with eps 1e-6 inside the root."""
    x = torch.tensor([[1.003889, 0.956725, 0.575500, 0.290000, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False]])
    want = torch.tensor([[0.881106, 0.741356, -0.388249, -1.234212, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(whitened(x, mask, eps=1e-6), want, rtol=0, atol=5e-6)


def test_moments_of_rows_with_nothing_one_or_equals():
    x = torch.tensor([[0.99, 0.99, 0.99], [0.99, 0.99, 0.99]])
    for mask in ([[False] * 3] * 2, [[True, False, False], [False] * 3], [[True] * 3, [False, True, True]]):
        assert (whitened(x, torch.tensor(mask), eps=1e-8) == 0).all()


@given(st.lists(st.lists(st.one_of(st.none(), st.floats(-9, 9)), min_size=4, max_size=4), max_size=6), st.data())
def test_row_moments_are_those_of_the_members(rows, data):
    ids = torch.tensor([data.draw(st.integers(0, 2)) for _ in rows], dtype=torch.int64)
    x = torch.tensor([[v or 0.0 for v in row] for row in rows], dtype=torch.float64).reshape(-1, 4)
    mask = torch.tensor([[v is not None for v in row] for row in rows], dtype=torch.bool).reshape(-1, 4)
    got = row_moments(x, mask, ids, 3)
    want = group_statistics(x.flatten(), torch.where(mask, ids[:, None], -1).flatten(), 3)
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.flat, want.flat)
    torch.testing.assert_close(got.low + got.mean, want.low + want.mean, rtol=1e-12, atol=1e-12)
    spreads = [m.spread(1, 1e-3, "std") for m in (got, want)]
    torch.testing.assert_close(*spreads, rtol=1e-9, atol=1e-12)


def test_a_floor_under_the_variance():
    """Members 0 and 1: population variance 1/4, above a floor of 0.04 and below one of 4."""
    s = group_statistics(torch.tensor([0.0, 1.0]), ZERO[:2], 1)
    assert s.spread(0, 0.04, "floor").item() == 0.5
    assert s.spread(0, 4.0, "floor").item() == 2.0
    assert group_statistics(torch.tensor([1.0, 1.0]), ZERO[:2], 1).spread(0, 4.0, "floor").isinf().all()
