import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.losses import implicit_prm_loss
from reference.batches import random_batch

NAN = float("nan")
F64 = torch.float64
PHI = torch.tensor([[-0.5, -0.4, -0.2, 0, 0], [-1.0, -0.9, -0.7, -0.6, -0.6]], dtype=F64)
OLD = torch.tensor([[-0.9, -0.8, -0.4, 9, NAN], [-0.6, -0.5, -0.8, -0.2, -0.4]], dtype=F64)
MASK = torch.tensor([[True, True, True, False, False], [True] * 5])
TWO, ONE_GROUP = torch.tensor([0, 1]), torch.tensor([0, 0])


def worked(phi=PHI, outcomes=(1.0, 0.0), **how):
    return implicit_prm_loss(phi, OLD, MASK, TWO, ONE_GROUP, torch.tensor(outcomes), **how)


def test_worked_pair():
    """Sums of the step rewards .05 and -.065: -ln sigmoid(.115)."""
    loss, metrics = worked()
    assert loss.item() == pytest.approx(0.637299, abs=5e-7)
    assert metrics == {"prm/loss": loss.item(), "prm/pairs": 1.0, "prm/ranked": 1.0}
    assert worked(outcomes=(0.0, 1.0))[0].item() == pytest.approx(math.log1p(math.exp(0.115)))


def test_mean_over_steps():
    """As the released code: .05 / 2 and -.065 / 3."""
    loss, _ = worked(steps=torch.tensor([2, 3]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(0.025 + 0.065 / 3))))


def test_phi_equal_to_the_policy_gives_ln_2():
    loss, _ = worked(phi=torch.where(MASK, OLD, 0.0))
    assert loss.item() == pytest.approx(math.log(2))


def test_a_step_down_the_gradient_raises_the_difference():
    phi = PHI.clone().requires_grad_()
    loss, _ = worked(phi)
    loss.backward()
    assert (phi.grad[0, :3] < 0).all()
    assert (phi.grad[1] > 0).all()
    assert (phi.grad[~MASK] == 0).all()
    assert worked(PHI - phi.grad)[0] < loss


def test_without_a_pair_loss_and_gradient_are_zero():
    for outcomes in ((0.5, 0.5), (1.0, NAN), (NAN, NAN)):
        phi = PHI.clone().requires_grad_()
        loss, metrics = worked(phi, outcomes)
        loss.backward()
        assert loss.item() == 0
        assert metrics["prm/pairs"] == 0
        assert (phi.grad == 0).all()
    apart = implicit_prm_loss(PHI, OLD, MASK, TWO, TWO, torch.tensor([1.0, 0.0]))
    assert apart[0].item() == 0


def test_success_and_margin():
    assert worked(outcomes=(0.9, 0.2))[1]["prm/pairs"] == 1
    assert worked(outcomes=(0.9, 0.2), success=0.0)[1]["prm/pairs"] == 0
    assert worked(outcomes=(0.9, 0.0), success=0.0)[1]["prm/pairs"] == 1
    assert worked(outcomes=(NAN, 0.9), success=0.0)[1]["prm/pairs"] == 0
    assert worked(outcomes=(0.9, 0.2), margin=0.8)[1]["prm/pairs"] == 0


def test_a_shift_of_the_outcomes_changes_nothing():
    assert worked(outcomes=(8.0, 7.0))[0] == worked()[0]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_agrees_with_a_loop_over_the_pairs(seed):
    r = random_batch(seed)
    outcomes, groups = r.signals["outcome"].values, r.trajectory_groups
    loss, metrics = implicit_prm_loss(
        r.logprobs, r.old_logprobs, r.action_mask, r.trajectory_ids, groups, outcomes, beta=0.3
    )
    score = [0.0] * r.num_trajectories
    for b, t in r.action_mask.nonzero().tolist():
        score[int(r.trajectory_ids[b])] += 0.3 * float(r.logprobs[b, t] - r.old_logprobs[b, t])
    terms = [
        math.log1p(math.exp(-(score[i] - score[j])))
        for i, j in itertools.permutations(range(len(score)), 2)
        if groups[i] == groups[j] and outcomes[i] > outcomes[j]
    ]
    assert metrics["prm/pairs"] == len(terms)
    assert loss.item() == pytest.approx(sum(terms) / max(len(terms), 1))


def test_learnt_step_rewards_find_the_decisive_step():
    """Three steps of two actions; only the second decides. The policy is uniform, phi starts as it."""
    chain = torch.tensor(list(itertools.product([0, 1], repeat=3)))
    outcome = chain[:, 1].double()
    logits = torch.zeros(3, 2, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    old = torch.full((8, 3), math.log(0.5), dtype=F64)

    def phi():
        return torch.stack([logits.log_softmax(1)[k, chain[:, k]] for k in range(3)], 1)

    for _ in range(30):
        optimizer.zero_grad()
        loss, metrics = implicit_prm_loss(
            phi(), old, torch.ones(8, 3, dtype=torch.bool), torch.arange(8), torch.zeros(8, dtype=torch.int64), outcome
        )
        loss.backward()
        optimizer.step()
    worth = (logits.log_softmax(1)[:, 1] - logits.log_softmax(1)[:, 0]).abs()
    assert worth.argmax() == 1
    assert worth[1] > 10 * worth[[0, 2]].max()
    assert metrics["prm/ranked"] == 1.0
