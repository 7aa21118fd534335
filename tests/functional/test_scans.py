import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.functional import suffix_min, suffix_sum

ITEM = st.tuples(st.floats(-10, 10), st.sampled_from([0.0, 0.5, 0.95, 1.0]))


@given(st.lists(ITEM, max_size=150))
def test_against_the_recursion(items):
    total, least = [0.0], [torch.inf]
    for value, carry in reversed(items):
        total.append(value + carry * total[-1])
        least.append(min(value, least[-1]) if carry else value)
    values = torch.tensor([v for v, _ in items], dtype=torch.float64)
    carry = torch.tensor([c for _, c in items], dtype=torch.float64)
    want = torch.tensor(total[:0:-1], dtype=torch.float64)
    torch.testing.assert_close(suffix_sum(values, carry), want, rtol=1e-12, atol=1e-12)
    assert suffix_min(values, carry != 0).tolist() == least[:0:-1]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1023, 1024, 1025, 33000])
def test_block_edges(length):
    """Plain sum of ones from each position on: length, length - 1, ..., 1."""
    ones = torch.ones(length)
    assert suffix_sum(ones, ones).tolist() == list(range(length, 0, -1))


def test_long_discount_does_not_overflow():
    """0.95^-t leaves float32 at t = 1730; the geometric sum is 1 / (1 - 0.95) = 20 far from the end."""
    n = 5000
    out = suffix_sum(torch.ones(n), torch.full((n,), 0.95, dtype=torch.float64))
    torch.testing.assert_close(out[0], torch.tensor(20.0, dtype=torch.float64))


def test_nan_and_infinity_stop_at_the_end_of_their_sequence():
    x = torch.tensor([1.0, 2.0, torch.nan, torch.inf])
    assert suffix_sum(x, torch.tensor([1.0, 0.0, 0.0, 0.0]))[:2].tolist() == [3.0, 2.0]
    x = torch.tensor([1.0] * 40 + [torch.nan] * 40)
    carry = torch.ones(80)
    carry[39] = 0.0
    assert suffix_sum(x, carry)[0] == 40.0
    assert suffix_min(x, carry.bool())[0] == 1.0
