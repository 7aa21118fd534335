"""The denoising toy keeps its promises: values, advantages and gradients are those of its paths, and paths form a tree."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from apportion import branch_grpo, gae, grpo, remax, rloo, tree_relative
from apportion.arena import Yardstick, exact_advantage, random_credit
from apportion.arena._methods import missing
from apportion.arena.worlds.denoising import Denoising
from apportion.credit import capo

WORLD = Denoising()


def test_the_sampler_keeps_the_marginals_of_the_flow():
    for noise in (0.3, 1.0):
        world = Denoising(length=400, noise=noise)
        variance = torch.ones(())
        for a, b in world.policy.T:
            assert b == 0
            variance = a**2 * variance + world.spread**2
        assert float(variance) == pytest.approx(1.0, abs=0.01)  # data are N(0, 1), and so is noise


@pytest.mark.parametrize("prompt", [0, 3])
def test_the_value_is_the_mean_of_the_next_values_so_advantages_have_mean_0_in_every_state(prompt):
    world = Denoising(length=5)
    z, weight = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(100))
    of = torch.full_like(z, prompt, dtype=torch.int64)
    for k, (a, b) in enumerate(world.policy.T):
        for x in (-2.0, -0.6, 0.0, 1.3):
            path = torch.full((len(z), k + 2), x, dtype=torch.float64)
            path[:, -1] = a * x + b + world.spread * z
            values = world.values(world.policy, of, path)
            assert float(weight @ values[:, k + 1] / weight.sum()) == pytest.approx(float(values[0, k]), abs=1e-9)


def test_sampled_continuations_reach_the_exact_value():
    generator, k, n = torch.Generator().manual_seed(5), 3, 40_000
    for prompt, begin in ((0, -0.7), (1, 0.4)):
        x = torch.full((n, WORLD.length + 1), begin, dtype=torch.float64)
        for step in range(k, WORLD.length):
            a, b = WORLD.policy[:, step]
            x[:, step + 1] = (
                a * x[:, step] + b + WORLD.spread * torch.randn(n, generator=generator, dtype=torch.float64)
            )
        values = WORLD.values(WORLD.policy, torch.full((n,), prompt), x)
        reward = values[:, -1]
        assert float(reward.min()) >= 0
        assert float(reward.max()) <= 1
        assert abs(reward.mean() - values[0, k]) < 4 * reward.std() / n**0.5


@pytest.mark.parametrize("forks", [(), (0.0, 0.5)])
def test_the_credit_of_the_exact_advantage_is_the_gradient_on_average(forks):
    episodes = replace(WORLD, forks=forks).episodes(groups=800, size=4, seed=3)
    got = episodes.gradients(episodes.advantages)
    for prompt in range(WORLD.prompts):
        here = got[episodes.prompts == prompt]
        error = here.std(0) / len(here) ** 0.5
        assert bool(((here.mean(0) - episodes.gradient[prompt]).abs() < 4 * error).all())


def test_the_gradient_is_the_slope_of_the_value():
    exact = WORLD.episodes(groups=WORLD.prompts, size=1, seed=0).gradient
    for at in range(2 * WORLD.length):
        step = torch.zeros_like(WORLD.policy).flatten()
        step[at] = 1e-5
        ahead, behind = (WORLD.value(WORLD.policy + sign * step.view(2, -1)) for sign in (1, -1))
        torch.testing.assert_close((ahead - behind) / 2e-5, exact[:, at], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 8, 9])
def test_paths_share_their_beginnings_and_a_shared_step_stands_in_one_row(size):
    world = Denoising(forks=(0.25, 0.5), width=2)
    r = world.episodes(groups=3, size=size, seed=1).rollouts
    path = r.actions[..., 0].view(3, size, -1)
    acted = r.action_mask.view(3, size, -1)
    for k in range(world.length):
        for group in range(3):
            different = path[group, :, : k + 1].unique(dim=0)
            assert int(acted[group, :, k].sum()) == len(different)  # one action for each path
            assert len(path[group, acted[group, :, k], : k + 1].unique(dim=0)) == len(different)
    assert int(acted[0, :, -1].sum()) == size
    assert int(acted[0].sum()) == world.sampled(size)
    assert int(acted[0, :, 0].sum()) == -(-size // 4)  # two forks of width 2 make 4 of one


def test_branches_name_the_stretch_that_they_continue():
    r = WORLD.episodes(groups=2, size=8, seed=1).rollouts
    tree = r.spans["branch"]
    assert bool((r.span_ids("branch") >= 0).eq(r.action_mask).all())
    for i, above in enumerate(tree.parent.tolist()):
        if above < 0:
            assert int(tree.start[i]) == 0
            continue
        assert int(tree.stop[above]) == int(tree.start[i])
        cut = slice(0, int(tree.start[i]))
        assert torch.equal(r.actions[tree.row[i], cut], r.actions[tree.row[above], cut])
    children = torch.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
    assert set(children.tolist()) == {0, 2}
    assert int((children == 0).sum()) == r.batch


def test_without_forks_branch_grpo_is_grpo():
    r = Denoising(forks=()).episodes(groups=4, size=8, seed=0).rollouts
    assert bool(r.action_mask.all())
    expected = grpo(r).advantages
    torch.testing.assert_close(branch_grpo()(r).advantages, expected, rtol=1e-3, atol=1e-3)  # they differ in eps


def test_methods_run_and_the_exact_advantage_is_best():
    episodes = WORLD.episodes(groups=64, size=8, seed=0)
    yardstick = Yardstick(episodes, resamples=50)
    methods = (
        exact_advantage(),
        random_credit(),
        grpo(),
        rloo(),
        remax(),
        gae(),
        tree_relative(scale=None),
        branch_grpo(),
    )
    assert not any(missing(m, episodes.rollouts) for m in methods)
    assert missing(capo(), episodes.rollouts)
    best, chance, *others = [yardstick.measure(m(episodes.rollouts)) for m in methods]
    assert best["rank"].value == best["sign"].value == best["auc"].value == 1.0
    assert best["bias"].value < 0.05
    assert chance["rank"].low < 0 < chance["rank"].high
    assert chance["cosine"].low < 0 < chance["cosine"].high
    for found in others:
        assert chance["rank"].high < found["rank"].value < 1.0
        assert chance["cosine"].high < found["cosine"].value
        assert found["cosine"].value < best["cosine"].value
        assert found["bias"].value > best["bias"].value


def test_inside_a_pair_the_advantage_hardly_varies():
    episodes = WORLD.episodes(groups=256, size=8, seed=0)
    acted = episodes.rollouts.action_mask
    assert bool((episodes.pairs[~acted] == -1).all())
    advantage = episodes.advantages[acted]
    step = torch.arange(WORLD.length).expand_as(acted)[acted]
    prompt = episodes.prompts[episodes.rollouts.unit_ids("group")][acted]
    _, pair, count = episodes.pairs[acted].unique(return_inverse=True, return_counts=True)
    assert float((count[pair] > 1).double().mean()) > 0.6  # enough choices are made more than once
    mean = torch.zeros(len(count), dtype=torch.float64).index_add_(0, pair, advantage) / count
    inside = (advantage - mean[pair]).square() * count[pair] / (count[pair] - 1)
    assert float(inside[count[pair] > 1].mean()) < 0.04 * float(advantage.square().mean())
    for of in (step, prompt):
        high, low = (
            torch.zeros(len(count), dtype=torch.int64).scatter_reduce_(0, pair, of, how, include_self=False)
            for how in ("amax", "amin")
        )
        assert torch.equal(high, low)


def test_the_worst_step_of_a_rollouts_own_is_its_mistake():
    episodes = WORLD.episodes(groups=8, size=8, seed=2)
    acted = episodes.rollouts.action_mask
    for row in range(acted.shape[0]):
        own = episodes.advantages[row][acted[row]]
        marked = episodes.advantages[row][episodes.mistake[row]]
        assert marked.tolist() == ([float(own.min())] if own.min() < 0 else [])


def test_knobs():
    base = WORLD.episodes(groups=256, size=4, seed=0)
    off = replace(WORLD, verifier_error=0.3, critic_error=0.5).episodes(groups=256, size=4, seed=0)
    error = off.rollouts.signals["outcome"].values - base.rollouts.signals["outcome"].values
    assert float(error.std()) == pytest.approx(0.3, rel=0.1)
    exact = replace(WORLD, critic_error=0.0).episodes(groups=256, size=4, seed=0).rollouts
    wave = (off.rollouts.values - exact.values)[:, 1:]
    assert float(wave.square().mean().sqrt()) == pytest.approx(0.5, rel=0.25)  # of waves, seen where paths go
    reward = WORLD.values(
        WORLD.policy, base.prompts[exact.group_ids], torch.cat([exact.actions[:, :1, 0], exact.actions[..., 0]], 1)
    )
    torch.testing.assert_close(reward[:, 1:-1], exact.values[:, 1:])
    assert torch.equal(base.advantages, off.advantages)
    assert WORLD.episodes(groups=2, size=64, seed=0).rollouts.width == WORLD.length
    assert Denoising(length=3, forks=(0.1, 0.2)).sampled(4) == 12  # both forks before the first step are one


def test_another_policy_is_played_and_a_better_one_is_worth_more():
    policy = WORLD.policy
    for _ in range(20):
        episodes = WORLD.played(policy, groups=8, size=8, seed=4)
        policy = policy + 0.1 * episodes.gradient.mean(0).view_as(policy)
    assert float(WORLD.value(policy).mean()) > float(WORLD.value(WORLD.policy).mean()) + 0.02
    outcome = WORLD.played(policy, groups=400, size=1, seed=4).rollouts.signals["outcome"].values.view(100, -1)
    assert bool(((outcome.mean(0) - WORLD.value(policy)).abs() < 4 * outcome.std(0) / 10).all())


def test_same_seed_same_episodes_and_the_world_does_not_depend_on_it():
    one, two, other = (WORLD.episodes(groups=4, size=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.rollouts.actions, two.rollouts.actions)
    assert not torch.equal(one.rollouts.actions, other.rollouts.actions)
    assert torch.equal(one.gradient, other.gradient)
    assert torch.equal(one.rollouts.signals["greedy_outcome"].values, other.rollouts.signals["greedy_outcome"].values)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"forks": (0.5, 1.0)}, r"forks must be shares of the steps, from 0 to below 1; got \(0.5, 1.0\)"),
        ({"width": 1}, r"width must be at least 2; got 1\. For independent paths set forks=\(\)"),
        ({"noise": 0.0}, r"noise must be above 0; got 0\.0"),
        ({"length": 0}, r"length must be at least 1; got 0"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Denoising(**knobs)
