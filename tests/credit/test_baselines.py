import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Credit, Rollouts, Signal, gpg, group_relative, max_rl, opo, pass_at_k, remax
from reference.batches import random_batch
from reference.loops import Episode, blank, deviation, episodes, mean, put, table_of

NAN = float("nan")
SEEDS = st.integers(0, 2**32 - 1)
tried = settings(max_examples=25, deadline=None)


def of(outcome, groups=None, lengths=None, dtype=torch.float64, greedy=None) -> Rollouts:
    """One response for each reward, of one token or of the given length."""
    tokens = [[5] * n for n in lengths or [1] * len(outcome)]
    r = Rollouts.from_lists(tokens, groups or [0] * len(outcome), outcome=outcome, dtype=dtype)
    return r if greedy is None else r.with_signals(greedy_outcome=Signal(torch.tensor(greedy, dtype=dtype), "group"))


def numbers(credit: Credit) -> list[float]:
    return [round(x, 4) for x in credit.advantages[:, 0].tolist()]


@pytest.mark.parametrize(
    ("method", "want"),
    [
        (opo(), [0.75, -0.25]),  # of equal lengths the mean
        (max_rl(), [3.0, -1.0]),
        (gpg(), [3.0, -1.0]),  # one of four has a reward: three quarters, four times
        (gpg(valid="informative"), [0.75, -0.25]),
        (gpg(f_norm=2.0), [1.5, -0.5]),
        (pass_at_k(), [2.0, 0.0]),  # (1 - 0) over the sample deviation 1/2
        (pass_at_k(norm_by_std=False), [1.0, 0.0]),
        (pass_at_k(ddof=0), [2.3094, 0.0]),  # over sqrt(3) / 4
    ],
    ids=repr,
)
def test_one_success_of_four(method, want):
    assert numbers(method(of([1, 0, 0, 0])))[:2] == want
    assert numbers(method(of([1, 0, 0, 0], dtype=torch.float32)))[:2] == want


@pytest.mark.parametrize("method", [opo(), max_rl(), gpg(), gpg(valid="informative"), pass_at_k()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_groups(method, dtype):
    """Twelve equal rewards and a lone one: nothing; an unmeasured one: as if it were not there, and not counted."""
    assert (method(of([0.99] * 12, dtype=dtype)).advantages == 0).all()
    assert numbers(method(of([0.5, 1, 0], [0, 1, 1], dtype=dtype)))[0] == 0
    with_it, without = method(of([1, NAN, 0, 0], dtype=dtype)), method(of([1, 0, 0], dtype=dtype))
    torch.testing.assert_close(with_it.advantages[[0, 2, 3]], without.advantages, rtol=0, atol=0)
    assert with_it.advantages[1, 0] == 0
    assert with_it.mask[:, 0].tolist() == [True, False, True, True]
    assert method.needs_group_of == 2


# ---- opo ------------------------------------------------------------------------------------------------------------


def test_opo_weighs_by_length():
    """Rewards 1 and 0, of one token and three: baseline 1/4. The tokens' advantages sum to 0."""
    credit = opo(of([1, 0], lengths=[1, 3]))
    assert credit.advantages.tolist() == [[0.75, 0, 0], [-0.25, -0.25, -0.25]]
    assert credit.advantages.sum() == 0


def test_opo_counts_actions_of_all_rows_and_an_empty_response_not_at_all():
    """Actions 1 + 2 and 1; the prompt's token is none; the empty response has no weight."""
    r = Rollouts.from_lists(
        [[9, 5], [5, 5], [6], []],
        [0] * 4,
        trajectories=["a", "a", "b", "c"],
        action_mask=[[False, True], [True, True], [True], []],
        outcome=[1, 0, 7],
        dtype=torch.float64,
    )
    assert opo(r).advantages.tolist() == [[0, 0.25], [0.25, 0.25], [-0.75, 0], [0, 0]]


def test_opo_as_in_verl_keeps_a_lone_reward():
    assert numbers(opo(of([0.5, 1, 0], [0, 1, 1]), singleton="raw")) == [0.5, 0.5, -0.5]
    assert opo(singleton="raw").needs_group_of == 1


# ---- max_rl ---------------------------------------------------------------------------------------------------------


def test_max_rl_divides_by_the_share_of_successes():
    """For 0/1 rewards with K of n right: (n - K) / K for the right, -1 for the wrong; nothing without a success."""
    assert numbers(max_rl(of([1, 1, 0, 0, 0, 0, 0, 0]))) == [3.0] * 2 + [-1.0] * 6
    assert numbers(max_rl(of([0, 0]))) == [0, 0]
    assert numbers(max_rl(of([-1, 0]))) == [0, 0]


# ---- remax ----------------------------------------------------------------------------------------------------------


def test_remax_subtracts_the_greedy_reward():
    credit = remax(of([1, 0, 0.5], [0, 0, 1], greedy=[0.75, 0.5]))
    assert numbers(credit) == [0.25, -0.75, 0.0]
    assert credit.parts["outcome"].values.tolist() == [1, 0, 0.5]
    assert credit.parts["greedy_outcome"].values.tolist() == [-0.75, -0.5]
    assert remax().needs_group_of == 1


def test_remax_leaves_out_what_lacks_either_reward():
    credit = remax(of([1, NAN, 0.5], [0, 0, 1], greedy=[0.75, NAN]))
    assert numbers(credit) == [0.25, 0.0, 0.0]
    assert credit.mask[:, 0].tolist() == [True, False, False]
    assert credit.notes["unmeasured"] == 2


def test_remax_needs_one_greedy_reward_per_group():
    r = of([1, 0]).with_signals(greedy_outcome=Signal(torch.zeros(2), "trajectory"))
    with pytest.raises(ValueError, match=r"with one value per group; got unit 'trajectory' and shape \[2\]\. Measure"):
        remax(r)
    with pytest.raises(ValueError, match=r'needs rollouts\.signals\["greedy_outcome"\], which this batch lacks'):
        remax(of([1, 0]))


# ---- gpg ------------------------------------------------------------------------------------------------------------


def test_gpg_grows_what_is_left_of_the_batch():
    """Two of six have a reward; four of six are in the group with a difference."""
    r = of([1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1])
    assert numbers(gpg(r)) == [1.5, -0.5, -0.5, -0.5, 0, 0]
    assert gpg(r).notes["valid"] == 0.5
    assert numbers(gpg(r, valid="informative")) == [1.125, -0.375, -0.375, -0.375, 0, 0]


def test_gpg_without_a_valid_trajectory():
    assert numbers(gpg(of([0, 0]))) == [0, 0]
    assert numbers(gpg(of([1, 1]), valid="informative")) == [0, 0]


def test_gpg_as_in_verl_keeps_a_lone_reward():
    """All three of three have one of 0.5, 1 and 0 but the last: times 3/2."""
    assert numbers(gpg(of([0.5, 1, 0], [0, 1, 1]), singleton="raw")) == [0.75, 0.75, -0.75]
    assert gpg(singleton="raw").needs_group_of == 1


def test_gpg_refuses_to_divide_by_0():
    with pytest.raises(ValueError, match=r"gpg needs f_norm other than 0; got 0\."):
        gpg(of([1, 0]), f_norm=0.0)


# ---- pass_at_k ------------------------------------------------------------------------------------------------------


def test_only_the_single_best_is_paid_and_ties_are_not():
    assert numbers(pass_at_k(of([0.25, 1, 0.75]), norm_by_std=False)) == [0, 0.25, 0]
    assert numbers(pass_at_k(of([1, 1, 0]), norm_by_std=False)) == [0, 0, 0]
    assert numbers(pass_at_k(of([1, 1, 0]))) == [0, 0, 0]
    assert numbers(pass_at_k(of([-1, -3]), norm_by_std=False)) == [2, 0]
    assert numbers(pass_at_k(of([1, NAN, 0.5, 0], [0, 0, 0, 1]), norm_by_std=False)) == [0.5, 0, 0, 0]


# ---- agreement with plain loops -------------------------------------------------------------------------------------


def by_group(r: Rollouts) -> list[tuple[list[Episode], list[Episode]]]:
    """(the measured episodes of a group, those of the batch)."""
    measured = [e for e in episodes(r) if not math.isnan(e.outcome)]
    return [([e for e in measured if e.group == g], measured) for g in sorted({e.group for e in measured})]


def table_from(r: Rollouts, advantages) -> torch.Tensor:
    table = blank(r)
    for group, batch in by_group(r):
        for e, a in zip(group, advantages(group, batch), strict=True):
            put(table, e.actions, [a] * len(e.actions))
    return table_of(table, r)


def same(got: Credit, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.advantages, want, rtol=1e-9, atol=1e-9)


@given(seed=SEEDS, singleton=st.sampled_from(["zero", "raw"]))
@tried
def test_opo(seed, singleton):
    r = random_batch(seed)

    def loop(group, batch):
        if len(group) == 1:
            return [group[0].outcome if singleton == "raw" else 0.0]
        total = sum(len(e.actions) for e in group)
        baseline = sum(len(e.actions) * e.outcome for e in group) / total if total else 0.0
        return [e.outcome - baseline for e in group]

    same(opo(r, singleton=singleton), table_from(r, loop))


@given(seed=SEEDS)
@tried
def test_remax(seed):
    r = random_batch(seed)
    greedy = r.signals["greedy_outcome"].values.tolist()

    def loop(group, batch):
        base = greedy[group[0].group]
        return [0.0 if math.isnan(base) else e.outcome - base for e in group]

    same(remax(r), table_from(r, loop))


@pytest.mark.parametrize("valid", ["nonzero", "informative"])
@given(seed=SEEDS, singleton=st.sampled_from(["zero", "raw"]))
@tried
def test_gpg(seed, valid, singleton):
    r = random_batch(seed)

    def loop(group, batch):
        useful = {g for g in {e.group for e in batch} if len({e.outcome for e in batch if e.group == g}) > 1}
        count = sum(e.outcome != 0 if valid == "nonzero" else e.group in useful for e in batch)
        alpha = len(batch) / max(count, 1) / 0.5
        if len(group) == 1:
            return [alpha * group[0].outcome if singleton == "raw" else 0.0]
        return [alpha * (e.outcome - mean([k.outcome for k in group])) for e in group]

    same(gpg(r, valid=valid, singleton=singleton, f_norm=0.5), table_from(r, loop))


@given(seed=SEEDS, norm=st.booleans(), ddof=st.sampled_from([0, 1]))
@tried
def test_pass_at_k(seed, norm, ddof):
    r = random_batch(seed)

    def loop(group, batch):
        out = []
        for i, e in enumerate(group):
            others = [k.outcome for j, k in enumerate(group) if j != i]
            gain = max([e.outcome, *others]) - max(others) if others else 0.0
            out.append(gain / (deviation([k.outcome for k in group], ddof) + 1e-6) if norm and gain else gain)
        return out

    same(pass_at_k(r, norm_by_std=norm, ddof=ddof), table_from(r, loop))


@given(seed=SEEDS)
@tried
def test_max_rl(seed):
    r = random_batch(seed)

    def loop(group, batch):
        m = mean([e.outcome for e in group])
        return [(e.outcome - m) / m if m > 0 else 0.0 for e in group]

    same(max_rl(r), table_from(r, loop))


def test_aliases_are_settings_of_group_relative():
    assert opo() == group_relative(baseline="length_weighted", scale=None)
    assert max_rl() == group_relative(scale="mean", eps=0.0)
