import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, chain, gae, mle_agents, signed_outcome, weigh_by_duration
from reference.batches import random_batch
from reference.loops import mean

NAN = float("nan")


def actions(advantages, durations, dtype=torch.float64) -> Rollouts:
    """One action a trajectory, its advantage given by `gae` with V = 0."""
    n = len(advantages)
    return Rollouts.from_lists(
        [[1]] * n,
        range(n),
        outcome=advantages,
        values=[[0.0]] * n,
        signals={"duration": Signal(torch.tensor(durations, dtype=dtype), "trajectory")},
        dtype=dtype,
    )


def weighted(advantages, durations, **how) -> list[float]:
    return chain(gae(), weigh_by_duration(**how))(actions(advantages, durations)).advantages[:, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_example(dtype):
    """Durations 1, 9, 2: mean 4."""
    got = chain(gae(), weigh_by_duration())(actions([0.2, 1, -0.5], [1, 9, 2], dtype)).advantages[:, 0]
    torch.testing.assert_close(got, torch.tensor([0.05, 2.25, -0.25], dtype=dtype))
    assert weighted([1, 1, 1], [1, 9, 2]) == [0.25, 2.25, 0.5]
    assert weighted([1, 1, 1], [1, 9, 2], normalise="none") == [1, 9, 2]


def test_the_share_of_a_slow_action():
    """Equal probability, 1 and 10 seconds, a window of 100: 50 and 5 finish; advantages 0.2 and 1."""
    finished = [round(p * 100 / d) for p, d in ((0.5, 1), (0.5, 10))]
    assert finished == [50, 5]
    r = actions([0.2] * 50 + [1.0] * 5, [1.0] * 50 + [10.0] * 5)

    def share(method) -> list[float]:
        a = method(r).advantages[:, 0]
        return [round(float(x.sum() / a.sum()), 6) for x in (a[:50], a[50:])]

    assert share(gae()) == [0.666667, 0.333333]
    assert share(mle_agents(over="token")) == [0.166667, 0.833333]


def test_weights_undo_the_bias_of_asynchronous_actors():
    """Three arms; every actor draws one, repeats it until the window closes, and reports what finished.

    The gradient of the expected reward on the logits is sum p A (onehot - p). Weighted by duration, the sampled one has
    its direction; plain, it leans to the quick arms.
    """
    p, d, a = [0.5, 0.3, 0.2], [1.0, 4.0, 20.0], [0.2, -0.3, 1.0]
    rng = Random(0)
    arms = [x for x in rng.choices(range(3), p, k=500) for _ in range(int(60 / d[x]))]
    r = actions([a[x] for x in arms], [d[x] for x in arms])

    def direction(advantages) -> torch.Tensor:
        g = torch.zeros(3, dtype=torch.float64)
        one, prob = torch.eye(3, dtype=torch.float64), torch.tensor(p, dtype=torch.float64)
        for x in range(3):
            g += advantages[torch.tensor(arms) == x].sum() * (one[x] - prob)
        return g / g.norm()

    prob = torch.tensor(p).double()
    exact = sum(p[x] * a[x] * (torch.eye(3).double()[x] - prob) for x in range(3))
    exact = exact / exact.norm()
    plain, fair = (direction(m(r).advantages[:, 0]) for m in (gae(), chain(gae(), weigh_by_duration())))
    assert float(fair @ exact) > 0.995
    assert float(plain @ exact) < 0.9


def test_actors_that_draw_anew_have_no_bias_to_undo():
    """Over a long window, what finishes comes in proportion to p, however long it takes: the weight would be wrong."""
    p, d, rng = [0.5, 0.5], [1.0, 10.0], Random(0)
    finished = [0, 0]
    for _ in range(200):
        now = 0.0
        while True:
            x = rng.choices((0, 1), p)[0]
            now += d[x]
            if now > 1000:
                break
            finished[x] += 1
    assert finished[0] / sum(finished) == pytest.approx(0.5, abs=0.02)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_mean_weight_is_one_and_agrees_with_the_loop(seed):
    """Of the turns that hold a counted token; unmeasured ones count as the shortest."""
    r = random_batch(seed)
    base = signed_outcome(low=1.0)(r)
    credit = chain(signed_outcome(low=1.0), weigh_by_duration())(r)
    s, seconds = r.spans["turn"], r.signals["duration"].values.tolist()
    inside = {
        k: [(int(s.row[k]), t) for t in range(int(s.start[k]), int(s.stop[k])) if base.mask[int(s.row[k]), t]]
        for k in range(len(s))
    }
    used = [k for k in inside if inside[k]]
    known = [seconds[k] for k in used if seconds[k] > 0]
    filled = {k: (seconds[k] if seconds[k] > 0 else min(known)) if known else 1.0 for k in used}
    weights = {k: filled[k] / mean(list(filled.values())) for k in used}
    if used:
        assert mean(list(weights.values())) == pytest.approx(1)
    want = torch.where(base.mask, 1.0, 0.0).double()
    for k in used:
        for a in inside[k]:
            want[a] = weights[k]
    torch.testing.assert_close(credit.advantages, want, rtol=1e-12, atol=1e-12)


def test_equal_durations_change_nothing():
    assert weighted([0.2, 1, -0.5], [3, 3, 3]) == pytest.approx([0.2, 1, -0.5], abs=1e-15)
    assert weighted([0.7], [5]) == [0.7]


def test_zero_and_missing_durations():
    """Both count as the shortest, 2: mean 3, weights 2/3, 2/3, 2 and 2/3."""
    assert weighted([1] * 4, [0, NAN, 6, 2]) == pytest.approx([2 / 3, 2 / 3, 2, 2 / 3])
    assert weighted([1, 1], [0, NAN]) == [1, 1]
    assert weighted([1, 1], [0, NAN], normalise="none") == [1, 1]
    notes = chain(gae(), weigh_by_duration())(actions([1] * 4, [0, NAN, 6, 2])).notes
    assert notes["unmeasured_durations"] == 2


def test_an_unmeasured_outcome_is_not_in_the_mean():
    assert weighted([1, 1, NAN], [1, 3, 100]) == [0.5, 1.5, 0]


def test_bound_and_effective_sample_size():
    """Weights 0.25, 2.25, 0.5: (sum w)^2 / sum w^2 = 9 / 5.375."""
    assert weighted([1, 1, 1], [1, 9, 2], max_weight=1.5) == [0.25, 1.5, 0.5]
    notes = chain(gae(), weigh_by_duration())(actions([1, 1, 1], [1, 9, 2])).notes
    assert notes["effective_sample_size"] == pytest.approx(9 / 5.375)
    assert notes["largest_weight"] == 2.25


def test_tokens_outside_every_turn_keep_their_weight():
    r = Rollouts.from_lists([[1, 2, 3]], [0], outcome=[1.0], spans={"turn": Spans.from_lists([[(0, 1), (2, 3)]])})
    r = r.with_signals(duration=Signal(torch.tensor([1.0, 3.0]), "turn"))
    credit = chain(signed_outcome(), weigh_by_duration())(r)
    assert credit.advantages.tolist() == [[0.5, 1.0, 1.5]]
    assert credit.notes["positions_without_duration"] == 1


def test_the_composition_of_the_paper():
    """Two turns of a trajectory, V = 0.5 and 0.25 before them, lam = 1: advantages 0.5, 0.75; weights 0.5, 1.5."""
    r = Rollouts.from_lists(
        [[1, 2, 3]],
        [0],
        outcome=[1.0],
        values=[[0.5, 9.0, 0.25]],
        spans={"turn": Spans.from_lists([[(0, 2), (2, 3)]])},
        signals={"duration": Signal(torch.tensor([1.0, 3.0]), "turn")},
    )
    credit = mle_agents(lam=1.0)(r)
    assert credit.advantages.tolist() == [[0.25, 0.25, 1.125]]
    assert credit.returns.tolist() == [[1.0, 1.0, 1.0]]
    assert math.isclose(float(credit.total(r)[0, 2]), 1.125)


@pytest.mark.parametrize(
    ("durations", "how", "text"),
    [
        ([1.0, -2.0], {}, r"needs finite durations, 0 or more, in signals\['duration'\]; got -2"),
        ([1.0, math.inf], {}, "got inf. Use NaN where none was measured, and the limit"),
        ([1.0, 2.0], {"max_weight": 0.0}, "needs a max_weight above 0; got 0"),
    ],
)
def test_messages(durations, how, text):
    with pytest.raises(ValueError, match=text):
        weighted([1, 1], durations, **how)
    with pytest.raises(ValueError, match=r"needs signals\['factors'\] with one duration each"):
        chain(signed_outcome(), weigh_by_duration(duration="factors"))(random_batch(1))
