import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, chain, dr_grpo, grpo, signed_outcome, t_reg
from reference.batches import random_batch

F64 = torch.float64
NAN = float("nan")
BETTER, WORSE = [[-0.4, -0.9, -1.1], [-1.5, -2.2, 0.0]], [[-1.4, -0.6, -1.1], [-0.5, -1.0, 0.0]]


def pair(contrast, dtype=F64) -> Rollouts:
    signals = {"contrast": Signal(torch.as_tensor(contrast, dtype=dtype), "token")}
    return Rollouts.from_lists([[1, 2, 3], [1, 4]], [0, 0], outcome=[1.0, 0.0], signals=signals, dtype=dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_worked_pair_as_credit(dtype):
    """The weights 1 +- alpha h of the worked gradients over beta w: a chosen token up, a rejected one down."""
    beta_w = 0.1 * 0.487503
    want = [[0.051566 / beta_w, 0.047843 / beta_w, 0.048750 / beta_w], [-0.051566 / beta_w, -0.052023 / beta_w, 0.0]]
    r = pair(torch.tensor(BETTER, dtype=dtype) - torch.tensor(WORSE, dtype=dtype), dtype)
    got = chain(signed_outcome(), t_reg(alpha=0.25))(r).advantages
    torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), rtol=0, atol=2.1e-5)  # six digits over 0.04875


def test_a_good_token_in_a_bad_response_is_pushed_down_less():
    got = chain(signed_outcome(), t_reg(alpha=1.0))(pair([[4.0, -4.0, 0.0], [4.0, -4.0, 0.0]])).advantages
    assert got[0, 0] > 1 > got[0, 1] > 0
    assert 0 > got[1, 0] > -1 > got[1, 1]
    assert got[0, 2] == 1


def test_weights_stay_bounded():
    got = chain(signed_outcome(), t_reg(alpha=2.0))(pair([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]])).advantages
    assert got.tolist() == [[2, 0, 1], [0, -2, 0]]


@pytest.mark.parametrize("same", [t_reg(alpha=0.0), t_reg()])
def test_nothing_changes(same):
    r = pair(torch.zeros(2, 3)) if same == t_reg() else pair(torch.ones(2, 3))
    assert torch.equal(chain(grpo(), same)(r).advantages, grpo(r).advantages)


def test_an_unmeasured_contrast_leaves_its_token_and_the_notes_warn():
    r = pair([[NAN, 2.0, NAN], [1.0, 1.0, 0.0]])
    credit = chain(dr_grpo(), t_reg(alpha=1.0))(r)
    h1, h2 = 1 / (1 + math.exp(-1)) - 0.5, 1 / (1 + math.exp(-2)) - 0.5
    want = [[0.5, 0.5 * (1 + h2), 0.5], [-0.5 * (1 - h1), -0.5 * (1 - h1), 0]]
    torch.testing.assert_close(credit.advantages, torch.tensor(want, dtype=F64))
    assert credit.notes["unmeasured_contrasts"] == 2
    assert credit.notes["contrast_up"] == pytest.approx(h2)
    assert credit.notes["contrast_down"] == pytest.approx(h1)
    assert "zero_signal_groups" in credit.notes


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (t_reg(alpha=2.5), "0 <= alpha <= 2; got 2.5"),
        (t_reg(alpha=-0.1), "0 <= alpha <= 2"),
        (t_reg(contrast="outcome"), r"t_reg needs signals\['outcome'\] with one number per token"),
    ],
)
def test_what_a_wrong_setting_is_answered_with(change, text):
    with pytest.raises(ValueError, match=text):
        chain(grpo(), change)(pair(torch.zeros(2, 3)))


@given(seed=st.integers(0, 2**32 - 1), alpha=st.sampled_from([0.1, 0.25, 2.0]))
@settings(max_examples=25, deadline=None)
def test_agrees_with_the_equation(seed, alpha):
    r = random_batch(seed)
    before = grpo(r)
    got = chain(grpo(), t_reg(alpha=alpha))(r)
    for b in range(r.batch):
        for t in range(r.width):
            a, x = float(before.advantages[b, t]), float(r.signals["contrast"].values[b, t])
            h = 1 / (1 + math.exp(-x)) - 0.5
            want = (1 + alpha * h if a > 0 else 1 - alpha * h) * a
            assert float(got.advantages[b, t]) == pytest.approx(want, abs=1e-12)
    assert torch.equal(got.mask, before.mask)
