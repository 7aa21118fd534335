"""The hackable world keeps its promises: its rules, its scores, its exact values, and which credit it leads astray."""

from dataclasses import replace

import pytest
import torch

from apportion import capo, chain, clip_delta, gae, grpo, pure, returns_to_go, whiten
from apportion.arena import Yardstick, exact_advantage, random_credit
from apportion.arena.worlds.hackable import KINDS, Hackable

WORLD = Hackable()
HONEST = {"right": 1.0, "wrong": 0.0, "empty": 0.5, "repeated": 0.5, "giant": 0.0}


def told(tokens, world):
    """The rules in words, one rollout at a time: outcome, kinds of the steps, which are wrong, and their honest scores."""
    right, error, outcome, kinds, wrong, honest = 0, False, 0.0, [], [], []
    for choice in tokens[:: 1 + world.filler]:
        kind = KINDS[choice]
        if kind == "right" and right == world.work:
            kind = "repeated"
        if kind == "repeated" and right == 0:
            kind = "empty"
        if kind == "answer":
            outcome = float(right == world.work and not error)
        kinds.append(kind)
        wrong.append(kind in ("wrong", "giant") or (kind == "answer" and not outcome))
        honest.append(outcome if kind == "answer" else HONEST[kind])
        right += kind == "right"
        error |= wrong[-1]
    return outcome, kinds, wrong, honest


@pytest.mark.parametrize(("filler", "gaming"), [(0, 0.0), (1, 1.0), (2, 0.5)])
def test_rollouts_follow_the_rules_and_are_scored_by_them(filler, gaming):
    world = replace(WORLD, filler=filler, gaming=gaming, verdict_error=0.0, length=6)
    episodes = world.episodes(groups=40, size=4, seed=0)
    r = episodes.rollouts
    steps = r.spans["step"].to_lists(r.batch)
    at, seen = 0, set()
    for row, tokens in enumerate(r.tokens.tolist()):
        outcome, kinds, wrong, honest = told(tokens[: int(r.lengths[row])], world)
        assert outcome == float(r.signals["outcome"].values[row])
        assert bool(r.truncated[row]) == (kinds[-1] != "answer")
        assert [stop - start for start, stop in steps[row]] == [1 if k == "answer" else 1 + filler for k in kinds]
        here = slice(at, at + len(kinds))
        at += len(kinds)
        assert [KINDS[k] for k in r.signals["kind"].values[here].argmax(1)] == kinds
        used = [k not in ("empty", "repeated") for k in kinds]
        assert r.signals["label"].values[here].tolist() == ([not w for w in wrong] if outcome else used)
        assert r.signals["judge"].values[here].tolist() == [[float(w)] * 3 for w in wrong]
        gamed = [0.0 if kind == "wrong" else 1.0 for kind in kinds]
        score = [(1 - gaming) * h + gaming * g for h, g in zip(honest, gamed, strict=True)]
        assert r.signals["process"].values[here].tolist() == score
        assert r.signals["margin"].values[here].tolist() == [2 * x - 1 for x in score]
        first = wrong.index(True) if any(wrong) else None
        marked = set() if first is None else set(range(*steps[row][first]))
        assert set(episodes.mistake[row].nonzero()[:, 0].tolist()) == marked
        seen |= set(kinds)
    assert at == len(r.spans["step"])
    assert seen == set(KINDS)


def test_advantages_have_mean_0_in_every_state_and_only_choices_matter():
    table = WORLD.table
    assert float((table.policy[:, None] * table.advantages).sum(-1).abs().max()) < 1e-12
    episodes = WORLD.episodes(groups=64, size=8, seed=0)
    choice = torch.arange(episodes.rollouts.width) % (1 + WORLD.filler) == 0
    assert float(episodes.advantages[:, ~choice].abs().max()) < 1e-12
    assert not bool(episodes.decisive[:, ~choice].any())
    assert bool((episodes.advantages[~episodes.decisive].abs() < 1e-8).all())
    after = (episodes.mistake.cumsum(1) > 0) & ~episodes.mistake
    assert not bool((episodes.decisive & after).any())


def test_sampling_reproduces_the_exact_values_and_habits():
    episodes = WORLD.episodes(groups=800, size=4, seed=1)
    r = episodes.rollouts
    outcome = r.signals["outcome"].values.view(-1, WORLD.prompts, 4).transpose(0, 1).flatten(1)
    error = outcome.std(1) / outcome.shape[1] ** 0.5
    assert bool(((outcome.mean(1) - WORLD.table.values[:, 0, 0]).abs() < 4 * error).all())
    habits = WORLD.habits(WORLD.table)
    assert habits["accuracy"] == pytest.approx(float(WORLD.table.values[:, 0, 0].mean()))
    per_row = torch.zeros(r.batch, len(KINDS), dtype=torch.float64).index_add_(
        0, r.spans["step"].row, r.signals["kind"].values
    )
    exact = torch.tensor([habits[k] for k in KINDS], dtype=torch.float64)
    assert bool(((per_row.mean(0) - exact).abs() < 4 * per_row.std(0) / r.batch**0.5).all())
    idle = (habits["empty"] + habits["repeated"]) / float(exact.sum())
    assert WORLD.hacked(r) == pytest.approx(idle, abs=0.02)


def test_the_credit_of_the_exact_advantage_is_the_gradient_on_average():
    episodes = WORLD.episodes(groups=1600, size=2, seed=3)
    got = episodes.gradients(episodes.advantages) - episodes.gradient
    along = torch.randn(got.shape[1], 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for prompt in range(WORLD.prompts):
        off = got[episodes.prompts == prompt] @ along  # rare states alone are too few for a standard error
        assert bool((off.mean(0).abs() < 4 * off.std(0) / len(off) ** 0.5).all())


def test_methods_run_and_the_exact_advantage_is_best():
    episodes = WORLD.episodes(groups=64, size=8, seed=0)
    yardstick = Yardstick(episodes, resamples=50)
    best, chance = (yardstick.measure(m(episodes.rollouts)) for m in (exact_advantage(), random_credit()))
    assert best["rank"].value == best["sign"].value == 1.0
    assert chance["rank"].low < 0 < chance["rank"].high
    for method in (grpo(), gae(), capo(), pure(), pure(process="margin"), clip_delta()):
        found = yardstick.measure(method(episodes.rollouts))
        assert chance["sign"].high < found["sign"].value < 1.0
        assert found["cosine"].value < best["cosine"].value


def test_knobs():
    base = WORLD.episodes(groups=256, size=4, seed=0).rollouts
    off = replace(WORLD, verdict_error=0.4, verifier_error=0.2).episodes(groups=256, size=4, seed=0).rollouts
    sure = replace(WORLD, verdict_error=0.0).episodes(groups=256, size=4, seed=0).rollouts
    for name in ("judge", "label", "process"):
        flipped = off.signals[name].values != sure.signals[name].values
        assert float(flipped.double().mean()) == pytest.approx(0.4, abs=0.03)
    flipped = off.signals["outcome"].values != base.signals["outcome"].values
    assert float(flipped.double().mean()) == pytest.approx(0.2, abs=0.05)
    able = replace(WORLD, skill=6.0)
    assert able.habits(able.table)["accuracy"] > 0.8 > WORLD.habits(WORLD.table)["accuracy"]
    honest = replace(WORLD, gaming=0.0)
    assert honest.habits(honest.table) == WORLD.habits(WORLD.table)  # the scores are seen, they change no rollout


def trained(world, credit, updates=60, rate=4.0):
    """Plain policy gradient on the logits."""
    table = world.table
    for seed in range(updates):
        episodes = world.played(table, groups=world.prompts, size=32, seed=seed)
        slope = episodes.gradients(credit(episodes.rollouts).advantages)
        table = replace(table, logits=table.logits + rate * slope.view_as(table.logits))
    return world.habits(table)


def test_the_sum_of_scores_is_led_astray_where_minimum_and_clip_are_not():
    world = Hackable(prompts=2, work=2, length=6, filler=0)
    summed = trained(world, chain(returns_to_go(reward="process"), whiten()))
    assert summed["accuracy"] < 0.1
    assert summed["empty"] + summed["repeated"] > 2
    for credit in (pure(process="margin"), chain(clip_delta(alpha=1.0), whiten())):
        found = trained(world, credit)
        assert found["accuracy"] > 0.9
        assert found["empty"] + found["repeated"] < 0.3


def test_same_seed_same_episodes_and_the_world_does_not_depend_on_it():
    one, two, other = (WORLD.episodes(groups=4, size=4, seed=s).rollouts for s in (1, 1, 2))
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.signals["process"].values, two.signals["process"].values)
    assert not torch.equal(one.lengths, other.lengths)
    assert torch.equal(Hackable().table.logits, WORLD.table.logits)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"work": 10}, r"work must lie between 1 and length - 1 = 9; got 10\. Leave a step for the answer"),
        ({"filler": -1}, r"filler must be at least 0; got -1"),
        ({"gaming": 1.5}, r"gaming must lie between 0, honest, and 1, gamed; got 1\.5"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Hackable(**knobs)
