"""What must not change the update: sharing prompts, micro-batches, skipping flat rows."""

from dataclasses import replace

import pytest
import torch

from apportion.credit import grpo
from apportion.losses import KLToReference, PolicyGradient, add_losses
from apportion.train import CausalPolicy, NotFinite, Request, Sampling
from apportion.train.learner import micro_batches, update
from apportion.types import Credit, Signal

LOSS = add_losses(PolicyGradient())


def sampled(policy, task, sizes=(4, 1, 3), rewards=None):
    rollouts = policy.sample(
        [Request(p, n) for p, n in zip(task.train, sizes, strict=False)],
        Sampling(max_new_tokens=10),
        generator=torch.Generator().manual_seed(0),
    )
    rewards = torch.tensor(rewards or [1.0, 0, 0, 1, 1, 0, 1, 1])
    return rollouts.with_signals(outcome=Signal(rewards, "trajectory"))


def gradients(policy, rollouts, credit, loss=LOSS, **options):
    parameters = list(policy.trainable().values())
    before = [p.detach().clone() for p in parameters]
    settings = {"micro_tokens": 10_000, "grad_clip": 1e9, **options}
    update(policy, parameters, torch.optim.SGD(parameters, lr=1.0), rollouts, credit, loss, **settings)
    steps = [a - p.detach() for a, p in zip(before, parameters, strict=True)]
    with torch.no_grad():
        for p, a in zip(parameters, before, strict=True):
            p.copy_(a)
    return torch.cat([step.flatten() for step in steps])


def test_outputs_are_the_sampled_logprobs_for_ragged_groups(policy, task):
    rollouts = sampled(policy, task)
    outputs = policy.outputs(rollouts, rollouts.action_mask, ("entropies",))
    torch.testing.assert_close(outputs.logprobs, rollouts.logprobs, rtol=1e-5, atol=1e-5)
    row = int(rollouts.action_mask.sum(1).argmax())
    t = int(rollouts.action_mask[row].nonzero()[2])
    logits = policy.model(rollouts.tokens[row : row + 1, : t + 1]).logits[0, t - 1]
    want = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(outputs.entropies[row, t], want, rtol=1e-5, atol=1e-5)


def test_sharing_a_prompt_changes_neither_numbers_nor_gradients(tiny_model, policy, task):
    rollouts = sampled(policy, task)
    apart = CausalPolicy.load(tiny_model, precision="float32", share_prompt=False)
    assert policy.share_prompt
    credit = grpo()(rollouts)
    torch.testing.assert_close(
        gradients(policy, rollouts, credit), gradients(apart, rollouts, credit), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("options", [{"micro_tokens": 1}, {"micro_tokens": 40}, {"skip_flat": False}])
def test_cutting_and_skipping_change_only_the_time(policy, task, options):
    rollouts = sampled(policy, task)
    credit = grpo()(rollouts)
    assert (credit.advantages == 0).all(1).sum() == 1  # the group of one: flat
    want = gradients(policy, rollouts, credit)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(gradients(policy, rollouts, credit, **options), want, rtol=1e-5, atol=1e-6)


def test_a_row_without_advantage_is_not_skipped_when_another_term_pulls_at_it(policy, task):
    rollouts = sampled(policy, task, rewards=[1.0] * 8)
    credit = grpo()(rollouts)
    assert gradients(policy, rollouts, credit).abs().max() == 0
    pulled = replace(rollouts, ref_logprobs=rollouts.logprobs - 1)
    loss = add_losses(PolicyGradient(), KLToReference(coef=1.0))
    assert gradients(policy, pulled, credit, loss).abs().max() > 1e-3


def test_micro_batches_cover_every_row_once_within_the_limit(policy, task):
    rollouts = sampled(policy, task)
    batches = list(micro_batches(rollouts, torch.arange(8), 40))
    assert sorted(torch.cat(batches).tolist()) == list(range(8))
    assert all(len(b) * int(rollouts.lengths[b].max()) <= 40 for b in batches)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change_and_names_the_row(policy, task):
    rollouts = sampled(policy, task)
    credit = grpo()(rollouts)
    advantages = credit.advantages.clone()
    advantages[6, int(rollouts.action_mask[6].nonzero()[0])] = torch.inf
    before = [p.detach().clone() for p in policy.trainable().values()]
    with pytest.raises(NotFinite) as caught:
        gradients(policy, rollouts, Credit(advantages, credit.mask))
    assert caught.value.rows == [6]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable().values(), strict=True))


def test_the_first_position_of_a_row_cannot_be_scored(policy, task):
    rollouts = sampled(policy, task)
    with pytest.raises(ValueError, match="first token cannot be scored"):
        policy.outputs(rollouts, torch.ones_like(rollouts.action_mask))
