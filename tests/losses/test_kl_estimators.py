"""The four estimates of the distance to the reference, by hand and by summing over every token that could be drawn."""

import math

import pytest
import torch

from apportion import Credit, Rollouts
from apportion.losses import KLToReference, Outputs, totals_of

F64 = torch.float64
NAN = float("nan")


def t(rows):
    return torch.tensor(rows, dtype=F64)


def run(new, ref, estimator, coef=1.0, mask=None, **more):
    r = Rollouts.from_lists([[0] * new.shape[1]] * len(new), [0] * len(new), action_mask=mask, dtype=F64)
    r = r.replace(ref_logprobs=ref)
    credit = Credit(torch.zeros_like(ref), r.action_mask)
    return KLToReference(coef=coef, estimator=estimator, **more)(Outputs(new), r, credit, totals_of(r, credit))


@pytest.mark.parametrize(
    ("estimator", "values", "slopes"),
    [
        ("k1", [-0.693147, 0.693147, 0.0], [1.0, 1.0, 1.0]),
        ("k2", [0.240227, 0.240227, 0.0], [-0.693147, 0.693147, 0.0]),
        ("k3", [0.306853, 0.193147, 0.0], [-1.0, 0.5, 0.0]),
        ("abs", [0.693147, 0.693147, 0.0], [-1.0, 1.0, 0.0]),
    ],
)
def test_by_hand(estimator, values, slopes):
    """ref - new = ln 2, -ln 2, 0. k2 = (ln 2)^2 / 2; k3 = 2 - ln 2 - 1 and 1/2 + ln 2 - 1. The fourth is not counted."""
    ref = t([[-1.0, -2.0, -3.0, NAN]])
    new = (ref - t([[math.log(2), -math.log(2), 0.0, 0.0]])).requires_grad_()
    loss, metrics = run(new, ref, estimator, 0.3, [[True, True, True, False]])
    loss.backward()
    assert loss.item() == pytest.approx(0.3 * sum(values) / 3, abs=1e-6)
    assert metrics["kl/reference"] == pytest.approx(sum(values) / 3, abs=1e-6)
    assert torch.allclose(new.grad, t([[0.1 * s for s in slopes] + [0.0]]), atol=1e-6)


def expected(estimator, **more):
    """Over every draw of one token from three: the mean of the estimate, the mean of its gradient at the logits."""
    logits, ref = t([0.5, 0.3, 0.2]).log().requires_grad_(), t([0.2, 0.2, 0.6]).log()
    new = logits.log_softmax(0)
    value, slope = 0.0, torch.zeros(3, dtype=F64)
    for token, chance in enumerate(new.detach().exp().tolist()):
        loss, _ = run(new[token].view(1, 1), ref[token].view(1, 1), estimator, **more)
        value += chance * loss.item()
        slope += chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return value, slope


def test_which_are_unbiased_and_where_their_gradients_point():
    logits, ref = t([0.5, 0.3, 0.2]).log().requires_grad_(), t([0.2, 0.2, 0.6]).log()
    new = logits.log_softmax(0)
    kl = (new.exp() * (new - ref)).sum()
    back = (ref.exp() * (ref - new)).sum()
    to_ref, from_ref = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (kl, back))
    (k1, slope1), (k2, slope2), (k3, slope3), (_, slope_abs) = map(expected, ("k1", "k2", "k3", "abs"))
    assert k1 == pytest.approx(kl.item())
    assert k3 == pytest.approx(kl.item())
    assert abs(k2 - kl.item()) > 0.001
    assert torch.allclose(slope1, t([0.0, 0.0, 0.0]), atol=1e-12)
    assert torch.allclose(slope2, to_ref)
    assert torch.allclose(slope3, from_ref)  # the gradient of KL(ref | new)
    assert (slope_abs * to_ref).sum() > 0
    for estimator in ("k1", "k3"):
        value, slope = expected(estimator, weighed=True)
        assert value == pytest.approx(kl.item())
        assert torch.allclose(slope, to_ref)


def test_weighed_by_hand():
    """new = old + ln 1.5, ref = new + ln 2: 1.5 (2 - ln 2 - 1); its slope is that plus 1.5 (1 - 2)."""
    r = Rollouts.from_lists([[0]], [0], old_logprobs=[[-2.0]], dtype=F64)
    new = (r.old_logprobs + math.log(1.5)).requires_grad_()
    r = r.replace(ref_logprobs=new.detach() + math.log(2))
    credit = Credit(torch.zeros(1, 1, dtype=F64), r.action_mask)
    loss, _ = KLToReference(coef=1.0, weighed=True)(Outputs(new), r, credit, totals_of(r, credit))
    loss.backward()
    assert loss.item() == pytest.approx(1.5 * 0.306853, abs=1e-6)
    assert new.grad.item() == pytest.approx(1.5 * 0.306853 - 1.5, abs=1e-6)
