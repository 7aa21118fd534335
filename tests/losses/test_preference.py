import math

import pytest
import torch

from apportion import Rollouts, Signal, implicit_reward
from apportion.functional import contrast_reward
from apportion.losses import dpo_loss, ranking_loss, t_reg_loss

F64 = torch.float64
CHOSEN, REJECTED = torch.tensor([0]), torch.tensor([1])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def t(rows, dtype=F64):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=dtype)


# ---- DPO ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_worked_pair(dtype):
    new, ref = t([[-0.5, -1.0, -0.2], [-1.2, -0.7]], dtype), t([[-0.9, -0.8, -0.6], [-0.8, -0.9]], dtype)
    loss, metrics = dpo_loss(new, ref, MASK, CHOSEN, REJECTED, beta=0.1)
    close = {"abs": 5.1e-7}
    assert loss.item() == pytest.approx(0.653947, **close)
    assert metrics["pair/margin"] == pytest.approx(0.08, **close)
    assert metrics["pair/weight"] == pytest.approx(0.480011, **close)
    assert metrics["pair/ranked"] == 1


def test_the_reference_itself_gives_ln_2_and_pulls_apart():
    ref = t([[-0.9, -0.8, -0.6], [-0.8, -0.9]])
    new = ref.clone().requires_grad_()
    loss, metrics = dpo_loss(new, ref, MASK, CHOSEN, REJECTED)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["pair/weight"] == 0.5
    torch.testing.assert_close(new.grad, t([[-0.05] * 3, [0.05] * 2]))  # -+ beta * weight on every token


def test_nothing_outside_the_mask_and_nothing_into_the_reference():
    new = t([[-0.5, -1.0, -0.2], [-1.2, -0.7, math.nan]]).requires_grad_()
    ref = t([[-0.9, -0.8, -0.6], [-0.8, -0.9, -math.inf]]).requires_grad_()
    loss, _ = dpo_loss(new, ref, MASK, CHOSEN, REJECTED)
    loss.backward()
    assert loss.item() == pytest.approx(0.653947, abs=1e-6)
    assert new.grad[1, 2] == 0
    assert ref.grad is None


def test_score_is_the_sum_of_the_credits_read_off():
    new, ref = t([[-0.5, -1.0, -0.2], [-1.2, -0.7]]), t([[-0.9, -0.8, -0.6], [-0.8, -0.9]])
    r = Rollouts.from_lists([[1, 2, 3], [1, 4]], [0, 0], signals={"log_ratio": Signal(new - ref, "token")}, dtype=F64)
    credit = implicit_reward(r, beta=0.1).advantages.sum(1)
    _, metrics = dpo_loss(new, ref, MASK, CHOSEN, REJECTED, beta=0.1)
    assert float(credit[0] - credit[1]) == pytest.approx(metrics["pair/margin"])


def test_several_pairs_share_rows_and_no_pairs_give_nothing():
    new, ref = t([[-0.5], [-1.0], [-2.0]]).requires_grad_(), t([[-1.0]] * 3)
    mask = torch.ones(3, 1, dtype=torch.bool)
    both, _ = dpo_loss(new, ref, mask, torch.tensor([0, 0]), torch.tensor([1, 2]))
    each = [dpo_loss(new, ref, mask, torch.tensor([0]), torch.tensor([k]))[0] for k in (1, 2)]
    assert both.item() == pytest.approx(sum(x.item() for x in each) / 2)
    nothing, metrics = dpo_loss(
        new, ref, mask, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)
    )
    nothing.backward()
    assert nothing.item() == metrics["pair/margin"] == 0
    assert (new.grad == 0).all()


def test_ranking_loss_of_the_goal_conditioned_example():
    loss, _ = ranking_loss(torch.tensor([0.8], dtype=F64), torch.tensor([0.1], dtype=F64))
    assert loss.item() == pytest.approx(0.403186, abs=5.1e-7)
    far, metrics = ranking_loss(torch.tensor([1e4]), torch.tensor([-1e4]))
    assert far.item() == metrics["pair/weight"] == 0
    with_margin, _ = ranking_loss(torch.tensor([0.8], dtype=F64), torch.tensor([0.1], dtype=F64), margin=0.7)
    assert with_margin.item() == pytest.approx(math.log(2))


# ---- T-REG ----------------------------------------------------------------------------------------------------------------

NEW, REF = t([[-0.5, -1.2, -0.8], [-0.6, -2.0]]), t([[-0.7, -1.0, -0.9], [-0.5, -1.7]])
CONTRAST = t([[-0.4, -0.9, -1.1], [-1.5, -2.2]]) - t([[-1.4, -0.6, -1.1], [-0.5, -1.0]])


def t_reg(new, contrast=CONTRAST, ref=REF, **how):
    return t_reg_loss(new, ref, contrast, MASK, CHOSEN, REJECTED, **how)


def test_worked_t_reg():
    new = NEW.clone().requires_grad_()
    loss, metrics = t_reg(new)
    loss.backward()
    assert loss.item() == pytest.approx(0.660544, abs=5.1e-7)
    assert metrics["pair/weight"] == pytest.approx(0.487503, abs=5.1e-7)
    assert metrics["pair/regulariser"] == pytest.approx(0.002620 - 0.067568, abs=1.1e-6)
    assert dpo_loss(NEW, REF, MASK, CHOSEN, REJECTED)[0].item() == pytest.approx(0.668460, abs=5.1e-7)
    want = t([[-0.051566, -0.047843, -0.048750], [0.051566, 0.052023]])
    torch.testing.assert_close(new.grad, want, rtol=0, atol=5.1e-7)


def test_the_regulariser_of_each_response():
    """alpha large, one side's contrast at a time: the loss moves by alpha w reg."""
    base, metrics = t_reg(NEW, alpha=0.0)
    for row, reg in ((0, 0.002620), (1, -0.067568)):
        only = torch.where(torch.arange(2)[:, None] == row, CONTRAST, 0.0)
        moved, _ = t_reg(NEW, only, alpha=1.0)
        assert (moved - base).item() / metrics["pair/weight"] == pytest.approx(reg, abs=1.1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["dpo", "simpo"])
def test_gradient_is_the_closed_form(seed, form):
    """dL/d ln pi = -+ beta w (1 +- alpha h), over the length for the normalised form; mean over pairs."""
    make = torch.Generator().manual_seed(seed)
    new, ref, contrast = (torch.randn(4, 6, generator=make, dtype=F64) for _ in range(3))
    mask = torch.rand(4, 6, generator=make) < 0.8
    chosen, rejected, alpha, beta, margin = torch.tensor([0, 2]), torch.tensor([1, 3]), 0.5, 2.0, 0.3
    new.requires_grad_()
    loss, _ = t_reg_loss(new, ref, contrast, mask, chosen, rejected, alpha=alpha, beta=beta, form=form, margin=margin)
    loss.backward()
    length = mask.sum(1).clamp(min=1).double() if form == "simpo" else torch.ones(4)
    gain = new.detach() if form == "simpo" else new.detach() - ref
    score = beta * torch.where(mask, gain, 0.0).sum(1) / length
    w = (score[rejected] - score[chosen] + margin).sigmoid()
    h = contrast_reward(contrast)
    want = torch.zeros_like(gain)
    for p in range(2):
        i, j = int(chosen[p]), int(rejected[p])
        want[i] = -beta / length[i] * w[p] * (1 + alpha * h[i]) / 2
        want[j] = beta / length[j] * w[p] * (1 - alpha * h[j]) / 2
    torch.testing.assert_close(new.grad, torch.where(mask, want, 0.0), rtol=0, atol=1e-9)


def test_without_strength_or_contrast_it_is_dpo():
    plain = dpo_loss(NEW, REF, MASK, CHOSEN, REJECTED)[0]
    assert t_reg(NEW, alpha=0.0)[0] == plain
    assert t_reg(NEW, torch.zeros(2, 3, dtype=F64))[0] == plain


def test_simpo_needs_no_reference_and_means_over_the_length():
    """r: .1 * (-2.5 / 3) and .1 * (-2.6 / 2); d = .046667 - .02; -ln sigmoid = .679903."""
    loss, metrics = t_reg(NEW, ref=None, form="simpo", alpha=0.0, margin=0.02)
    assert metrics["pair/margin"] == pytest.approx(0.046667, abs=1e-6)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.026667)), abs=1e-6)
    with pytest.raises(ValueError, match='needs ref_logprobs for form="dpo"; got None'):
        t_reg(NEW, ref=None)


def test_extreme_and_unmeasured_contrasts():
    contrast = t([[1e4, -1e4, math.nan], [0.0, 0.0, math.nan]])
    new = NEW.clone().requires_grad_()
    loss, _ = t_reg(new, contrast, alpha=0.5)
    loss.backward()
    w = 0.487503
    torch.testing.assert_close(new.grad[0], -0.1 * w * torch.tensor([1.25, 0.75, 1.0], dtype=F64), rtol=0, atol=1e-7)
    assert loss.isfinite()
