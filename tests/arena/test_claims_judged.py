"""Claims about CAPO, TEMPO, PURE, Clip and Delta, and BRPO: what they measure, and the verdicts that are certain."""

from dataclasses import replace

import pytest
import torch

from apportion import brpo, capo, grpo, tempo
from apportion.arena import Estimate, Trees, Yardstick
from apportion.arena.claims import CLAIMS, Claim, _bounded, _brpo, _capo, _hacking, _pure, _tempo, decide, mean_of
from apportion.arena.worlds.budgets import Budgets
from apportion.arena.worlds.hackable import KINDS
from apportion.credit import Estimator, bounded_return, chain, process_min, whiten

SAME = 1e-12


def test_a_claim_is_shown_only_if_every_interval_lies_above_0() -> None:
    above, across, below = Estimate(1.0, 0.5, 1.5), Estimate(0.1, -0.1, 0.3), Estimate(-1.0, -1.5, -0.5)
    assert decide(above, above) == "shown"
    assert decide(above, across) == "not shown"
    assert decide(above, across, below) == "contradicted"
    assert decide(Estimate(0.0, 0.0, 0.0)) == "not shown"


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    values = torch.randn(400, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [mean_of(row, resamples=400) for row in values]
    covered = sum(e.low <= 0 <= e.high for e in found) / len(found)
    assert 0.91 <= covered <= 0.98
    assert mean_of([1.0, float("nan"), 3.0]).value == 2.0
    with pytest.raises(ValueError, match="at least two values; got 1"):
        mean_of([1.0, float("nan")])


def test_every_claim_is_listed_once_and_says_its_rule() -> None:
    assert len(set(CLAIMS)) == len(CLAIMS)
    for module in (_bounded, _brpo, _capo, _pure, _tempo):
        listed = [c for c in CLAIMS if c.__module__ == module.__name__]
        assert listed, module
        assert all("Rule: " in c.__doc__ or "As `" in c.__doc__ for c in listed if c.__doc__)


def test_the_difference_of_two_credits_is_the_difference_of_their_measures() -> None:
    yardstick = Yardstick(Trees().episodes(groups=16, size=4, seed=0), resamples=50)
    r = yardstick.episodes.rollouts
    one, other = capo()(r), grpo()(r)
    both = yardstick.difference(one, other)
    for name, x in yardstick.measure(one).items():
        assert both[name].value == pytest.approx(x.value - yardstick.measure(other)[name].value, abs=SAME)
    assert all(e == Estimate(0.0, 0.0, 0.0) for e in yardstick.difference(one, one).values())


# ---- CAPO -------------------------------------------------------------------------------------------------------------


def test_with_a_perfect_judge_wrong_steps_get_less_than_the_others_of_their_response() -> None:
    r = Trees(verdict_error=0.0).episodes(groups=32, size=8, seed=0).rollouts
    got = capo()(r).advantages
    wrong = r.at_tokens(r.signals["judge"])[..., 0] == 1
    some = wrong.any(1) & (~wrong).any(1) & (got.abs().amax(1) > 0)
    assert int(some.sum()) > 50
    worst_clean = torch.where(wrong, torch.inf, got).amin(1)
    best_wrong = torch.where(wrong, got, -torch.inf).amax(1)
    assert bool((best_wrong < worst_clean)[some].all())


def test_votes_of_a_perfect_judge_say_what_one_critique_says() -> None:
    r = Trees(verdict_error=0.0).episodes(groups=8, size=4, seed=0).rollouts
    single = _capo._first_critique(r)
    assert single.signals["judge"].values.shape[1] == 1
    assert all(torch.equal(capo(vote=v)(r).advantages, capo()(single).advantages) for v in ("majority", "union"))


def test_capo_localises_at_every_flip_rate() -> None:
    found = _capo.capo_localises(quick=True)
    assert len(found.numbers) == 4 * 5
    assert min(x.low for name, x in found.numbers.items() if name.startswith("auc")) > 0


# ---- TEMPO ------------------------------------------------------------------------------------------------------------


def test_branches_are_where_fewer_responses_share_the_beginning() -> None:
    tokens = torch.tensor([[[1, 2, 3], [1, 2, 4], [1, 5, 4]], [[1, 2, 3]] * 3])
    assert _tempo.branches(tokens).int().tolist() == [
        [[0, 1, 1], [0, 1, 1], [0, 1, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]


def test_tempo_is_grpo_off_the_branches() -> None:
    assert _tempo.tempo_is_grpo(quick=True).verdict == "shown"


def test_the_share_of_credit_on_decisive_tokens() -> None:
    episodes = Trees().episodes(groups=4, size=4, seed=0)  # 3 of 12 tokens
    share = _tempo.share_on_decisive(episodes, grpo()(episodes.rollouts))
    torch.testing.assert_close(share[~share.isnan()], torch.full_like(share[~share.isnan()], 0.25))
    only = tempo()(episodes.rollouts)
    only = replace(only, advantages=torch.where(episodes.decisive, 1.0, 0.0).double())
    assert _tempo.share_on_decisive(episodes, only).tolist() == [1.0] * 4


def test_tempo_has_nothing_to_say_of_decisions_behind_filler() -> None:
    """Nine tokens of filler make nearly every response its own branch before the first decision."""
    found = _tempo.tempo_credits_late_decisions(quick=True)
    assert found.numbers["share of decisive tokens that TEMPO changes, groups of 16"].high < 0.01
    assert found.numbers["mass over GRPO, groups of 8"].high < 0


# ---- PURE, Clip and Delta ---------------------------------------------------------------------------------------------


def test_repeating_a_step_pays_under_the_raw_form_alone() -> None:
    assert _bounded.largest_gain("raw") == pytest.approx(1.0, abs=SAME)
    assert all(abs(_bounded.largest_gain(form)) <= SAME for form in ("clip", "delta", "clip_delta"))
    assert _bounded.clip_and_delta_bound_repeats(quick=True).verdict == "shown"


def test_from_any_step_delta_adds_up_to_its_score_and_from_the_last_to_0() -> None:
    """Why Delta alone does not stop padding: before the answer one more step of full score always pays."""
    r = _hacking.WORLD.episodes(groups=4, size=4, seed=0).rollouts
    got = bounded_return(form="delta", alpha=1.0)(r).advantages - r.at_tokens(r.signals["outcome"])
    steps, scores = r.spans["step"], r.signals["process"].values
    last = torch.cat([steps.row[1:] != steps.row[:-1], torch.tensor([True])])
    torch.testing.assert_close(got[steps.row, steps.start], torch.where(last, 0.0, scores))


def test_the_forms_that_are_compared_differ_in_minimum_and_sum() -> None:
    r = _hacking.WORLD.episodes(groups=4, size=4, seed=0).rollouts
    strict = process_min(temperature=None, coef=0.0, process="margin")(r).parts["margin"].values
    raw = bounded_return(form="raw", alpha=1.0, process="margin")(r).parts["margin"].values
    margin, rows = r.signals["margin"].values, r.spans["step"].row
    for row in range(r.batch):
        assert strict[row, 0] == margin[rows == row].min()
        assert raw[row, 0] == pytest.approx(float(margin[rows == row].sum()), abs=SAME)


def test_habits_are_those_of_the_policy_after_training() -> None:
    credit: Estimator = chain(bounded_return(form="raw", alpha=1.0), whiten(over="group"))
    (one,) = _hacking.habits_after(credit, 1, 4_000)
    before = _hacking.WORLD.habits(_hacking.WORLD.table)
    assert set(one) == {*KINDS, "accuracy"}
    assert one["empty"] + one["repeated"] > before["empty"] + before["repeated"]
    assert 0 < _hacking.padding(one) < 1
    _hacking.habits_after.cache_clear()
    assert _hacking.habits_after(credit, 1, 4_000) == [one]


# ---- BRPO -------------------------------------------------------------------------------------------------------------


def test_the_group_baseline_alone_is_brpo_without_its_own_progress() -> None:
    world = Budgets()
    episodes = world.episodes(groups=8, size=4, seed=0)
    r = episodes.rollouts
    ours, group = brpo()(r), _brpo.above_group(episodes, world).advantages
    own_share = (torch.arange(r.width) // 6) / 4
    torch.testing.assert_close(r.at_tokens(ours.parts["group"]), (1 - own_share) * group)
    torch.testing.assert_close(ours.advantages[:, :6], group[:, :6])


def test_a_scale_saves_no_variance_and_noise_costs_some() -> None:
    episodes = Budgets().episodes(groups=64, size=4, seed=0)
    r = episodes.rollouts
    ours = brpo()(r)
    double = replace(ours, advantages=2 * ours.advantages)
    torch.testing.assert_close(_brpo.saved(episodes, double, ours), torch.zeros(64, dtype=torch.float64))
    noisy = replace(ours, advantages=ours.advantages + r.signals["noise"].values)
    assert float(_brpo.saved(episodes, noisy, ours).mean()) < 0
    exact = replace(ours, advantages=episodes.advantages)
    assert float(_brpo.saved(episodes, exact, ours).mean()) > 0.5


def test_brpo_claims_compare_budgets() -> None:
    found = [_brpo.brpo_lowers_variance(quick=True), _brpo.brpo_helps_long_thinking(quick=True)]
    assert all(isinstance(c, Claim) and c.verdict in ("shown", "not shown", "contradicted") for c in found)
    assert found[0].numbers["variance saved, to GRPO"].low > 0  # scores that are past are noise to GRPO
    assert all(e.low <= e.value <= e.high for c in found for e in c.numbers.values())
