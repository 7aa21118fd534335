"""The token trees: what is said to be exact is what sampling gives."""

import pytest
import torch

from apportion.arena import Trees

WORLDS = [
    Trees(prompts=3),
    Trees(prompts=2, where="early"),
    Trees(prompts=2, where="late", decisions=2, length=5),
    Trees(prompts=2, decisions=4, length=4, forgiving=0.5),
    Trees(prompts=2, decisions=1, length=1),
]
worlds = pytest.mark.parametrize("world", WORLDS, ids=repr)


@worlds
def test_expected_advantage_is_zero_in_every_state(world):
    t = world.table
    mean = (t.policy[:, None] * t.advantages).sum(-1)
    assert mean.abs().max() < 1e-12


@worlds
def test_sampling_reproduces_the_values(world):
    e = world.episodes(groups=world.prompts * 40, size=32, seed=3)
    outcome = e.rollouts.signals["outcome"].values
    prompts = e.prompts[e.rollouts.group_ids]
    for k in range(world.prompts):
        own = outcome[prompts == k]
        p = world.table.values[k, 0, 0].item()
        assert own.mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / len(own)) ** 0.5 + 1e-9)


@worlds
def test_what_follows_a_choice_is_worth_what_the_table_says(world):
    """outcome - V(start) = sum of the advantages on the way, on average for each first choice and exactly in total."""
    e = world.episodes(groups=64, size=8, seed=1)
    start = world.table.values[e.prompts[e.rollouts.group_ids], 0, 0]
    torch.testing.assert_close(start + e.advantages.sum(1), e.rollouts.signals["outcome"].values)


@worlds
def test_gradient_of_many_groups_meets_the_exact_one(world):
    e = world.episodes(groups=world.prompts * 64, size=16, seed=5)
    got = e.gradients(e.advantages)
    for k in range(world.prompts):
        own = got[e.prompts == k]
        error = own.std(0) / len(own) ** 0.5
        assert (own.mean(0) - world.table.gradient[k]).norm() <= 2.5 * error.norm() + 1e-9


@worlds
def test_only_decisive_tokens_have_an_advantage(world):
    e = world.episodes(groups=16, size=8, seed=0)
    assert e.advantages[~e.decisive].abs().max() < 1e-12 if (~e.decisive).any() else True
    assert e.decisive.sum(1).eq(world.decisions).all()
    assert e.decisive[0].nonzero()[:, 0].tolist() == world.places


def test_the_outcome_is_one_without_a_mistake():
    e = Trees().episodes(groups=32, size=8, seed=0)
    clean = ~e.mistake.any(1)
    assert clean.any()
    assert e.rollouts.signals["outcome"].values[clean].eq(1).all()
    assert e.rollouts.signals["outcome"].values[~clean].mean() < 0.3


def test_verdicts_are_right_without_errors_and_wrong_at_the_rate_asked_for():
    def flags(error):
        e = Trees(verdict_error=error, prompts=4).episodes(groups=64, size=8, seed=0)
        return e.rollouts.signals["judge"].values, 1 - e.rollouts.signals["process"].values, e

    judge, process, e = flags(0.0)
    assert (judge == judge[:, :1]).all()
    assert (judge[:, 0] == process).all()
    first = e.rollouts.span_ids("step")[e.mistake].unique()
    assert judge[first].eq(1).all()
    noisy, _, _ = flags(0.4)
    assert (noisy != judge).double().mean().item() == pytest.approx(0.4, abs=0.02)


def test_the_verifier_errs_at_the_rate_asked_for():
    truth = Trees().episodes(groups=64, size=8, seed=0)
    noisy = Trees(verifier_error=0.3).episodes(groups=64, size=8, seed=0)
    assert torch.equal(truth.rollouts.tokens, noisy.rollouts.tokens)
    differs = truth.rollouts.signals["outcome"].values != noisy.rollouts.signals["outcome"].values
    assert differs.double().mean().item() == pytest.approx(0.3, abs=0.08)
    assert torch.equal(truth.advantages, noisy.advantages)


def test_same_seed_same_episodes_and_another_seed_others():
    one, two, other = (Trees().episodes(8, 4, seed) for seed in (7, 7, 8))
    assert torch.equal(one.rollouts.tokens, two.rollouts.tokens)
    assert torch.equal(one.rollouts.signals["judge"].values, two.rollouts.signals["judge"].values)
    assert not torch.equal(one.rollouts.tokens, other.rollouts.tokens)


def test_the_critic_errs_by_the_state():
    exact = Trees(critic_error=0.0).episodes(32, 8, 0)
    start = Trees().table.values[exact.prompts[exact.rollouts.group_ids], 0, 0]
    torch.testing.assert_close(exact.rollouts.values[:, 0], start)
    noisy = Trees(critic_error=0.2).episodes(32, 8, 0)
    off = (noisy.rollouts.values - exact.rollouts.values)[:, 0]
    for k in range(8):
        assert off[exact.prompts[exact.rollouts.group_ids] == k].unique().numel() == 1
    assert (noisy.rollouts.values - exact.rollouts.values).std().item() == pytest.approx(0.2, abs=0.06)


def test_too_many_decisions_are_refused():
    with pytest.raises(ValueError, match="between 1 and length 3; got 4"):
        Trees(length=3, decisions=4)
