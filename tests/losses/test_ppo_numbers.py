"""PPO from rollouts to the loss: the worked numbers of ReFT, Unpacking DPO and PPO, and MA-RLHF, credit and loss together."""

import math
from statistics import fmean, variance

import pytest
import torch

from apportion import Rollouts, Signal, chain, gae, ma_rlhf, whiten
from apportion.losses import Outputs, PolicyGradient, ValueLoss, add_losses, dpo_loss, totals_of
from apportion.signals import fixed_ngrams

F64 = torch.float64


def t(rows):
    return torch.tensor(rows, dtype=F64)


def run(term, r, credit, new, values=None):
    """Loss, gradients at new and values, metrics."""
    inputs = [x.clone().requires_grad_() for x in (new, values) if x is not None]
    loss, metrics = term(Outputs(*inputs), r, credit, totals_of(r, credit))
    return loss.item(), torch.autograd.grad(loss, inputs, allow_unused=True), metrics


def unpacking(kl_coef):
    """Four tokens, ended, score 1.5."""
    r = Rollouts.from_lists(
        [[5] * 4],
        [0],
        outcome=[1.5],
        logprobs=[[-0.5, -1.0, -0.2, -0.8]],
        old_logprobs=[[-0.5, -1.0, -0.2, -0.8]],
        ref_logprobs=[[-0.6, -0.8, -0.2, -1.0]],
        values=[[0.4, 0.5, 0.9, 1.2]],
        dtype=F64,
    ).with_signals(kl=Signal(t([0.05]), "batch"))
    return r, chain(gae(kl_coef=kl_coef, lam=0.95), whiten(eps=1e-6))(r)


@pytest.mark.parametrize("kl_coef", [0.05, "kl"])
def test_unpacking(kl_coef):
    """white, ratio, pg_loss and returns of the example; the gradient of an unclipped token is -A rho / 4.

    Values moved by .3, .1, 0, .3 under a bound of .2: 1/2 * .429879 in the mean, as in `test_losses`; times .1.
    """
    r, credit = unpacking(kl_coef)
    white, ratio = t([[0.881106, 0.741356, -0.388249, -1.234212]]), t([[1.105171, 0.740818, 1.0, 1.105171]])
    torch.testing.assert_close(credit.advantages, white, rtol=0, atol=6e-7)
    torch.testing.assert_close(credit.returns, t([[1.403889, 1.456725, 1.4755, 1.49]]), rtol=0, atol=6e-7)
    new, moved = t([[-0.4, -1.3, -0.2, -0.7]]), t([[0.7, 0.6, 0.9, 1.5]])
    policy, (slope,), metrics = run(PolicyGradient(clip_low=0.2, clip_high=0.2), r, credit, new)
    assert policy == pytest.approx(0.057321, abs=1e-6)
    torch.testing.assert_close(slope, -white * ratio / 4, rtol=0, atol=1e-6)
    assert metrics["policy/clip_low"] == metrics["policy/clip_high"] == 0
    both = add_losses(PolicyGradient(clip_high=0.2), ValueLoss(coef=0.1, clip=0.2))
    total, _, metrics = run(both, r, credit, new, moved)
    assert metrics["value/loss"] == pytest.approx(0.0214940, abs=1e-6)
    assert total == pytest.approx(0.057321 + 0.0214940, abs=2e-6)


def test_unpacking_pair():
    """.1 ((-20 + 21) - (-24 + 23.5)) = .15, and -ln sigmoid(.15) = .620957."""
    new, ref = t([[-20.0], [-24.0]]), t([[-21.0], [-23.5]])
    loss, _ = dpo_loss(new, ref, torch.ones(2, 1, dtype=torch.bool), torch.tensor([0]), torch.tensor([1]), beta=0.1)
    assert loss.item() == pytest.approx(0.620957, abs=1e-6)


def test_reft_first_inner_step():
    """The response of the example, of which 0.1 is extracted wrongly, beside a right answer of one token with V .5.

    Its penalty: .05 (ln pi_old - ln pi_ref) = .05 * .4 = .02, so that its advantage is 1 - .02 - .5 = .48, its return .98.
    Not whitened, ratio 1: ((.172787 + .229250 + .515) / 3 - .48) / 2 = (.305679 - .48) / 2.
    Value, no move: 5 / 2 * ((.172787^2 + .229250^2 + .515^2) / 3 + .48^2) / 2 = 1.25 * (.115879 + .2304).
    """
    r = reft()
    credit = gae(kl_coef=0.05, lam=0.95)(r)
    torch.testing.assert_close(credit.advantages, t([[-0.172787, -0.229250, -0.515], [0.48, 0, 0]]), rtol=0, atol=6e-7)
    torch.testing.assert_close(credit.returns, t([[0.127213, 0.120750, 0.085], [0.98, 0, 0]]), rtol=0, atol=6e-7)
    total, (slope, _), metrics = run(REFT, r, credit, r.old_logprobs, r.values)
    assert metrics["policy/ratio_shift"] == 0
    assert metrics["policy/loss"] == pytest.approx((0.305679 - 0.48) / 2, abs=1e-6)
    assert metrics["value/loss"] == pytest.approx(1.25 * (0.115879 + 0.2304), abs=3e-6)
    assert total == pytest.approx(metrics["policy/loss"] + metrics["value/loss"])
    torch.testing.assert_close(slope, t([[0.172787 / 6, 0.229250 / 6, 0.515 / 6], [-0.24, 0, 0]]), rtol=0, atol=6e-7)


def test_reft_whitens_all_tokens_and_clips_each():
    """Whitened over the four tokens by hand; ratios e^.3 = 1.349859 (cut to 1.2 where A > 0), e^-.3 (cut to .8 where A < 0)."""
    r = reft()
    credit = chain(gae(kl_coef=0.05, lam=0.95), whiten(eps=1e-8))(r)
    raw = [-0.172787, -0.229250, -0.515, 0.48]
    white = [(a - fmean(raw)) / math.sqrt(variance(raw) + 1e-8) for a in raw]
    torch.testing.assert_close(credit.advantages, t([white[:3], [white[3], 0, 0]]), rtol=0, atol=3e-6)
    shift = t([[0.3, -0.3, -0.3], [0.3, 0, 0]])
    (first, second, third), last = (white[0] * 1.349859, white[1] * 0.8, white[2] * 0.8), white[3] * 1.2
    policy, _, metrics = run(PolicyGradient(clip_high=0.2, aggregation=ROWS), r, credit, r.old_logprobs + shift)
    assert white[0] < 0 < white[3]
    assert policy == pytest.approx(-((first + second + third) / 3 + last) / 2, abs=3e-6)
    assert metrics["policy/clip_low"] == 0.5
    assert metrics["policy/clip_high"] == 0.25


ROWS = "sequence_mean_token_mean"
REFT = add_losses(PolicyGradient(clip_high=0.2, aggregation=ROWS), ValueLoss(coef=5.0, clip=0.2, aggregation=ROWS))


def reft():
    old = [[-0.4, -0.9, -0.3], [-0.6]]
    return Rollouts.from_lists(
        [[5] * 3, [5]],
        [0, 1],
        outcome=[0.1, 1.0],
        logprobs=old,
        old_logprobs=old,
        ref_logprobs=[[-0.5, -0.7, -0.6], [-1.0]],
        values=[[0.3, 0.35, 0.6], [0.5]],
        dtype=F64,
    )


def test_ma_rlhf():
    """3-grams of the example, A = .738667, .626667, .4 on 3, 3 and 1 tokens: 4.496 in all.

    Each log-ratio is .1. One ratio per token, e^.1 = 1.105171, no clip: -1.105171 * 4.496 / 7 = -.709835.
    One per macro action, e^.3 = 1.349859 twice, cut to 1.2: -(1.2 * 4.096 + .442068) / 7 = -.765324.
    Value, no move: (V - R)^2 adds up to .703362 + .407895 + .545628 + .3136 + .2116 + .7396 + .16 = 3.081685; half the mean.
    """
    r = Rollouts.from_lists(
        [[5] * 7], [0], values=[[0.1, 0.3, 0.2, 0.4, 0.5, 0.1, 0.6]], old_logprobs=[[-1.0] * 7], dtype=F64
    ).with_signals(r=Signal(t([[-0.01, 0.0, 0.02, -0.03, 0.0, 0.01, 1.0]]), "token"))
    r = r.with_spans(macro=fixed_ngrams(3)(r))
    credit = ma_rlhf(kl_coef=0.0, reward="r")(r)
    torch.testing.assert_close(credit.advantages, t([[0.738667] * 3 + [0.626667] * 3 + [0.4]]), rtol=0, atol=6e-7)
    new = r.old_logprobs + 0.1
    by_token, (slope,), metrics = run(PolicyGradient(clip_high=0.2), r, credit, new)
    assert by_token == pytest.approx(-0.709835, abs=2e-6)
    torch.testing.assert_close(slope, -1.105171 * credit.advantages / 7, rtol=0, atol=1e-6)
    assert metrics["policy/clip_high"] == 0
    by_macro, (slope,), metrics = run(PolicyGradient(clip_high=0.2, ratio="macro"), r, credit, new)
    assert by_macro == pytest.approx(-0.765324, abs=2e-6)
    torch.testing.assert_close(slope, t([[0.0] * 6 + [-0.442068 / 7]]), rtol=0, atol=1e-6)
    assert metrics["policy/clip_high"] == pytest.approx(6 / 7)
    value, _, _ = run(ValueLoss(coef=1.0, clip=0.2), r, credit, new, r.values)
    assert value == pytest.approx(3.081685 / 14, abs=2e-6)
