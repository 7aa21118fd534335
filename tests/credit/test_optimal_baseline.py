import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, optimal_token_baseline
from reference import loops
from reference.batches import random_batch

DTYPES = {torch.float64: 1e-7, torch.float32: 2e-6}


def batch(pi, squares, outcome, groups=None, dtype=torch.float64, **more) -> Rollouts:
    rows = [[math.log(p) for p in row] for row in pi]
    tokens, groups = [[1] * len(row) for row in pi], groups or [0] * len(pi)
    r = Rollouts.from_lists(tokens, groups, outcome=outcome, logprobs=rows, dtype=dtype, **more)
    wide = [row + [float("nan")] * (r.width - len(row)) for row in squares]
    return r.with_signals(sum_pi_squared=Signal(torch.tensor(wide, dtype=dtype), "token"))


def table(got, want, dtype=torch.float64) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), rtol=0, atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_group(dtype):
    """Terms 1 - 2 pi + sum pi^2. First response: .5, .75, so W = .5, 1.25; second: .25, .5, so W = .25, .75.

    Rewards 1 and 0: B = .5 / .75 = 2/3 at the first place, 1.25 / 2 = 5/8 at the second.
    """
    r = batch([[0.5, 0.25], [0.75, 0.5]], [[0.5, 0.25], [0.75, 0.5]], [1, 0], dtype=dtype)
    credit = optimal_token_baseline(r)
    table(credit.advantages, [[1 / 3, 3 / 8], [-2 / 3, -5 / 8]], dtype)
    table(credit.parts["baseline"].values, [[-2 / 3, -5 / 8]] * 2, dtype)


def test_equal_weights_give_the_mean():
    r = batch([[0.5], [0.5], [0.5]], [[0.5]] * 3, [1, 0, 0.5])
    table(optimal_token_baseline(r).advantages, [[0.5], [-0.5], [0.0]])


def test_the_tail_of_the_longest_response():
    """At the third place only the first response has an action: its return as it is, or 0."""
    pi = [[0.5, 0.5, 0.5], [0.5, 0.5], [0.5]]
    r = batch(pi, pi, [1, 0, 0])
    assert optimal_token_baseline(r).advantages[0, 2] == 1
    table(optimal_token_baseline(r, tail="zero").advantages[0], [2 / 3, 1 / 2, 0.0])
    assert optimal_token_baseline(r).notes["lone_tail"] == 1 / 6
    two = batch([[0.5, 0.5], [0.5, 0.5], [0.5]], [[0.5, 0.5], [0.5, 0.5], [0.5]], [1, 0, 0])
    table(optimal_token_baseline(two).advantages[:, 1], [0.5, -0.5, 0.0])


def test_a_group_of_one():
    r = batch([[0.5, 0.5]], [[0.5, 0.5]], [0.7])
    for tail in ("return", "zero"):
        assert (optimal_token_baseline(r, tail=tail).advantages == 0).all()
        table(optimal_token_baseline(r, tail=tail, singleton="raw").advantages, [[0.7, 0.7]])
    assert optimal_token_baseline(r).notes["singleton_groups"] == 1


def test_places_are_counted_in_actions_or_in_positions():
    """The first response has an observation at the second position: its next action is the second action, third position.

    All terms .5; rewards 1 and 0. In actions it meets the other's second (W 1 and 1: B = 1/2), in positions the third
    (W 1 and 1.5: B = 2/5); the other's second position then stands alone in its place: B is its own return.
    """
    pi = [[0.5, 0.9, 0.5], [0.5, 0.5, 0.5]]
    mask = [[True, False, True], [True, True, True]]
    r = batch(pi, [[0.5, 9.0, 0.5], [0.5] * 3], [1, 0], action_mask=mask)
    table(optimal_token_baseline(r).advantages, [[0.5, 0.0, 0.5], [-0.5, -0.5, 0.0]])
    at_positions = optimal_token_baseline(r, align="position")
    table(at_positions.advantages, [[0.5, 0.0, 0.6], [-0.5, 0.0, -0.4]])
    assert (optimal_token_baseline.verl()(r).advantages == at_positions.advantages).all()
    assert repr(optimal_token_baseline.verl(align="action")) == (
        "optimal_token_baseline(align='action', singleton='raw', reward='outcome')"
    )


def test_rows_of_a_trajectory_follow_each_other():
    """Two rows of one action each are compared with a response of two; context before an action is not counted."""
    for align in ("action", "position"):
        r = Rollouts.from_lists(
            [[9, 5], [5], [6, 6]],
            [0, 0, 0],
            trajectories=["a", "a", "b"],
            row_index=[1, 0, 0],
            action_mask=[[False, True], [True], [True, True]],
            outcome=[1, 0],
            logprobs=[[0.0, math.log(0.5)], [math.log(0.25)], [math.log(0.75), math.log(0.5)]],
            dtype=torch.float64,
        )
        squares = torch.tensor([[9, 0.25], [0.5, 0], [0.75, 0.5]], dtype=torch.float64)
        r = r.with_signals(sum_pi_squared=Signal(squares, "token"))
        # terms: a 1, .25 (at least (1 - pi)^2 = .25); b .25, .5: W 1, 1.25 and .25, .75
        got = optimal_token_baseline(r, align=align).advantages
        table(got, [[0.0, 0.375], [0.2, 0.0], [-0.8, -0.625]])


def test_impossible_sums_of_squares_are_raised_to_the_square_of_the_drawn_probability():
    """pi = .9 with a sum of squares of .1 would give the term -.7; it is at least (1 - .9)^2 = .01."""
    r = batch([[0.9], [0.9]], [[0.1], [0.82]], [1, 0])
    table(optimal_token_baseline(r, eps=0.0).advantages, [[2 / 3], [-1 / 3]])


def test_unmeasured_positions_add_nothing_to_the_weight():
    r = batch([[0.5, 0.5], [0.5, 0.5]], [[float("nan"), 0.5], [0.5, 0.5]], [1, 0])
    credit = optimal_token_baseline(r)
    table(credit.advantages, [[1.0, 1 - 1 / 3], [0.0, -1 / 3]])
    assert credit.notes["unmeasured_tokens"] == 1


def test_nothing_varied_yet():
    """All drawn with probability 1: no weight anywhere, the smallest return is taken off, and nothing is divided by 0."""
    for eps in (1e-8, 0.0):
        credit = optimal_token_baseline(batch([[1.0], [1.0]], [[1.0], [1.0]], [1, 0]), eps=eps)
        assert credit.advantages.tolist() == [[1.0], [0.0]]


def test_unmeasured_outcome_and_empty_response():
    pi = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], []]
    with_them = batch(pi, pi, [1, 0, float("nan"), 1])
    credit = optimal_token_baseline(with_them)
    assert (credit.advantages[:2] == optimal_token_baseline(batch(pi[:2], pi[:2], [1, 0])).advantages).all()
    assert (credit.advantages[2:] == 0).all()
    assert credit.mask.any(1).tolist() == [True, True, False, False]


def test_equal_rewards_give_exactly_nothing_without_a_tail():
    pi = [[0.5, 0.3], [0.2, 0.9], [0.6]]
    for dtype in DTYPES:
        r = batch(pi, pi, [0.99] * 3, dtype=dtype)
        assert (optimal_token_baseline(r, tail="zero").advantages == 0).all()


def plain(r: Rollouts, align: str, tail: str, singleton: str) -> list[list[float]]:
    out = loops.blank(r)
    every = [e for e in loops.episodes(r) if not math.isnan(e.outcome)]
    weights, places, extents = [], [], []
    for e in every:
        mine, total, place, number = {}, 0.0, {}, 0
        for b in e.rows:
            acts = [t for row, t in e.actions if row == b]
            for t in range(min(acts), max(acts) + 1) if acts else []:
                if (b, t) in e.actions:
                    pi = math.exp(float(r.old_logprobs[b, t]))
                    term = 1 - 2 * pi + float(r.signals["sum_pi_squared"].values[b, t])
                    total += max(term, (1 - pi) ** 2)
                    mine[b, t], place[b, t] = total, number
                number += (b, t) in e.actions or align == "position"
        weights.append(mine)
        places.append(place)
        extents.append(number)
    for i, e in enumerate(every):
        mates = [k for k, x in enumerate(every) if x.group == e.group]
        second = sorted(extents[k] for k in mates)[-2] if len(mates) > 1 else 0
        for a in e.actions:
            at = places[i][a]
            here = [(every[k].outcome, weights[k][x]) for k in mates for x in places[k] if places[k][x] == at]
            if len(mates) < 2:
                out[a[0]][a[1]] = e.outcome if singleton == "raw" else 0.0
            elif at >= second:
                out[a[0]][a[1]] = e.outcome if tail == "return" else 0.0
            else:
                out[a[0]][a[1]] = e.outcome - sum(g * w for g, w in here) / sum(w for _, w in here)
    return out


@pytest.mark.parametrize("align", ["action", "position"])
@pytest.mark.parametrize(("tail", "singleton"), [("return", "zero"), ("zero", "zero"), ("return", "raw")])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_against_plain_loops(align, tail, singleton, seed):
    r = random_batch(seed)
    got = optimal_token_baseline(r, align=align, tail=tail, singleton=singleton, eps=0.0).advantages
    want = loops.table_of(plain(r, align, tail, singleton), r)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_messages():
    r = batch([[0.5]], [[0.5]], [1])
    with pytest.raises(
        ValueError, match=r"needs signals\['outcome'\] with one number per token; got unit 'trajectory'"
    ):
        optimal_token_baseline(r, sum_pi_squared="outcome")
    with pytest.raises(ValueError, match=r"needs rollouts\.signals\[\"sum_pi_squared\"\], which this batch lacks"):
        optimal_token_baseline(Rollouts.from_lists([[1]], [0], outcome=[1.0], logprobs=[[-1.0]]))
