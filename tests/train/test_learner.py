"""What must not change the update: sharing prompts, micro-batches, skipping flat rows."""

from dataclasses import replace

import pytest
import torch

from apportion.credit import grpo
from apportion.losses import KLToReference, PolicyGradient, add_losses
from apportion.train import CausalPolicy, NotFinite, Request, Sampling
from apportion.train.learner import learn, micro_batches, mini_batches, update
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


def moved(policy, train):
    """By how much `train(parameters, optimizer)` moves the weights, which it then gets back."""
    parameters = list(policy.trainable().values())
    before = [p.detach().clone() for p in parameters]
    train(parameters, torch.optim.SGD(parameters, lr=1.0))
    steps = [a - p.detach() for a, p in zip(before, parameters, strict=True)]
    with torch.no_grad():
        for p, a in zip(parameters, before, strict=True):
            p.copy_(a)
    return torch.cat([step.flatten() for step in steps])


def gradients(policy, rollouts, credit, loss=LOSS, **options):
    settings = {"micro_tokens": 10_000, "grad_clip": 1e9, **options}
    return moved(policy, lambda weights, sgd: update(policy, weights, sgd, rollouts, credit, loss, **settings))


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


def test_mini_batches_hold_whole_groups_in_a_new_order_each_epoch(policy, task):
    rollouts = sampled(policy, task, sizes=(4, 1, 3))
    batches = [b.tolist() for b in mini_batches(rollouts, 3, 2, torch.Generator().manual_seed(0))]
    groups = ([0, 1, 2, 3], [4], [5, 6, 7])
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert sorted(first + second) == list(range(8))
        assert all(set(g) <= set(first) or set(g) <= set(second) for g in groups)
    assert len({tuple(first) for first in batches[::2]}) > 1
    assert [b.tolist() for b in mini_batches(rollouts, 2, 1)] == [list(range(8))] * 2
    assert len(list(mini_batches(rollouts, 1, 9))) == 3  # a group is never split


def test_each_part_is_an_update_with_the_credit_of_the_step_and_totals_of_its_own(policy, task):
    rollouts = sampled(policy, task)
    rollouts = rollouts.replace(old_logprobs=rollouts.logprobs)
    credit = grpo()(rollouts)

    settings = {"micro_tokens": 60, "grad_clip": 0.1}

    def order():
        return torch.Generator().manual_seed(3)

    def at_once(weights, sgd):
        learn(policy, weights, sgd, rollouts, credit, LOSS, epochs=2, parts=2, generator=order(), **settings)

    def one_by_one(weights, sgd):
        for rows in mini_batches(rollouts, 2, 2, order()):
            part, its = rollouts.select(rows), Credit(credit.advantages[rows], credit.mask[rows])
            update(policy, weights, sgd, part, its, LOSS, **settings)

    assert torch.equal(moved(policy, at_once), moved(policy, one_by_one))


def test_what_is_not_finite_in_a_later_part_is_named_by_its_row_in_the_step(policy, task):
    rollouts = sampled(policy, task)
    credit = grpo()(rollouts)
    *_, last = mini_batches(rollouts, 1, 3, torch.Generator().manual_seed(0))
    row = int(last[-1])
    advantages = torch.where(rollouts.action_mask, 1.0, 0.0)
    advantages[row] = torch.where(rollouts.action_mask[row], torch.inf, 0.0)
    broken, order = Credit(advantages, credit.mask), torch.Generator().manual_seed(0)
    settings = {"parts": 3, "generator": order, "micro_tokens": 60, "grad_clip": 0.1}
    with pytest.raises(NotFinite) as caught:
        moved(policy, lambda weights, sgd: learn(policy, weights, sgd, rollouts, broken, LOSS, **settings))
    assert caught.value.rows == [row]
    assert caught.value.updates == 2


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
