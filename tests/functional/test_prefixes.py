import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.functional import prefix_values, shrinks


def call(rows, groups, rewards):
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max(map(len, rows), default=0)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)
    tokens = tokens.reshape(len(rows), width)
    return prefix_values(
        tokens, lengths, torch.tensor(groups, dtype=torch.int64), torch.tensor(rewards, dtype=torch.float64)
    ), lengths


def test_worked_tree():
    """Four responses: all begin with 1; three go on with 2, of which two with 5."""
    rows = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 7, 8], [1, 2, 5, 9]]
    (values, sharers), lengths = call(rows, [0, 0, 0, 0], [1.0, 0.0, 0.0, 1.0])
    two_thirds = 2 / 3
    want = [
        [0.5, 0.5, two_thirds, 1.0, 1.0],
        [0.5, 0.5, two_thirds, 0.5, 0.0],
        [0.5, 0.5, 0.0, 0.0, 0.0],
        [0.5, 0.5, two_thirds, 0.5, 1.0],
    ]
    torch.testing.assert_close(values, torch.tensor(want, dtype=torch.float64))
    assert sharers.tolist() == [[4, 4, 3, 1, 1], [4, 4, 3, 2, 1], [4, 4, 1, 1, 0], [4, 4, 3, 2, 1]]
    assert shrinks(sharers, lengths).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1]]


def test_padding_never_matches():
    """The response that ended shares one token; the other goes on with 0, which is also what pads the tensor."""
    (values, sharers), lengths = call([[4], [4, 0]], [0, 0], [1.0, 0.0])
    assert values.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    assert sharers.tolist() == [[2, 2, 0], [2, 2, 1]]
    assert shrinks(sharers, lengths).tolist() == [[False, False], [False, True]]


def test_groups_do_not_share_and_unmeasured_are_nobodys_sharers():
    (values, sharers), _ = call([[1], [1], [1]], [0, 1, 1], [1.0, 0.25, float("nan")])
    assert values.tolist() == [[1.0, 1.0], [0.25, 0.25], [0.25, 0.25]]
    assert sharers.tolist() == [[1, 1], [1, 1], [1, 1]]


def test_thue_morse_tokens_are_told_apart():
    """A polynomial hash mod 2^64 takes these two for the same; comparing tokens cannot."""
    word = [0]
    for _ in range(11):
        word += [1 - w for w in word]
    (values, _), _ = call([word, [1 - w for w in word]], [0, 0], [1.0, 0.0])
    assert values[:, 0].tolist() == [0.5, 0.5]
    assert (values[0, 1:] == 1).all()
    assert (values[1, 1:] == 0).all()


def test_nothing():
    (values, _), _ = call([], [], [])
    assert values.shape == (0, 1)
    (values, _), _ = call([[], []], [0, 0], [1.0, 0.0])
    assert values.tolist() == [[0.5], [0.5]]


ROW = st.lists(st.integers(-2, 1), max_size=5)


@given(st.lists(st.tuples(ROW, st.integers(0, 1), st.sampled_from([0.0, 1.0, 0.3])), min_size=1, max_size=8))
@settings(max_examples=60)
def test_against_counting(batch):
    rows, groups, rewards = [list(x) for x in zip(*batch, strict=True)]
    (values, sharers), _ = call(rows, groups, rewards)
    for i, row in enumerate(rows):
        for t in range(len(row) + 1):
            same = [k for k, o in enumerate(rows) if groups[k] == groups[i] and len(o) >= t and o[:t] == row[:t]]
            assert sharers[i, t] == len(same)
            assert abs(values[i, t] - sum(rewards[k] for k in same) / len(same)) < 1e-12
