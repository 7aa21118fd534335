"""CISPO: the ratio is a bounded weight of ln pi, and no token's gradient is dropped."""

import math

import pytest
import torch

from apportion import Credit, Rollouts, Spans
from apportion.losses import Outputs, PolicyGradient, add_losses, totals_of

F64 = torch.float64
NAN = float("nan")
CISPO = PolicyGradient(objective="cispo")


def t(rows):
    return torch.tensor(rows, dtype=F64)


def batch(width, rows=1, **fields) -> Rollouts:
    return Rollouts.from_lists([[0] * width] * rows, [0] * rows, dtype=F64, **fields)


def run(term, new, r, advantages):
    """Loss, gradient at `new`, metrics."""
    new = new.clone().requires_grad_()
    credit = Credit(torch.where(r.action_mask, advantages, 0.0), r.action_mask)
    loss, metrics = term(Outputs(new), r, credit, totals_of(r, credit))
    return loss.item(), torch.autograd.grad(loss, new)[0], metrics


def test_worked():
    """Ratios e^.5 = 1.648721 (cut to 1.28), e^-.5 = .606531 (as it is), e^.5 with a negative advantage (cut too).

    ln pi is -.5, -1.5, -.5: (1.28 * .5 + .606531 * 1.5 - 2 * 1.28 * .5) / 3 = (.64 + .909796 - 1.28) / 3 = .089932.
    Gradients: -A w / 3. The clipped loss drops the first one, and lets the third one weigh 2 * 1.648721 / 3.
    """
    r = batch(3, old_logprobs=[[-1.0, -1.0, -1.0]])
    new, advantages = t([[-0.5, -1.5, -0.5]]), t([[1.0, 1.0, -2.0]])
    loss, gradient, metrics = run(CISPO, new, r, advantages)
    assert loss == pytest.approx(0.089932, abs=1e-6)
    assert torch.allclose(gradient, t([[-1.28 / 3, -0.606531 / 3, 2 * 1.28 / 3]]), atol=1e-6)
    assert metrics["policy/clip_high"] == pytest.approx(2 / 3)
    assert metrics["policy/clip_low"] == 0
    _, clipped, _ = run(PolicyGradient(), new, r, advantages)
    assert torch.allclose(clipped, t([[0.0, -0.606531 / 3, 2 * 1.648721 / 3]]), atol=1e-6)


def test_on_policy_both_objectives_have_the_same_gradient_at_ratios_of_tokens():
    r = batch(4)
    new, advantages = t([[-0.5, -1.5, -0.5, -7.0]]), t([[1.0, 0.3, -2.0, -0.1]])
    for ratio in ("token", "sequence"):
        both = [run(PolicyGradient(objective=o, ratio=ratio), new, r, advantages)[1] for o in ("clip", "cispo")]
        if ratio == "token":
            assert torch.allclose(both[0], both[1], rtol=1e-12)
        assert torch.allclose(both[1], -advantages / 4, rtol=1e-12)  # ratio 1 for tokens and for the row


def test_no_bound():
    """clip_high None: e^3 weighs as it is; clip_low is not read."""
    r = batch(1, old_logprobs=[[-4.0]])
    for low in (0.2, None):
        _, gradient, _ = run(
            PolicyGradient(objective="cispo", clip_low=low, clip_high=None), t([[-1.0]]), r, t([[1.0]])
        )
        assert gradient.item() == pytest.approx(-math.exp(3))


def test_ratios_of_rows_and_spans_weigh_each_token_by_its_own_probability():
    """Log-ratios .3 and -.1: the row's weight is e^.1 = 1.105171, the span's e^.2 = 1.221403. (w .7 - 2 w 1.1) / 2."""
    r = batch(2, old_logprobs=[[-1.0, -1.0]]).with_spans(macro=Spans.from_lists([[(0, 2)]]))
    new, advantages = t([[-0.7, -1.1]]), t([[1.0, -2.0]])
    for ratio, weight in (("sequence", 1.105171), ("macro", 1.221403)):
        loss, gradient, _ = run(PolicyGradient(objective="cispo", ratio=ratio), new, r, advantages)
        assert loss == pytest.approx(weight * (0.7 - 2.2) / 2, abs=1e-6)
        assert torch.allclose(gradient, t([[-weight / 2, weight]]), atol=1e-6)


def test_what_is_masked_or_has_no_advantage_contributes_nothing():
    r = batch(4, old_logprobs=[[-1.0, NAN, -1.0, -1.0]], action_mask=[[True, False, True, True]])
    new = t([[-1.0, NAN, -torch.inf, -2.0]])
    loss, gradient, _ = run(CISPO, new, r, t([[1.0, 1.0, 0.0, 1.0]]))
    assert loss == pytest.approx((1.0 + 2 * math.exp(-1)) / 3)
    assert torch.allclose(gradient, t([[-1 / 3, 0.0, 0.0, -math.exp(-1) / 3]]))
    assert run(CISPO, new, r, t([[0.0] * 4]))[0] == 0


def test_off_policy_rows_are_compared_with_the_behaviour():
    """e^.1 on the first row; the second is on-policy."""
    r = batch(1, 2, logprobs=[[-1.1], [-1.1]]).replace(off_policy=torch.tensor([True, False]))
    _, gradient, _ = run(CISPO, t([[-1.0], [-1.0]]), r, t([[1.0], [1.0]]))
    assert torch.allclose(gradient, t([[-math.exp(0.1) / 2], [-0.5]]))


def test_a_huge_ratio_is_finite_in_float32():
    r = Rollouts.from_lists([[1]], [0], old_logprobs=[[-2000.0]])
    new = torch.tensor([[-1.0]], requires_grad=True)
    credit = Credit(torch.tensor([[1.0]]), r.action_mask)
    term = PolicyGradient(objective="cispo", clip_high=None)
    loss, _ = term(Outputs(new), r, credit, totals_of(r, credit))
    loss.backward()
    assert new.grad.item() == pytest.approx(-math.exp(20), rel=1e-5)


def test_micro_batches_add_up():
    g = torch.Generator().manual_seed(0)
    old, moved, advantages = (torch.randn(4, 5, generator=g, dtype=F64) for _ in range(3))
    r = batch(5, 4, old_logprobs=(old - 2).tolist(), logprobs=(old - 2 + 0.1 * moved).tolist())
    new = (old - 2 + 0.4 * moved).requires_grad_()
    credit = Credit(advantages, r.action_mask)
    for correction in ("none", "token_truncate", "sequence_mask"):
        loss = add_losses(PolicyGradient(objective="cispo", correction=correction, correction_cap=1.05))
        totals = totals_of(r, credit)
        whole, metrics = loss(Outputs(new), r, credit, totals)
        parts, sums = 0.0, {}
        for rows in (torch.tensor([3, 0]), torch.tensor([1, 2])):
            part, found = loss(Outputs(new[rows]), r.select(rows), credit.select(rows), totals.take(rows))
            parts = parts + part
            sums = {k: sums.get(k, 0.0) + v for k, v in found.items()}
        assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
        assert sums == pytest.approx(dict(metrics), rel=1e-12)
        one, other = torch.autograd.grad(parts, new)[0], torch.autograd.grad(whole, new)[0]
        assert torch.allclose(one, other, rtol=1e-12)
