"""Signals that are learned from other rollouts of a world: what they are made of, and how right they are."""

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from apportion import grpo, implicit_reward, oprl
from apportion.arena import Denoising, Hackable, Rooms, Trees, Yardstick
from apportion.arena._episodes import Episodes
from apportion.arena._learned import (
    HACKABLE_FACTORS,
    ROOM_FACTORS,
    Lesson,
    Tabular,
    choices,
    factor_weights,
    factors,
    implicit_rewards,
    with_learned,
)
from apportion.arena.claims import Claim
from apportion.arena.claims._lare import lare_between_companions, lare_finds_what_matters, raw_inputs
from apportion.arena.claims._oprl import _counted, oprl_over_grpo
from apportion.arena.worlds.budgets import Budgets

WORLDS = [Trees(), Rooms(), Rooms(observe=False), Hackable(), Budgets()]
SHORT = Lesson(groups=256)


def _signals(world: Tabular, lesson: Lesson = SHORT, seed: int = 0) -> Episodes:
    return with_learned(world, world.episodes(groups=64, size=8, seed=seed), lesson)


# ---- where they stand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: type(world).__name__)
def test_choices_are_those_that_were_made(world: Tabular) -> None:
    episodes = world.episodes(groups=16, size=4, seed=0)
    r = episodes.rollouts
    logprobs = world.table.logits.log_softmax(-1)[choices(world.table, episodes)]
    torch.testing.assert_close(logprobs[r.action_mask], r.logprobs[r.action_mask])


def test_signals_and_what_they_cost() -> None:
    episodes = _signals(Rooms())
    r = episodes.rollouts
    assert (r.signals["log_ratio"].unit, r.signals["decoded"].unit) == ("token", "step")
    assert bool((r.signals["log_ratio"].values[~r.action_mask] == 0).all())
    assert episodes.costs["signals.log_ratio"].passes == 1
    assert "signals.decoded" not in episodes.costs
    assert "values" in episodes.costs


def test_same_lesson_same_signals_whatever_the_episodes() -> None:
    world, other = Trees(), pickle.loads(pickle.dumps((Trees(), SHORT)))
    first = implicit_rewards(world, SHORT)
    implicit_rewards.cache_clear()
    assert torch.equal(first, implicit_rewards(*other))
    assert not torch.equal(first, implicit_rewards(world, replace(SHORT, seed=5_000_000)))
    a, b = _signals(world, seed=0), _signals(world, seed=1)
    pairs = torch.cat([x.pairs.flatten() for x in (a, b)])
    ratios = torch.cat([x.rollouts.signals["log_ratio"].values.flatten() for x in (a, b)])
    assert len(torch.stack([pairs.double(), ratios]).unique(dim=1).T) == len(pairs.unique())


def test_longer_lesson_begins_as_a_shorter_one() -> None:
    world = Trees()
    short, long = (next(lesson.episodes(world)) for lesson in (Lesson(256), Lesson(1024)))
    assert torch.equal(short.pairs, long.pairs)


def test_world_without_a_table_gets_its_episodes_back() -> None:
    episodes = Denoising().episodes(groups=4, size=4, seed=0)
    assert with_learned(Denoising(), episodes) is episodes


# ---- the implicit process reward ----------------------------------------------------------------------------------------


def test_phi_is_a_policy() -> None:
    world = Trees()
    phi = (world.table.logits.log_softmax(-1) + implicit_rewards(world, SHORT)).exp()
    torch.testing.assert_close(phi.sum(-1), torch.ones_like(phi[..., 0]))


def test_what_learned_nothing_is_grpo() -> None:
    r = _signals(Trees(), Lesson(groups=16, rate=0.0)).rollouts
    torch.testing.assert_close(oprl(spans="step")(r).advantages, grpo()(r).advantages)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: type(world).__name__)
def test_learned_reward_orders_choices(world: Tabular) -> None:
    episodes = _signals(world)
    found = Yardstick(episodes, resamples=200)
    r = episodes.rollouts
    assert found.difference(implicit_reward()(r), grpo()(r))["rank"].low > 0.15


def test_coins_teach_nothing() -> None:
    world = Trees()
    episodes = with_learned(replace(world, verifier_error=0.5), world.episodes(groups=64, size=8, seed=0), SHORT)
    assert abs(Yardstick(episodes, resamples=10).measure(implicit_reward()(episodes.rollouts))["rank"].value) < 0.1


# ---- decoded rewards ----------------------------------------------------------------------------------------------------


def test_decoder_finds_the_value_of_one_decision() -> None:
    """The outcome depends on one choice: weights at its place differ as Q does; elsewhere they are equal."""
    world = Trees(prompts=3, decisions=1, length=4)
    weights = factor_weights(world, SHORT).view(3, 4, 4)
    (place,) = world.places
    q = world.table.q[:, place, place]
    torch.testing.assert_close(weights[:, place] - weights[:, place, :1], q - q[:, :1], atol=1e-6, rtol=0)
    elsewhere = [t for t in range(4) if t != place]
    assert float((weights - weights.mean(-1, keepdim=True))[:, elsewhere].abs().max()) < 1e-6


def test_decoded_rewards_add_up_to_the_outcome_where_it_is_linear() -> None:
    world = Trees(prompts=3, decisions=1, length=4)
    r = _signals(world).rollouts
    sums = torch.zeros(r.batch, dtype=torch.float64)
    sums.index_add_(0, r.spans["step"].row, r.signals["decoded"].values)
    torch.testing.assert_close(sums, r.signals["outcome"].values, atol=1e-6, rtol=0)


def test_factors_of_trees_name_tokens() -> None:
    world = Trees(step=3)
    episodes = world.episodes(groups=4, size=2, seed=0)
    phi = factors(world, episodes).view(8, 4, 12, 4)
    for row, tokens in enumerate(episodes.rollouts.tokens.tolist()):
        for t, token in enumerate(tokens):
            assert phi[row, t // 3, t].tolist() == [float(a == token) for a in range(4)]
    assert phi.sum() == 8 * 12


@pytest.mark.parametrize("observe", [True, False])
def test_factors_of_rooms_retell_the_walk(observe: bool) -> None:
    world = Rooms(observe=observe)
    episodes = world.episodes(groups=8, size=2, seed=0)
    phi, steps = factors(world, episodes), episodes.rollouts.spans["step"]
    prompt, states, actions = (x[steps.row, steps.stop - 1].tolist() for x in choices(world.table, episodes))
    seen: dict[int, set[int]] = {}
    for row, k, s, a, given in zip(steps.row.tolist(), prompt, states, actions, phi.tolist(), strict=True):
        after, been = int(world.table.follows[k, s, a]), seen.setdefault(row, set())
        been.add(s)
        told = [True, after == s, a == 4 and after != s, a == 5 and after != s, a < 4 and after != s and after in been]
        assert given == [float(x) for x in (*told, a == 0, a == 1, a == 2, a == 3)]
    assert len(ROOM_FACTORS) == phi.shape[1]


def test_factors_of_hackable_steps_hide_what_is_wrong() -> None:
    world = Hackable()
    episodes = world.episodes(groups=8, size=2, seed=0)
    phi, kind = factors(world, episodes), episodes.rollouts.signals["kind"].values
    assert phi.shape[1] == len(HACKABLE_FACTORS)
    assert bool((phi.sum(1) == 1).all())
    assert torch.equal(phi[:, 0] == 1, (kind[:, 0] == 1) | (kind[:, 1] == 1))


# ---- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    world = Trees()
    with pytest.raises(ValueError, match=r"seed 7, as part of the lesson.*Choose another seed"):
        with_learned(world, world.episodes(groups=8, size=2, seed=7), Lesson(seed=5))
    with pytest.raises(ValueError, match=r"4 groups does not see all 8 prompts. Raise groups"):
        with_learned(world, world.episodes(groups=8, size=2, seed=0), Lesson(groups=4))
    with pytest.raises(TypeError, match=r"no factors are known of Denoising"):
        factors(Denoising(), world.episodes(groups=8, size=2, seed=0))


# ---- claims -------------------------------------------------------------------------------------------------------------


def test_counting_finds_the_advantage() -> None:
    """The mean outcome after a choice less that before, where both are visited often."""
    world = Trees(prompts=2, length=4, decisions=1)
    episodes = world.episodes(groups=16, size=8, seed=0)
    counted = _counted(world, episodes, Lesson(groups=512)).values
    torch.testing.assert_close(counted, episodes.advantages, atol=0.05, rtol=0)


def test_raw_inputs_name_situation_and_choice() -> None:
    world = Trees(prompts=2, length=4)
    phi = raw_inputs(world, world.episodes(groups=4, size=2, seed=0))
    assert phi.shape == (8 * 2, world.table.logits.shape[1] * 4)
    assert bool((phi.sum(1) == 2).all())


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [(oprl_over_grpo, "shown"), (lare_finds_what_matters, "shown"), (lare_between_companions, "contradicted")],
)
def test_claims(claim: Callable[..., Claim], verdict: str) -> None:
    assert claim(quick=True).verdict == verdict
