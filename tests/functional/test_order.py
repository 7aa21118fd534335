import math
import statistics

import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion.functional import row_median, row_top

ROWS = st.lists(st.lists(st.integers(-3, 3), max_size=7), min_size=1, max_size=5)


@given(rows=ROWS, share=st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0]), junk=st.sampled_from([0, 9, -9]))
def test_medians_and_largest_entries(rows, share, junk):
    width = max(map(len, rows)) + 1
    values = torch.tensor([[*row, *[junk] * (width - len(row))] for row in rows], dtype=torch.float32)
    lengths = torch.tensor([len(row) for row in rows])
    assert row_median(values, lengths).tolist() == [statistics.median(row) if row else 0.0 for row in rows]
    want = []
    for row in rows:
        best = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[: math.ceil(round(share * len(row), 6))]
        want.append([i in best for i in range(width)])
    assert row_top(values, lengths, share).tolist() == want


def test_nothing():
    empty, lengths = torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)
    assert row_median(empty, lengths).tolist() == [0, 0]
    assert row_top(empty, lengths, 0.5).shape == (2, 0)


def test_a_share_that_is_whole_up_to_rounding_is_not_rounded_up():
    """0.1 * 30 is 3.0000000000000004 in floating point."""
    assert int(row_top(torch.arange(30.0)[None], torch.tensor([30]), 0.1).sum()) == 3
