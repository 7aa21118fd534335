"""Each measure against arithmetic by hand, and where its ends lie."""

import math
from dataclasses import replace

import pytest
import torch

from apportion import Credit, Rollouts, Signal, grpo
from apportion.arena import MEASURES, Episodes, Trees, Yardstick, exact_advantage, random_credit
from apportion.arena._measures import _ranks


def episodes(advantages, *, groups, pairs=None, mistake=None, errors=None, prompts=None) -> Episodes:
    """One token per action; the gradient of a row is its credit times the unit vector of its column."""
    a = torch.tensor(advantages, dtype=torch.float64)
    r = Rollouts.from_lists([[0] * a.shape[1]] * len(a), groups, outcome=[0.0] * len(a), dtype=torch.float64)
    count, ids = r.num_groups, r.group_ids

    def by_group(w):
        return torch.zeros(count, a.shape[1], dtype=torch.float64).index_add_(0, ids, w)

    return Episodes(
        rollouts=r,
        advantages=a,
        errors=None if errors is None else torch.tensor(errors, dtype=torch.float64),
        decisive=a != 0,
        mistake=torch.zeros_like(a, dtype=torch.bool) if mistake is None else torch.tensor(mistake),
        pairs=torch.arange(a.numel()).view_as(a) if pairs is None else torch.tensor(pairs),
        prompts=torch.arange(count) if prompts is None else torch.tensor(prompts),
        gradients=by_group,
        gradient=by_group(a),
    )


def value(e: Episodes, credit, name: str) -> float:
    return (
        Yardstick(e, resamples=20)
        .measure(Credit(torch.tensor(credit, dtype=torch.float64), e.rollouts.action_mask))[name]
        .value
    )


def test_ranks_share_ties():
    got = _ranks(torch.tensor([0.3, 0.1, 0.3, 5.0, -1.0, 0.3 + 1e-12]), torch.tensor([0, 0, 0, 1, 1, 0]))
    assert got.tolist() == [3.0, 1.0, 3.0, 2.0, 1.0, 3.0]


def test_rank_by_hand():
    e = episodes([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], groups=[0, 1])
    assert value(e, [[5.0, 6.0, 9.0], [3.0, 2.0, 1.0]], "rank") == pytest.approx(0.0)  # +1 and -1
    assert value(e, [[5.0, 9.0, 6.0], [5.0, 9.0, 6.0]], "rank") == pytest.approx(0.5)  # 1 - 6 (0+1+1) / (3 x 8)
    assert value(e, [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]], "rank") == pytest.approx(0.5)  # constant credit orders nothing


def test_sign_counts_zero_half_and_decisive_tokens_only():
    e = episodes([[1.0, -1.0, 0.0], [1.0, 1.0, 0.0]], groups=[0, 1])
    assert value(e, [[2.0, 0.0, 7.0], [-1.0, -1.0, 7.0]], "sign") == pytest.approx((0.75 + 0.0) / 2)


def test_sign_leaves_out_what_is_not_known_surely():
    e = episodes([[1.0, -1.0], [1.0, -1.0]], groups=[0, 1], errors=[[0.1, 0.6], [0.1, 0.6]])
    assert value(e, [[1.0, 1.0], [1.0, 1.0]], "sign") == 1.0


def test_auc_and_blame_by_hand():
    mistake = [[False, True, False, False], [False, False, False, False]]
    e = episodes([[0.0] * 4, [0.1] * 4], groups=[0, 1], mistake=mistake)
    credit = [[-1.0, -2.0, -3.0, -2.0], [0.0] * 4]
    assert value(e, credit, "auc") == pytest.approx((1 + 0 + 0.5) / 3)  # below -1, above -3, beside -2
    assert value(e, credit, "blame") == pytest.approx(2 / 8)


def test_bias_and_noise_by_hand():
    """Two choices, each made once in each of two groups. Credit of the first: 1 and 3, of the second: -2 and -2."""
    e = episodes([[1.0, -1.0], [1.0, -1.0]], groups=[0, 1], pairs=[[0, 1], [0, 1]])
    credit = [[1.0, -2.0], [3.0, -2.0]]
    # m^2: 1 x 3 = 3 and 4, mean 3.5; A m: 2 and 2, mean 2; A^2 = 1; squares: (1 + 9)/2 = 5 and 4, mean 4.5; noise 1
    assert value(e, credit, "raw_noise") == pytest.approx(1.0)
    assert value(e, credit, "raw_bias") == pytest.approx(math.sqrt(3.5 - 4 + 1))
    assert value(e, credit, "bias") == pytest.approx(0.0)  # 1 - 4 / 3.5 < 0
    assert value(e, credit, "noise") == pytest.approx((2 / 3.5) ** 2)


def test_a_choice_made_in_one_group_only_says_nothing_about_bias():
    e = episodes([[1.0, -1.0], [1.0, -1.0]], groups=[0, 1])
    assert math.isnan(value(e, [[1.0, 1.0], [1.0, 1.0]], "bias"))


def test_cosine_aim_and_snr_by_hand():
    """Exact gradient (1, 0) for both groups of one prompt; estimated (1, 1) and (1, -1)."""
    e = episodes([[1.0, 0.0], [1.0, 0.0]], groups=[0, 1], prompts=[0, 0])
    credit = [[1.0, 1.0], [1.0, -1.0]]
    assert value(e, credit, "cosine") == pytest.approx(math.sqrt(0.5))
    # (1, 1) . (1, -1) = 0: nothing is known to be signal
    assert value(e, credit, "snr") == pytest.approx(0.0)
    credit = [[1.0, 1.0], [1.0, 0.0]]  # product 1; mean square (2 + 1) / 2, so signal 1 and spread 0.5
    assert value(e, credit, "snr") == pytest.approx(2.0)
    assert value(e, credit, "aim") == pytest.approx(1.0)


def test_a_group_without_credit_has_cosine_zero():
    e = episodes([[1.0, 0.0], [1.0, 0.0]], groups=[0, 1])
    assert value(e, [[0.0, 0.0], [1.0, 0.0]], "cosine") == pytest.approx(0.5)


@pytest.fixture(scope="module")
def trees() -> Episodes:
    return Trees().episodes(groups=208, size=8, seed=0)


def test_the_bars_hold(trees):
    """The exact advantage is best within the interval; random credit is at chance."""
    y = Yardstick(trees, resamples=200)
    exact, chance, usual = (y.measure(m(trees.rollouts)) for m in (exact_advantage(), random_credit(), grpo()))
    for name in ("rank", "sign", "cosine"):
        assert exact[name].high >= usual[name].low
    assert exact["bias"].low <= usual["bias"].high
    assert exact["sign"].value == exact["rank"].value == 1.0
    assert exact["bias"].value == pytest.approx(0.0, abs=1e-4)
    for name, level in (("rank", 0.0), ("sign", 0.5), ("cosine", 0.0), ("auc", 0.5), ("bias", 1.0)):
        margin = 1.5 * (chance[name].high - chance[name].low)
        assert chance[name].value == pytest.approx(level, abs=margin), name


def test_a_scale_changes_what_is_said_to_depend_on_it_only(trees):
    y, credit = Yardstick(trees, resamples=20), grpo()(trees.rollouts)
    one, two = y.measure(credit), y.measure(credit.scaled(3.0, trees.rollouts))
    for name in MEASURES:
        if not name.startswith("raw"):
            assert two[name].value == pytest.approx(one[name].value, abs=1e-9), name
    assert two["raw_noise"].value == pytest.approx(9 * one["raw_noise"].value)


def test_intervals_hold_the_value_and_narrow_with_groups(trees):
    few = Trees().episodes(groups=32, size=8, seed=0)
    wide, narrow = (Yardstick(e, 200).measure(grpo()(e.rollouts)) for e in (few, trees))
    for name in ("rank", "sign", "cosine"):
        assert narrow[name].low <= narrow[name].value <= narrow[name].high
        assert narrow[name].high - narrow[name].low < wide[name].high - wide[name].low


def test_intervals_cover_as_often_as_they_say():
    """Over 40 seeds, the 95 % interval of a mean over 64 groups misses what 6,400 groups give a few times at most."""
    world = Trees(prompts=2, length=4, decisions=2)
    big = world.episodes(groups=6400, size=4, seed=999)
    want = Yardstick(big, resamples=2)._sign(grpo()(big.rollouts).advantages.double())
    level = want[~want.isnan()].mean().item()
    missed = 0
    for seed in range(40):
        e = world.episodes(groups=64, size=4, seed=seed)
        found = Yardstick(e, resamples=200).measure(grpo()(e.rollouts))["sign"]
        missed += not found.low <= level <= found.high
    assert missed <= 6


def test_nan_credit_and_a_single_group_are_refused(trees):
    bad = Credit(torch.full_like(trees.advantages, torch.nan), trees.rollouts.action_mask)
    with pytest.raises(ValueError, match="finite"):
        Yardstick(trees, 2).measure(bad)
    with pytest.raises(ValueError, match="at least two groups"):
        Yardstick(Trees().episodes(1, 4, 0))


def test_the_truth_does_not_depend_on_credit_outside_actions(trees):
    r = trees.rollouts
    late = replace(
        trees, rollouts=r.replace(signals={**r.signals, "noise": Signal(torch.zeros_like(trees.advantages), "token")})
    )
    assert torch.equal(late.rollouts.signals["exact"].values, trees.advantages)
