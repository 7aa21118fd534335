import math

import pytest
import torch

from apportion import Rollouts, Signal, group_relative
from apportion.signals import Utility, log_goodness, quantile_reference, rule_utility

F64 = torch.float64
HELP, HARM, REF_HARM, GAMMA = [-1.0, 0.5, 2.0, 5.0], [3.0, 1.0, 0.5, -2.0], 1.0, 0.5
BASE_HELP = [-0.5, 0.0, 0.3, 0.8, 1.2, 1.5, 2.0]


def t(values):
    return torch.tensor(values, dtype=F64)


def close(got, want):
    torch.testing.assert_close(got, t(want), rtol=0, atol=5.1e-7)


def candidates(**more) -> Rollouts:
    scores = {"help": Signal(t(HELP), "trajectory"), "harm": Signal(t(HARM), "trajectory")}
    return Rollouts.from_lists([[1]] * 4, [0] * 4, signals={**scores, **more}, dtype=F64)


# ---- worked numbers --------------------------------------------------------------------------------------------------------


def test_worked_candidates():
    reference = quantile_reference(t(BASE_HELP), 0.85)
    close(reference, 1.55)
    r = candidates(reference=Signal(reference[None], "group"))
    measured = Utility(rewards=("help", "harm"), references=("reference", REF_HARM)).measure(r)
    u = measured["utility"].values
    close(log_goodness(t(HELP), reference), [-2.625183, -1.350058, -0.493249, -0.031252])
    close(log_goodness(t(HARM), REF_HARM), [-0.126928, -0.693147, -0.974077, -3.048587])
    close(u, [-2.752111, -2.043206, -1.467326, -3.079840])
    assert int((t(HELP) + t(HARM)).argmax()) == 3
    assert int(u.argmax()) == 2
    close((u / GAMMA).softmax(0), [0.053455, 0.220664, 0.698127, 0.027754])  # over a uniform start policy
    torch.testing.assert_close(measured["goodness"].values.prod(1), u.exp())  # "and", as independent


def test_slope():
    score = t(HELP).requires_grad_()
    log_goodness(score, 1.55).sum().backward()
    close(score.grad, [0.927574, 0.740775, 0.389361, 0.030769])
    torch.testing.assert_close(score.grad, 1 - (score.detach() - 1.55).sigmoid())


def test_limits_and_far_scores():
    score = t(HELP)
    torch.testing.assert_close(log_goodness(score, 1e3), score - 1e3, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_goodness(score, -1e3), torch.zeros(4, dtype=F64), rtol=0, atol=1e-6)
    for dtype in (F64, torch.float32):
        far = log_goodness(torch.tensor([1e4, -1e4], dtype=dtype), 0.0)
        assert far.tolist() == [0.0, -1e4]


def test_quantiles_of_several_prompts():
    """Two prompts, the second with one score that failed: its quantile is that of 1 and 3."""
    scores = t([[0.0, 2.0, 4.0], [1.0, math.nan, 3.0]])
    close(quantile_reference(scores, 0.5), [2.0, 2.0])
    close(quantile_reference(scores, 0.85), [3.4, 2.7])


def test_rules():
    assert rule_utility(t([1.0, 0.0]), failed=0.5).tolist() == [0.0, math.log(0.5)]
    assert rule_utility(torch.tensor([True, False])).tolist() == pytest.approx([0.0, math.log(0.01)])
    assert rule_utility(t([math.nan])).isnan().all()


# ---- as a reward -----------------------------------------------------------------------------------------------------------


def test_a_group_is_compared_in_utilities():
    """The transform is not affine: the best by raw sum is the worst in utility, and normalising does not undo that."""
    r = candidates(raw=Signal(t(HELP) + t(HARM), "trajectory"))
    r = r.with_signals(**Utility(rewards=("help", "harm"), references=(1.55, REF_HARM)).measure(r))
    best, raw = group_relative(r, reward="utility").advantages[:, 0], group_relative(r, reward="raw").advantages[:, 0]
    assert int(best.argmax()) == 2
    assert int(raw.argmax()) == 3
    assert int(best.argmin()) == 3


def test_weights_names_and_requirements():
    utility = Utility(rewards=("help", "harm"), references=("reference", 0.0), weights=(0.5, 2.0))
    assert utility.requires == ("signals.help", "signals.harm", "signals.reference")
    assert utility.provides == ("signals.utility", "signals.goodness")
    r = candidates(reference=Signal(t([1.0]), "group"))
    got = utility.measure(r)["utility"].values
    torch.testing.assert_close(got, 0.5 * log_goodness(t(HELP), 1.0) + 2 * log_goodness(t(HARM), 0.0))
    assert eval(repr(utility)) == utility


def test_an_unmeasured_score_leaves_the_utility_unmeasured():
    r = candidates(reference=Signal(t([math.nan]), "group"))
    assert Utility(rewards=("help",), references=("reference",)).measure(r)["utility"].values.isnan().all()
    r = candidates(help=Signal(t([math.nan, 0.0, 0.0, 0.0]), "trajectory"))
    got = Utility(rewards=("help", "harm"), references=(0.0, 0.0)).measure(r)["utility"].values
    assert got.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("reference", [100.0, -100.0])
def test_a_reference_out_of_reach_warns(reference):
    with pytest.warns(UserWarning, match=r"mean of sigmoid\(help - reference\) is .*Choose another reference"):
        Utility(rewards=("help",), references=(reference,)).measure(candidates())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Utility(rewards=("help", "harm"), references=(0.0,)),
            "one of references for each of the 2 rewards; got 1",
        ),
        (
            lambda: Utility(rewards=("help",), references=(0.0,), weights=(1.0, 2.0)),
            "one of weights for each of the 1 rewards; got 2",
        ),
        (
            lambda: Utility(rewards=("x",), references=(0.0,)).measure(
                candidates(x=Signal(torch.zeros(4, 1), "token"))
            ),
            r"signals\['x'\] with one number per trajectory or group; got unit 'token'",
        ),
        (
            lambda: Utility(rewards=("x",), references=(0.0,)).measure(
                candidates(x=Signal(torch.zeros(4, 3), "trajectory", ("models",)))
            ),
            r"shape \[4, 3\].*averaging several models of one property",
        ),
    ],
)
def test_what_a_wrong_use_is_answered_with(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# ---- policies --------------------------------------------------------------------------------------------------------------


def test_training_reaches_the_closed_form():
    """Gradient ascent on E[u] - gamma KL over 12 outputs ends at pi_0 times the product of P_k^(1/gamma)."""
    make = torch.Generator().manual_seed(0)
    start = torch.randn(12, generator=make, dtype=F64).log_softmax(0)
    u = log_goodness(torch.randn(12, 2, generator=make, dtype=F64), t([0.3, -0.2])).sum(1)
    want = (start + u / GAMMA).softmax(0)
    torch.testing.assert_close(
        want, (start.exp() * u.exp() ** (1 / GAMMA)) / (start.exp() * u.exp() ** (1 / GAMMA)).sum()
    )
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        log_policy = logits.log_softmax(0)
        loss = -(log_policy.exp() * (u - GAMMA * (log_policy - start))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((logits.detach().softmax(0) - want).abs().sum() / 2) < 1e-3


def tilted(reward, divergence):
    """The policy proportional to exp(reward / gamma) over a uniform start, gamma set so that KL has the wanted size."""
    low, high = 0.0, 1e3
    for _ in range(200):
        strength = (low + high) / 2
        log_policy = (strength * reward).log_softmax(0)
        kl = float((log_policy.exp() * (log_policy + math.log(len(reward)))).sum())
        low, high = (strength, high) if kl < divergence else (low, strength)
    return log_policy.exp()


@pytest.mark.parametrize("seed", range(5))
def test_at_equal_divergence_more_outputs_are_good_in_both(seed):
    """Two opposed properties over 500 outputs: sums of utilities against raw sums; and fewer extremes of either."""
    make = torch.Generator().manual_seed(seed)
    shared, opposed = torch.randn(2, 500, generator=make, dtype=F64)
    scores = torch.stack(
        [0.7 * shared + 2.0 * opposed, 0.7 * shared - 2.0 * opposed + torch.randn(500, generator=make)], 1
    )
    reference = scores.quantile(0.6, dim=0)
    both = (scores > reference).all(1)
    utility, raw = tilted(log_goodness(scores, reference).sum(1), 1.0), tilted(scores.sum(1), 1.0)
    assert float(utility[both].sum()) > float(raw[both].sum())
    extreme = (scores > scores.quantile(0.97, dim=0)).any(1)
    assert float(utility[extreme].sum()) < float(raw[extreme].sum())
