"""One importance ratio per span: the product of its tokens' ratios."""

import math

import pytest
import torch

from apportion import Credit, Rollouts, Spans
from apportion.losses import Outputs, PolicyGradient, add_losses, totals_of

F64 = torch.float64
NAN = float("nan")


def t(rows):
    return torch.tensor(rows, dtype=F64)


def batch(old, spans, mask=None) -> Rollouts:
    r = Rollouts.from_lists(
        [[0] * len(row) for row in old], [0] * len(old), old_logprobs=old, action_mask=mask, dtype=F64
    )
    return r.with_spans(macro=Spans.from_lists(spans))


def run(term, new, r, advantages):
    credit = Credit(torch.where(r.action_mask, advantages, 0.0), r.action_mask)
    return term(Outputs(new), r, credit, totals_of(r, credit))


def test_worked_ratio_per_macro_action():
    """Log-ratios .1 and .05 | -.3: ratios e^.15 = 1.161834 at two tokens, e^-.3 = .740818 at one.

    Advantages 1, 1, -2; clip .8 .. 1.2 touches only the last, whose advantage is negative: 2 * .8 stands.
    (-2 * 1.161834 + 1.6) / 3. Each of the two tokens moves the ratio of both: -(1 + 1) * 1.161834 / 3.
    """
    r = batch([[-1.0, -1.0, -1.0]], [[(0, 2), (2, 3)]])
    new = t([[-0.9, -0.95, -1.3]]).requires_grad_()
    loss, metrics = run(PolicyGradient(ratio="macro", clip_high=0.2), new, r, t([[1.0, 1.0, -2.0]]))
    loss.backward()
    assert loss.item() == pytest.approx((-2 * 1.161834 + 1.6) / 3, abs=1e-6)
    assert torch.allclose(new.grad, t([[-2 * 1.161834 / 3, -2 * 1.161834 / 3, 0.0]]), atol=1e-6)
    assert metrics["policy/clip_low"] == pytest.approx(1 / 3)


def test_a_product_leaves_the_clip_range_where_no_token_does():
    """Three ratios of e^.1 = 1.105 stay below 1.28, their product e^.3 = 1.350 does not."""
    r = batch([[-1.0] * 3], [[(0, 3)]])
    new = t([[-0.9] * 3]).requires_grad_()
    for ratio, moves in (("token", True), ("macro", False)):
        loss, _ = run(PolicyGradient(ratio=ratio), new, r, t([[1.0] * 3]))
        assert bool(torch.autograd.grad(loss, new)[0].any()) == moves


def test_positions_outside_every_span_and_outside_the_mask():
    """The third token has a ratio of its own, e^.1; the second is tool output, and what stands there is not read."""
    r = batch([[-1.0, NAN, -1.0, -1.0]], [[(0, 2)]], [[True, False, True, True]])
    new = t([[-0.8, NAN, -0.9, -1.0]]).requires_grad_()
    loss, _ = run(PolicyGradient(ratio="macro"), new, r, t([[1.0] * 4]))
    loss.backward()
    assert loss.item() == pytest.approx(-(math.exp(0.2) + math.exp(0.1) + 1) / 3)
    assert torch.allclose(new.grad, t([[-math.exp(0.2) / 3, 0.0, -math.exp(0.1) / 3, -1 / 3]]))


def test_spans_of_one_token_are_tokens():
    r = batch([[-1.0, -2.0]], [[(0, 1), (1, 2)]])
    new, advantages = t([[-0.7, -2.4]]), t([[0.5, -1.5]])
    by_span, by_token = (run(PolicyGradient(ratio=x), new, r, advantages) for x in ("macro", "token"))
    assert by_span[0] == by_token[0]
    assert by_span[1] == by_token[1]


def test_micro_batches_add_up():
    g = torch.Generator().manual_seed(0)
    old, moved, advantages = (torch.randn(4, 5, generator=g, dtype=F64) for _ in range(3))
    r = batch((old - 2).tolist(), [[(0, 2), (2, 5)], [(1, 4)], [], [(0, 5)]])
    new = (old - 2 + 0.2 * moved).requires_grad_()
    credit = Credit(advantages, r.action_mask)
    loss, totals = add_losses(PolicyGradient(ratio="macro")), totals_of(r, credit)
    whole = loss(Outputs(new), r, credit, totals)[0]
    parts = 0.0
    for rows in (torch.tensor([3, 0]), torch.tensor([1, 2])):
        parts += loss(Outputs(new[rows]), r.select(rows), credit.select(rows), totals.take(rows))[0]
    assert parts.item() == pytest.approx(whole.item(), rel=1e-13)
    for a, b in zip(torch.autograd.grad(parts, new), torch.autograd.grad(whole, new), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_huge_product_leaves_the_gradient_finite(advantage):
    r = batch([[-500.0] * 3], [[(0, 3)]])
    new = torch.full((1, 3), -1.0, dtype=F64, requires_grad=True)
    loss, _ = run(PolicyGradient(ratio="macro"), new, r, t([[advantage] * 3]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(new.grad).all()


def test_it_asks_for_its_spans():
    assert PolicyGradient().requires == PolicyGradient(ratio="sequence").requires == ()
    assert add_losses(PolicyGradient(ratio="macro")).requires == ("spans.macro",)
    r = batch([[-1.0]], [[(0, 1)]])
    with pytest.raises(
        ValueError, match=r'ratio=\'turn\'\) needs rollouts\.spans\["turn"\], .* lacks \(it has macro\)'
    ):
        run(PolicyGradient(ratio="turn"), t([[-1.0]]), r, t([[1.0]]))
