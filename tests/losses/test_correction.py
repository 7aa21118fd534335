"""Sampler and learner compute the same tokens differently: weights exp(old - sampled) with a cap."""

import math

import pytest
import torch

from apportion import Credit, Rollouts
from apportion.losses import Outputs, PolicyGradient, totals_of

F64 = torch.float64
NAN = float("nan")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def t(rows):
    return torch.tensor(rows, dtype=F64)


def two_rows(**changes) -> Rollouts:
    """old - sampled is ln 4, ln 1/2, ln 1 in the first row (product 2) and ln 2, ln 3 in the second (product 6)."""
    gaps = [[math.log(4), math.log(0.5), 0.0], [math.log(2), math.log(3)]]
    old = [[-2.0, -1.0, -3.0], [-1.5, -2.5]]
    sampled = [[o - g for o, g in zip(*row, strict=True)] for row in zip(old, gaps, strict=True)]
    r = Rollouts.from_lists([[0] * 3, [0] * 2], [0, 0], old_logprobs=old, logprobs=sampled, dtype=F64)
    return r.replace(**changes)


def run(r: Rollouts, mask=None, new=None, advantages=None, **settings):
    """Gradient at new = old (rho = 1) with advantage -1 everywhere: w / 5. And the metrics."""
    mask = r.action_mask if mask is None else torch.tensor(mask)
    new = (r.old_logprobs if new is None else new).clone().requires_grad_()
    advantages = -torch.ones(2, 3, dtype=F64) if advantages is None else advantages
    credit = Credit(torch.where(mask, advantages, 0.0), mask)
    loss, metrics = PolicyGradient(**settings)(Outputs(new), r, credit, totals_of(r, credit))
    return torch.autograd.grad(loss, new)[0], metrics


WEIGHTS = {
    "none": [[1, 1, 1], [1, 1, 0]],
    "token_truncate": [[2.5, 0.5, 1], [2, 2.5, 0]],
    "token_mask": [[0, 0.5, 1], [2, 0, 0]],
    "sequence_truncate": [[2, 2, 2], [2.5, 2.5, 0]],
    "sequence_mask": [[2, 2, 2], [0, 0, 0]],
}


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("mode", WEIGHTS)
def test_worked(mode, objective):
    gradient, metrics = run(two_rows(), correction=mode, correction_cap=2.5, objective=objective)
    assert torch.allclose(gradient, t(WEIGHTS[mode]) / 5, rtol=1e-12)  # the five tokens count, whatever their weight
    if mode == "none":
        assert not {"policy/correction", "policy/corrected"} & set(metrics)
    else:
        assert metrics["policy/correction"] == pytest.approx(sum(map(sum, WEIGHTS[mode])) / 5)
        assert metrics["policy/corrected"] == pytest.approx(2 / 5)  # two tokens, or a row of two


@pytest.mark.parametrize("mode", MODES)
def test_weight_one_where_both_agree(mode):
    r = two_rows()
    r = r.replace(logprobs=r.old_logprobs)
    gradient, metrics = run(r, correction=mode, correction_cap=1.0)
    assert torch.equal(gradient, run(r)[0])
    assert metrics["policy/correction"] == 1
    assert metrics["policy/corrected"] == 0


def test_a_weight_at_the_cap_stays():
    old = t([[-1.0, -2.0, -3.0], [-1.0, -2.0, 0.0]])
    r = two_rows(old_logprobs=old, logprobs=old - math.log(2))
    cap = math.exp(float((old - (old - math.log(2)))[0, 0]))
    assert run(r, correction="token_mask", correction_cap=cap)[1]["policy/corrected"] == 0


def test_the_row_is_what_the_loss_counts_of_it():
    """Without the first token the product of the first row is 1/2; what stands at other positions is not read."""
    r = two_rows()
    broken = r.replace(
        logprobs=torch.where(torch.tensor([[True, False, False], [False, False, True]]), NAN, r.logprobs)
    )
    gradient, _ = run(broken, [[False, True, True], [True, True, False]], correction="sequence_truncate")
    assert torch.allclose(gradient, t([[0.0, 0.5, 0.5], [2.0, 2.0, 0.0]]) / 4)


def test_it_multiplies_after_clip_and_dual_clip():
    """rho = e^2 = 7.389 everywhere, advantage -1. Dual clip 3: no gradient. The loss is 3 w, w = 2.5, .5, 1, 2, 2.5."""
    r = two_rows()
    credit = Credit(torch.where(r.action_mask, -torch.ones(2, 3, dtype=F64), 0.0), r.action_mask)
    new = (r.old_logprobs + 2).requires_grad_()
    term = PolicyGradient(dual_clip=3.0, correction="token_truncate", correction_cap=2.5)
    loss, _ = term(Outputs(new), r, credit, totals_of(r, credit))
    loss.backward()
    assert loss.item() == pytest.approx(3 * 8.5 / 5)
    assert not new.grad.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_weight_has_no_gradient_and_does_not_depend_on_the_ratio(mode, ratio):
    """-A rho w: the gradient is w times that without a correction, row by row as the ratio spreads it."""
    r = two_rows()
    new, advantages = (
        r.old_logprobs + t([[0.1, -0.1, 0.05], [0.02, 0.1, 0.0]]),
        t([[-1.0, -1.0, -1.0], [-0.5, -0.5, 0]]),
    )
    plain, _ = run(r, new=new, advantages=advantages, ratio=ratio)
    got, _ = run(r, new=new, advantages=advantages, ratio=ratio, correction=mode, correction_cap=2.5)
    weights = t(WEIGHTS[mode])
    if ratio == "sequence":  # each token moves the ratio of all: the mean weight of its row
        weights = torch.where(r.action_mask, weights.sum(1, keepdim=True) / r.action_mask.sum(1, keepdim=True), 0.0)
    assert torch.allclose(got, weights * plain, rtol=1e-12)


def test_off_policy_rows_have_their_ratio_over_the_sampler_already():
    """On the first row rho is over the sampler's: 4, .5, 1 at new = old, with dual clip and clip out of the way; w = 1."""
    r = two_rows(off_policy=torch.tensor([True, False]))
    gradient, _ = run(r, clip_low=None, clip_high=None, correction="token_truncate", correction_cap=2.5)
    assert torch.allclose(gradient, t([[4.0, 0.5, 1.0], [2.0, 2.5, 0.0]]) / 5)


def test_a_huge_gap_is_finite_and_a_token_without_advantage_contributes_nothing():
    r = Rollouts.from_lists([[1, 2]], [0], old_logprobs=[[-1.0, -1.0]], logprobs=[[-2000.0, NAN]])
    for mode, weight in (("token_truncate", 2.0), ("token_mask", 0.0)):
        new = torch.tensor([[-1.0, -1.0]], requires_grad=True)
        credit = Credit(torch.tensor([[1.0, 0.0]]), r.action_mask)
        loss, _ = PolicyGradient(correction=mode)(Outputs(new), r, credit, totals_of(r, credit))
        loss.backward()
        assert new.grad.tolist() == [[-weight / 2, 0.0]]


@pytest.mark.parametrize("mode", MODES)
def test_what_it_needs(mode):
    term = PolicyGradient(correction=mode, ratio="step")
    assert term.requires == ("spans.step", "logprobs", "old_logprobs")
    assert PolicyGradient().requires == ()
    r = two_rows()
    for missing, named in (({"old_logprobs": None}, "old_logprobs"), ({"logprobs": None}, "logprobs")):
        with pytest.raises(ValueError, match=rf"this batch lacks {named}\. Score the rows with the learner before"):
            run(r.replace(**missing), new=r.old_logprobs, correction=mode)
