import math

import pytest
import torch

from apportion.losses import contrastive_loss, draw_positions, ranking_loss

F64 = torch.float64


def states(*rows):
    return torch.tensor([rows], dtype=F64)


SRC, GOAL = states([1.0, 0.0], [1.0, 1.0]), states([0.0, 1.0], [2.0, 1.0])
SRC2, REJ = states([1.0, 0.0], [0.0, 1.0]), states([-1.0, 0.0], [1.0, -1.0])


def test_worked_example():
    loss, metrics = contrastive_loss(SRC, GOAL, SRC2, REJ, beta=0.5)
    close = {"abs": 5.1e-7}
    assert metrics["contrast/positive"] == pytest.approx(0.650104, **close)
    assert metrics["contrast/negative"] == pytest.approx(0.442235, **close)
    assert loss.item() == pytest.approx(0.507221, **close)
    rank, _ = ranking_loss(torch.tensor([0.8], dtype=F64), torch.tensor([0.1], dtype=F64))
    assert (rank + loss).item() == pytest.approx(0.910407, **close)


def test_like_states_and_orthogonal_rejects():
    one, other = states([3.0, 0.0]), states([0.0, 0.1])
    loss, metrics = contrastive_loss(one, one, one, other)
    assert metrics["contrast/positive"] == pytest.approx(0.731059, abs=1e-6)
    assert metrics["contrast/negative"] == 0.5
    assert loss.item() == pytest.approx(0.5 * (-math.log(0.731059) + math.log(2)), abs=1e-6)


def test_the_bound():
    one = states([3.0, 0.0])
    assert contrastive_loss(one, one, one, -one, beta=1.0)[0].item() == pytest.approx(0.626523, abs=1e-6)


def test_the_mean_stands_inside_the_logarithm():
    """Two examples together are not the mean of each: -ln of a mean is below the mean of -ln."""
    one, other = states([1.0, 0.0]), states([-1.0, 0.0])
    both = contrastive_loss(
        torch.cat([one, one]), torch.cat([one, other]), torch.cat([one, one]), torch.cat([one, other])
    )
    apart = [contrastive_loss(one, x, one, x)[0] for x in (one, other)]
    assert both[0] < sum(apart) / 2 - 1e-3


def test_averaged_goals():
    """Goals e1 and e2 become (1, 1) / 2; cos with e1 is .707107."""
    goals = states([1.0, 0.0], [0.0, 1.0])
    twice = states([1.0, 0.0], [2.0, 0.0])
    _, metrics = contrastive_loss(twice, goals, twice, goals, average_goal=True)
    want = 1 / (1 + math.exp(-math.sqrt(0.5)))
    assert metrics["contrast/positive"] == pytest.approx(want)
    assert metrics["contrast/negative"] == pytest.approx(want)


def test_gradients_reach_every_state():
    given = [x.clone().requires_grad_() for x in (SRC, GOAL, SRC2, REJ)]
    contrastive_loss(*given)[0].backward()
    assert all(x.grad.abs().sum() > 0 for x in given)
    zero = torch.zeros(1, 1, 2, dtype=F64, requires_grad=True)
    loss, _ = contrastive_loss(zero, zero, zero, zero)
    loss.backward()
    assert zero.grad.isfinite().all()
    nothing = torch.zeros(0, 1, 2, dtype=F64, requires_grad=True)
    loss, _ = contrastive_loss(nothing, nothing, nothing, nothing)
    loss.backward()
    assert loss == 0


# ---- positions ------------------------------------------------------------------------------------------------------------


def drawn(chosen, rejected, seed=0, **how):
    return draw_positions(torch.tensor(chosen), torch.tensor(rejected), torch.Generator().manual_seed(seed), **how)


@pytest.mark.parametrize("percentiles", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.9), (0.99, 0.99)])
def test_every_source_lies_before_its_goal_inside_the_response(percentiles):
    length = torch.tensor([2, 3, 10, 400])[:, None]
    p = drawn(
        [2, 3, 10, 400], [1, 3, 10, 400], samples=500, source_percentile=percentiles[0], goal_percentile=percentiles[1]
    )
    assert (p.source < p.goal).all()
    assert (p.source >= 0).all()
    assert (p.goal < length).all()
    assert (p.other < length).all()
    assert (p.rejected < torch.tensor([1, 3, 10, 400])[:, None]).all()


def test_draws_cover_the_response_and_repeat_with_the_seed():
    p, again, other = drawn([4], [3], samples=2000), drawn([4], [3], samples=2000), drawn([4], [3], 1, samples=2000)
    assert p.source.unique().tolist() == [0, 1, 2]
    assert p.goal.unique().tolist() == [1, 2, 3]
    assert p.other.unique().tolist() == [0, 1, 2, 3]
    assert p.rejected.unique().tolist() == [0, 1, 2]
    assert torch.equal(p.source, again.source)
    assert not torch.equal(p.source, other.source)


def test_percentiles_keep_to_the_end_and_rejected_states_behind_the_fork():
    p = drawn([100], [50], samples=500, source_percentile=0.5, goal_percentile=0.8, rejected_from=torch.tensor([40]))
    assert p.source.min() >= 49
    assert p.goal.min() >= 79
    assert p.other.min() >= 50
    assert p.rejected.min() >= 48


@pytest.mark.parametrize(
    ("chosen", "rejected", "how", "text"),
    [
        ([1], [3], {}, "two tokens in a preferred response and one in a rejected one"),
        ([2], [0], {}, "Leave shorter pairs out"),
        ([2], [3], {"rejected_from": torch.tensor([3])}, "from rejected_from on"),
        ([2], [3], {"source_percentile": 1.0}, "0 <= source_percentile < 1; got 1"),
        ([2], [3], {"goal_percentile": -0.1}, "0 <= goal_percentile < 1"),
    ],
)
def test_what_a_wrong_draw_is_answered_with(chosen, rejected, how, text):
    with pytest.raises(ValueError, match=text):
        drawn(chosen, rejected, **how)
