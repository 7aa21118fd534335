"""Claims that need learning, loops or trees: their mechanics, and what mathematics makes certain."""

from dataclasses import replace

import pytest
import torch

from apportion import gigpo, grpo, psr
from apportion.arena import Estimate, exact_advantage, random_credit
from apportion.arena._learning import Curve
from apportion.arena.claims import Claim
from apportion.arena.claims import _branch_grpo as branch
from apportion.arena.claims import _exploration as exploration
from apportion.arena.claims import _ma_rlhf as ma
from apportion.arena.claims import _nsr as nsr_claims
from apportion.arena.claims._coverage import TRIES, WORLDS, OnePolicy, course, level_of_both, pass_at, when
from apportion.arena.claims._gigpo import gigpo_finds_waste, separation
from apportion.arena.worlds.denoising import Denoising
from apportion.arena.worlds.rooms import Rooms
from apportion.credit import Estimator
from apportion.signals import fixed_ngrams

SMALL = replace(WORLDS["hard problems"], prompts=4, length=3)


# ---- one policy for many problems -------------------------------------------------------------------------------------


def test_one_policy_is_one_table_that_every_prompt_trains():
    student = OnePolicy(SMALL, seed=0)
    rollouts = student.sample(groups=8, size=4, seed=1)
    logprobs = student.logprobs(rollouts)
    torch.testing.assert_close(logprobs.detach(), rollouts.logprobs)
    (gradient,) = torch.autograd.grad(logprobs.sum(), student.parameters())
    assert gradient.shape == (1, *SMALL.table.logits.shape[1:])
    pushed = torch.zeros_like(gradient[0]).index_put_(
        (torch.zeros(8 * 4, dtype=torch.int64), rollouts.tokens[:, 0]),
        torch.tensor(1.0, dtype=torch.float64),
        accumulate=True,
    )
    expected = pushed[0] - 32 * student.table.policy[0, 0]  # the first state of all prompts
    torch.testing.assert_close(gradient[0, 0], expected)


def test_what_it_finds_is_what_sampling_finds():
    student = OnePolicy(SMALL, seed=0)
    outcome = student.sample(groups=4, size=4000, seed=2).signals["outcome"].values
    found = student.evaluate(seed=0)
    error = (outcome.var() / len(outcome)).sqrt()
    assert abs(float(outcome.mean()) - found["accuracy"]) < 4 * float(error)
    by_hand = 1 - (1 - student.table.values[:, 0, 0]) ** TRIES
    assert found[f"pass@{TRIES}"] == pytest.approx(float(by_hand.mean()), abs=1e-12)
    assert pass_at(student.table, 1) == pytest.approx(found["accuracy"], abs=1e-12)
    other = OnePolicy(replace(SMALL, length=1, decisions=1), seed=0)
    entropy = float(torch.distributions.Categorical(other.table.policy[0, 0]).entropy())
    assert other.evaluate(0)["planning entropy"] == pytest.approx(entropy, abs=1e-12)


def test_it_begins_elsewhere_for_every_seed_and_the_same_for_one():
    first, again, other = OnePolicy(SMALL, 3), OnePolicy(SMALL, 3), OnePolicy(SMALL, 4)
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, other.logits)
    torch.testing.assert_close(first.table.logits[0], first.table.logits[-1])


def test_held_out_problems_are_others():
    for world in WORLDS.values():
        student = OnePolicy(world, seed=0)
        tried, held_out = ((t.reward > 0).flatten(1) for t in (student.world.table, student.held_out))
        same = (tried[:, None] == held_out).all(-1)
        assert float(same.double().mean()) < 0.002  # two of the easy problems may accept the same few choices


def test_training_leaves_the_start_alone():
    student = OnePolicy(SMALL, seed=0)
    before = student.world.table.logits.clone()
    with torch.no_grad():
        student.logits += 1
    assert torch.equal(student.world.table.logits, before)


def test_psr_and_nsr_follow_the_same_gradient_on_average():
    """Outcomes 1 and 0, or 0 and -1: a constant between them, whose score is 0 on average. Here to rounding, by enumeration."""
    table = replace(SMALL, prompts=1).table
    horizon, choices = table.horizon, table.logits.shape[-1]
    actions = torch.cartesian_prod(*[torch.arange(choices)] * horizon)
    at, logits = torch.zeros(len(actions), dtype=torch.int64), table.logits[0].clone().requires_grad_()
    logprob, outcome = torch.zeros(len(actions), dtype=torch.float64), torch.zeros(len(actions), dtype=torch.float64)
    for h in range(horizon):
        logprob = logprob + logits[at].log_softmax(-1)[torch.arange(len(at)), actions[:, h]]
        outcome += table.reward[0, at, actions[:, h]]
        at = table.follows[0, at, actions[:, h]].clamp(min=0)
    chance = logprob.detach().exp()
    right, wrong = (
        torch.autograd.grad((chance * weight * logprob).sum(), logits, retain_graph=True)[0]
        for weight in (outcome, outcome - 1)
    )
    torch.testing.assert_close(right, wrong)
    torch.testing.assert_close(right.flatten(), table.gradient[0])


def test_courses_have_every_mark_and_repeat():
    found = course(SMALL, psr(), 0, 10)
    assert len(found) == 11
    assert found == course.__wrapped__(SMALL, psr(), 0, 10)
    assert found[0]["accuracy"] < found[-1]["accuracy"]


def test_equal_accuracy_is_read_between_marks():
    a = [{"accuracy": 0.2, "x": 1.0}, {"accuracy": 0.1, "x": 0.9}, {"accuracy": 0.5, "x": 0.5}]
    b = [{"accuracy": 0.2, "x": 1.0}, {"accuracy": 0.4, "x": 0.8}]
    assert level_of_both(a, b) == 0.4
    assert when(a, 0.4, "x") == pytest.approx(0.6)
    assert when(b, 0.4, "x") == 0.8
    assert when(b, 0.1, "x") == 1.0
    with pytest.raises(ValueError, match=r"never came to 0\.6"):
        when(a, 0.6, "x")


def test_claims_of_learning_count_both_worlds(monkeypatch: pytest.MonkeyPatch):
    for name, world in WORLDS.items():
        monkeypatch.setitem(WORLDS, name, replace(world, prompts=4))
    monkeypatch.setattr(nsr_claims, "_size", lambda quick: (2, 10))
    monkeypatch.setattr(exploration, "_size", lambda quick: (2, 10))
    for claim in (
        nsr_claims.nsr_loses_less_than_psr,
        nsr_claims.nsr_keeps_pass_at_k,
        exploration.hicra_keeps_plans_open,
        exploration.ucas_keeps_exploring,
    ):
        found = claim(quick=True)
        check(found)
        assert all(any(world in name for name in found.numbers) for world in WORLDS)


def test_attention_rhythm_is_judged_by_accuracy_and_its_placebo_reads_noise(monkeypatch: pytest.MonkeyPatch):
    assert {"signals.waad", "signals.fai"} <= set(exploration._RHYTHMS["attention rhythm"].requires)
    placebo = set(exploration._RHYTHMS["random numbers"].requires)
    assert "signals.noise" in placebo
    assert not {"signals.waad", "signals.fai"} & placebo

    def verdict(gain: float, placebo: float) -> str:
        """Of curves that end so much above GRPO's."""

        def sums(method: Estimator, seed: int, tokens: int) -> Curve:
            name = next(n for n, m in exploration._RHYTHMS.items() if m is method)
            end = 0.5 + {"GRPO": 0.0, "attention rhythm": gain, "random numbers": placebo}[name] + 0.01 * seed
            return Curve((0, tokens), (0.5, end), *[(0.0, 0.0)] * 3)

        monkeypatch.setattr(exploration, "_sums", sums)
        found = exploration.attention_rhythm_learns_faster()
        check(found)
        assert found.numbers["mean accuracy over GRPO"].value == pytest.approx(gain / 2)
        assert found.numbers["mean accuracy over random numbers"].value == pytest.approx((gain - placebo) / 2)
        return found.verdict

    assert verdict(0.1, 0.0) == "shown"
    assert verdict(0.1, 0.2) == "not shown"
    assert verdict(-0.1, -0.2) == "contradicted"


# ---- macro actions ----------------------------------------------------------------------------------------------------


def test_steps_of_the_world_are_the_papers_macro_actions():
    rollouts = replace(SMALL, length=11, step=5).episodes(4, 2, 0).rollouts
    ours, theirs = rollouts.spans["step"], fixed_ngrams(5)(rollouts)
    assert torch.equal(ours.start, theirs.start)
    assert torch.equal(ours.stop, theirs.stop)


def test_saved_is_a_share_of_the_baselines_tokens():
    def curve(*accuracy: float) -> Curve:
        return Curve((0, 100, 200), accuracy, *[(0.0,) * 3] * 3)

    slow = {0: curve(0.0, 0.35, 0.7), 1: curve(0.0, 0.35, 0.7)}  # 200 tokens
    fast = {0: curve(0.0, 0.7, 0.7), 1: curve(0.0, 0.7, 0.7)}
    never = {0: curve(0.0, 0.0, 0.0), 1: curve(0.0, 0.0, 0.0)}
    assert ma._saved(slow, fast) == Estimate(0.5, 0.5, 0.5)
    assert ma._saved(fast, slow).value == -1.0
    assert ma._saved(slow, never).value == 0.0  # a lower bound of what it needs: never better than it is


def test_macro_actions_learn_in_a_small_world():
    world = replace(SMALL, step=3)
    curves = ma._curves(world, ma._MACRO_ACTIONS, seeds=1, steps=4)
    assert list(curves) == [0]
    assert len(curves[0].tokens) == 3


def test_looking_as_far_ahead_is_the_gain_where_the_critic_says_nothing():
    over = {
        name: ma._cosine_with_a_blind_critic(m, groups=64)
        for name, m in (("near", ma._TOKENS), ("far", ma._OTHERS[ma._AS_FAR]))
    }
    assert over["near"].low > 0
    assert abs(over["far"].value) < over["near"].value / 4


# ---- loops ------------------------------------------------------------------------------------------------------------


def test_separation_is_one_for_the_truth_and_a_half_for_grpo_inside_a_rollout():
    episodes = Rooms().episodes(groups=24, size=4, seed=0)
    r = episodes.rollouts
    for among in ("rollout", "state"):
        known = separation(episodes, exact_advantage()(r), among)
        assert bool((known[~known.isnan()] == 1).all())
        chance = separation(episodes, random_credit()(r), among).nanmean()
        assert abs(float(chance) - 0.5) < 0.05
    same = separation(episodes, grpo()(r), "rollout")
    assert bool((same[~same.isnan()] == 0.5).all())


def test_separation_by_hand():
    episodes = Rooms(prompts=1).episodes(groups=2, size=2, seed=0)
    r, turns = episodes.rollouts, episodes.rollouts.spans["turn"]
    credit = gigpo(r)
    group, at = r.group_ids[turns.row], (turns.row, turns.stop - 1)
    exact, given = episodes.advantages[at].tolist(), credit.advantages[at].tolist()
    states = turns.state.tolist()
    for g in range(2):
        mine = [i for i in range(len(states)) if int(group[i]) == g]
        pairs = [(i, j) for i in mine for j in mine if states[i] == states[j] and exact[i] > 0 > exact[j]]
        won = [
            1.0 if given[i] > given[j] + 1e-9 else 0.5 if abs(given[i] - given[j]) <= 1e-9 else 0.0 for i, j in pairs
        ]
        assert float(separation(episodes, credit, "state")[g]) == pytest.approx(sum(won) / len(won), abs=1e-6)


def test_gigpo_claim():
    found = gigpo_finds_waste(quick=True)
    check(found)
    inside = found.numbers["separation inside a rollout"].value
    assert found.numbers["separation over 1/2 inside a rollout"].value == pytest.approx(inside - 0.5)


# ---- trees of paths ---------------------------------------------------------------------------------------------------


def test_along_paths_is_grpo_where_nothing_is_shared():
    r = Denoising(forks=()).episodes(groups=4, size=8, seed=0).rollouts
    torch.testing.assert_close(branch.along_paths()(r).advantages, grpo()(r).advantages)
    torch.testing.assert_close(branch.counted_once(r, grpo()(r)).advantages, grpo()(r).advantages)


def test_a_shared_step_has_the_mean_of_its_paths_and_counts_for_each():
    episodes = Denoising().episodes(groups=4, size=16, seed=0)
    r, whole = episodes.rollouts, grpo()(episodes.rollouts).parts["outcome"].values.view(4, 16)
    shared = branch.along_paths()(r)
    first = shared.advantages.view(4, 16, -1)[:, ::4, 0]  # four paths leave the start, in rows 0, 4, 8, 12
    torch.testing.assert_close(first, whole.view(4, 4, 4).mean(-1))
    ones = exact_advantage()(r).replaced(torch.ones_like(episodes.advantages), "one")
    once = branch.counted_once(r, ones).advantages.view(4, 16, -1)
    assert once[0, 0].tolist() == [0.25, 0.25, 0.5, 0.5, 1, 1, 1, 1]
    for world in branch._WORLDS.values():
        assert world.sampled(branch._TREE) % world.length == 0


def test_branch_claim_and_its_rule():
    up, down, open_ = Estimate(1, 0.5, 2), Estimate(-1, -2, -0.5), Estimate(0.1, -1, 1)
    assert branch._verdict(up, up) == "shown"
    assert branch._verdict(down, down) == "contradicted"
    assert {branch._verdict(up, down), branch._verdict(up, open_), branch._verdict(down, open_)} == {"not shown"}
    check(branch.branch_grpo_beats_uniform(quick=True))


def check(claim: Claim) -> None:
    """What every claim should be."""
    assert claim.verdict in ("shown", "not shown", "contradicted")
    assert claim.source.startswith("arXiv ")
    for x in claim.numbers.values():
        check_estimate(x)
    assert "nan" not in claim.because
    assert claim.because.endswith(".")


def check_estimate(x: Estimate) -> None:
    assert x.low - 1e-12 <= x.value <= x.high + 1e-12
