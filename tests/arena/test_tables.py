"""Exact values against arithmetic by hand, and against what sampling gives."""

import math

import pytest
import torch

from apportion.arena import Trees
from apportion.arena._tables import Table

INF = float("inf")


def two_steps() -> Table:
    """State 0: choice 0 (chance 3/4) leads to state 1, choice 1 ends with 0.5. State 1: 1/3 pays 1, 2/3 pays nothing."""
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, math.log(2.0)]]], dtype=torch.float64)
    follows = torch.tensor([[[1, -1], [-1, -1]]])
    reward = torch.tensor([[[0.0, 0.5], [1.0, 0.0]]], dtype=torch.float64)
    return Table(logits, follows, reward, torch.tensor([0]), horizon=2)


def loop() -> Table:
    """One state: choice 0 stays, choice 1 ends with 1; three choices at most, each with chance 1/2."""
    return Table(
        torch.zeros(1, 1, 2, dtype=torch.float64),
        torch.tensor([[[0, -1]]]),
        torch.tensor([[[0.0, 1.0]]], dtype=torch.float64),
        torch.tensor([0]),
        horizon=3,
    )


def test_values_by_hand():
    t = two_steps()
    assert t.values[0, 1, 1].item() == pytest.approx(1 / 3)
    assert t.values[0, 0, 0].item() == pytest.approx(3 / 4 * 1 / 3 + 1 / 4 * 1 / 2)  # 0.375
    torch.testing.assert_close(t.advantages[0, 0, 0], torch.tensor([1 / 3 - 0.375, 0.125], dtype=torch.float64))


def test_a_loop_is_cut_by_the_horizon():
    t = loop()
    torch.testing.assert_close(t.values[0, :, 0], torch.tensor([7 / 8, 3 / 4, 1 / 2], dtype=torch.float64))
    torch.testing.assert_close(t.visits[0, :, 0], torch.tensor([1, 1 / 2, 1 / 4], dtype=torch.float64))
    walk = t.walk(torch.zeros(4000, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert (~walk.ended).double().mean().item() == pytest.approx(1 / 8, abs=4 * math.sqrt(7 / 64 / 4000))
    assert (walk.outcome == walk.ended.double()).all()
    assert walk.lengths.double().mean().item() == pytest.approx(1.75, abs=0.06)


def test_gradient_is_the_derivative_of_the_expected_outcome():
    for t in (two_steps(), loop(), Trees(prompts=2, length=4, decisions=2).table):
        logits = t.logits.clone().requires_grad_()
        again = Table(logits, t.follows, t.reward, t.start, t.horizon)
        again.values[torch.arange(len(t.start)), 0, t.start].sum().backward()
        torch.testing.assert_close(t.gradient, logits.grad.flatten(1))


def test_a_forbidden_choice_is_never_made_and_harms_nothing():
    t = two_steps()
    t = Table(torch.tensor([[[0.0, -INF], [0.0, 0.0]]], dtype=torch.float64), t.follows, t.reward, t.start, t.horizon)
    walk = t.walk(torch.zeros(64, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert (walk.actions[:, 0] == 0).all()
    assert t.values[0, 0, 0].item() == pytest.approx(0.5)
    assert t.gradient.isfinite().all()


def test_scores_are_the_derivative_of_the_log_probabilities():
    t = two_steps()
    walk = t.walk(torch.zeros(6, dtype=torch.int64), torch.Generator().manual_seed(1))
    weights = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 1, 1])
    logits = t.logits.clone().requires_grad_()
    want = []
    for g in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for b in range(6):
            for h in range(int(walk.lengths[b])):
                if int(groups[b]) == g:
                    logp = logits[0, walk.states[b, h]].log_softmax(-1)[walk.actions[b, h]]
                    total = total + weights[b, h] * logp / (groups == g).sum()
        want.append(torch.autograd.grad(total, logits)[0].flatten())
    torch.testing.assert_close(t.scores(walk, weights, groups), torch.stack(want))


def test_greedy_takes_the_likeliest_choice():
    assert two_steps().walk(torch.tensor([0])).actions.tolist() == [[0, 1]]
