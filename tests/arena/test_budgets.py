"""Thinking under budgets: what is sampled is what is known."""

from dataclasses import replace

import pytest
import torch

from apportion import brpo
from apportion.arena._table_student import TableStudent
from apportion.arena.worlds.budgets import Budgets

GROUPS, SIZE = 512, 16


def test_scores_and_outcomes_have_the_exact_means() -> None:
    for world in (Budgets(), Budgets(prior="linear", summaries=2), Budgets(prior="base", budgets=3)):
        episodes = world.episodes(GROUPS, SIZE, seed=0)
        outcome = episodes.rollouts.signals["outcome"].values.view(-1, world.prompts, SIZE).transpose(0, 1).flatten(1)
        error = outcome.std(1) / outcome.shape[1] ** 0.5
        assert bool(((outcome.mean(1) - world.table.values[:, 0, 0]).abs() < 4 * error).all())


def test_the_outcome_is_the_weighed_share_of_right_answers_and_answers_get_better() -> None:
    world = Budgets(prior="linear")
    r = world.episodes(GROUPS, SIZE, seed=0).rollouts
    score = r.signals["score"].values.view(r.batch, world.budgets, 1 + world.summaries)
    assert bool(score[..., 0].isnan().all())
    assert not bool(score[..., 1:].isnan().any())
    right = score[..., 1:].mean(-1)
    torch.testing.assert_close(r.signals["outcome"].values, right @ world.weights)
    assert bool((right.mean(0).diff() > 0).all())


def test_the_expected_advantage_is_0_in_every_state_and_of_filler_always() -> None:
    world = Budgets()
    table = world.table
    mean = (table.policy[:, None] * table.advantages).sum(-1)
    assert float(mean.abs().max()) < 1e-12
    episodes = world.episodes(32, 4, seed=0)
    filler = ~episodes.decisive
    assert float(episodes.advantages[filler].abs().max()) < 1e-12
    assert float(episodes.advantages[~filler].abs().mean()) > 0.01


def test_the_gradient_under_exact_advantages_is_the_exact_one() -> None:
    world = Budgets(prompts=2, length=8, budgets=2)
    episodes = world.episodes(2048, 8, seed=0)
    got = episodes.gradients(episodes.advantages)
    for prompt in range(2):
        of = got[episodes.prompts == prompt]
        error = of.std(0) / len(of) ** 0.5
        off = (of.mean(0) - episodes.gradient[prompt]).abs() / error.clamp(min=1e-12)
        assert float(off.max()) < 5  # the largest of some hundred


def test_answers_are_empty_children_of_the_stretch_before_them() -> None:
    world = Budgets(length=8, budgets=2, summaries=3)
    r = world.episodes(2, 2, seed=0).rollouts
    spans = r.spans["budget"]
    assert spans.parent is not None
    thinking = spans.parent < 0
    assert bool((spans.stop - spans.start == torch.where(thinking, 4, 0)).all())
    of = spans.parent[~thinking]
    assert torch.equal(spans.row[of], spans.row[~thinking])
    assert torch.equal(spans.stop[of], spans.start[~thinking])
    assert bool(brpo()(r).mask.all())


def test_levels_lost_are_the_wrong_steps() -> None:
    world = Budgets(verdict_error=0.0)
    episodes = world.episodes(64, 8, seed=0)
    r = episodes.rollouts
    judged = r.at_tokens(r.signals["judge"])[..., 0] == 1
    first = judged & (judged.cumsum(1) <= world.step)
    assert torch.equal(first, episodes.mistake)
    at = episodes.mistake & episodes.decisive
    assert float(episodes.advantages[at].mean()) < 0


def test_knobs() -> None:
    base = Budgets()
    same, other = (base.episodes(8, 4, seed=s).rollouts.tokens for s in (0, 1))
    assert torch.equal(base.episodes(8, 4, seed=0).rollouts.tokens, same)
    assert not torch.equal(same, other)
    flipped = replace(base, verifier_error=1.0).episodes(64, 8, seed=0).rollouts.signals["outcome"].values
    torch.testing.assert_close(flipped, 1 - base.episodes(64, 8, seed=0).rollouts.signals["outcome"].values)
    skilled = replace(base, skill=3.0).table
    assert float((skilled.values - base.table.values)[:, 0, 0].min()) > 0
    with pytest.raises(ValueError, match="multiple of budgets; got 24 and 5"):
        Budgets(budgets=5)
    with pytest.raises(ValueError, match="at least 1"):
        Budgets(summaries=0)


def test_it_can_be_learned() -> None:
    student = TableStudent(Budgets())
    before = student.evaluate(seed=0)["accuracy"]
    with torch.no_grad():
        student.logits += 3 * (Budgets()._moves > 0).flatten(1, 2)
    assert student.evaluate(seed=0)["accuracy"] > before + 0.1
    assert student.sample(8, 2, seed=0).signals["score"].unit == "budget"
