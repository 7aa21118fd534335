import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Credit, Rollouts, Signal, chain, decoupled_relative, gdpo, group_relative, grpo, whiten
from reference.batches import random_batch
from reference.loops import blank, deviation, episodes, mean, put, table_of

NAN = float("nan")
SEEDS = st.integers(0, 2**32 - 1)
tried = settings(max_examples=25, deadline=None)
DIALECTS = {"gdpo": gdpo(), "trl": gdpo.trl(), "verl": gdpo.verl(), "nemo": gdpo.nemo()}
every = pytest.mark.parametrize(("name", "method"), DIALECTS.items(), ids=DIALECTS)


def of(outcome, style, groups=None, lengths=None, dtype=torch.float64) -> Rollouts:
    """One response for each pair of rewards, of one token or of the given length."""
    tokens = [[5] * n for n in lengths or [1] * len(outcome)]
    r = Rollouts.from_lists(tokens, groups or [0] * len(outcome), outcome=outcome, dtype=dtype)
    return r.with_signals(format=Signal(torch.tensor(style, dtype=dtype), "trajectory"))


def numbers(credit: Credit) -> list[float]:
    return [round(x, 4) for x in credit.advantages[:, 0].tolist()]


def test_each_reward_in_its_own_unit():
    """Outcome 1, 0, 0: deviation 1/sqrt(3), so 2/sqrt(3) = 1.1547 and -0.5774; the format is ten times as wide, and counts half."""
    credit = decoupled_relative(of([1, 0, 0], [10, 10, 0]), weights=(1.0, 0.5), eps=0.0)
    assert numbers(credit) == [1.4434, -0.2887, -1.1547]
    assert [round(x, 4) for x in credit.parts["format"].values.tolist()] == [0.2887, 0.2887, -0.5774]
    assert list(credit.parts) == ["outcome", "format"]
    summed = of([11, 10, 0], [0, 0, 0])  # GRPO of the sum: the first two differ by a tenth of what they should
    assert numbers(grpo(summed)) == [0.6576, 0.4932, -1.1508]


def test_then_over_the_batch():
    """Sums 1.1547 + 0.5774, 0, -1.7321 have mean 0 and sample deviation sqrt(3): 1, 0, -1."""
    r = of([1, 0, 0], [1, 1, 0])
    whole = chain(decoupled_relative(eps=0.0), whiten(unit="trajectory", eps=0.0))
    assert numbers(whole(r)) == [1.0, 0.0, -1.0]
    assert numbers(gdpo(r)) == [0.9999, 0.0, -0.9999]  # eps beside a deviation of 1.73
    assert set(gdpo(r).parts) == {"outcome", "format", "baseline"}


def test_a_reward_that_is_equal_for_all_adds_nothing():
    """Also where it has no binary form, and then the other decides alone."""
    r = of([0.99] * 12, [1.0] + [0.0] * 11)
    credit = decoupled_relative(r)
    assert (credit.parts["outcome"].values == 0).all()
    assert torch.equal(credit.advantages, group_relative(r, reward="format", eps=1e-4).advantages)
    assert credit.notes["zero_signal_groups.outcome"] == 1.0
    assert credit.notes["zero_signal_groups.format"] == 0.0


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(name, method, dtype):
    assert (method(of([0.99] * 12, [0.7] * 12, dtype=dtype)).advantages == 0).all()


@every
def test_rewards_that_cancel(name, method):
    """One reward is the other turned over: what remains is rounding, and must not be scaled up."""
    x = [1, 0.3, 0.7, 0.1, 0]
    assert method(of(x, [1 - v for v in x])).advantages.abs().max() < (1e-5 if name == "nemo" else 1e-6)


@every
def test_one_success_of_four_and_a_pair(name, method):
    """The format is equal for all. Whatever the first step makes of one and three, over the batch it is 1.5 and -0.5."""
    assert [round(x, 3) for x in numbers(method(of([1, 0, 0, 0], [1, 1, 1, 1])))[:2]] == [1.5, -0.5]
    assert [round(x, 3) for x in numbers(method(of([1, 0], [1, 1])))] == [0.707, -0.707]


@every
def test_a_lone_member(name, method):
    """Alone in a group: 0 before the batch is normalised; in verl its rewards, here 0.5 + 1 beside 0.7071 and -0.7071."""
    credit = method(of([0.5, 1, 0], [1, 1, 1], [0, 1, 1]))
    if name == "verl":
        total = [1.5, math.sqrt(0.5), -math.sqrt(0.5)]
        want = [(x - mean(total)) / deviation(total) for x in total]
    else:
        want = [0, 1, -1]
    assert credit.advantages[:, 0].tolist() == pytest.approx(want, abs=2e-4)
    assert method.needs_group_of == (1 if name == "verl" else 2)


def test_what_was_not_measured():
    """Without its format the second is left out; in TRL it is compared by its outcome; without both it is left out there too."""
    r = of([1, 0, 0, NAN], [1, NAN, 0, NAN])
    strict, lenient = decoupled_relative(r, eps=0.0), decoupled_relative(r, eps=0.0, unmeasured="skip")
    assert numbers(strict) == [1.4142, 0.0, -1.4142, 0.0]
    assert strict.mask[:, 0].tolist() == [True, False, True, False]
    assert numbers(lenient) == [1.8618, -0.5774, -1.2845, 0.0]
    assert lenient.mask[:, 0].tolist() == [True, True, True, False]
    assert strict.notes["unmeasured"] == lenient.notes["unmeasured"] == 2
    assert numbers(gdpo(r))[1::2] == [0.0, 0.0]
    assert gdpo.trl()(r).mask[:, 0].tolist() == [True, True, True, False]


def test_trajectories_or_tokens_are_counted():
    """Sums 1 and -1 over sqrt(2), the first five times as long: mean 0 over trajectories, 2/3 of it over tokens."""
    r = of([1, 0], [1, 1], lengths=[5, 1])
    assert numbers(gdpo(r)) == [0.707, -0.707]
    n, third = 6, 1 / 3
    spread = math.sqrt((5 * third**2 + (5 * third) ** 2) / (n - 1))
    assert numbers(gdpo.verl()(r)) == [round(third / spread, 4), round(-5 * third / spread, 4)]


def test_one_reward_is_a_normalised_grpo():
    r = of([1, 0, 0, 0.5], [0] * 4)
    one = decoupled_relative(r, rewards=("outcome",), eps=1e-6)
    assert torch.equal(one.advantages, grpo(r).advantages)


def test_mistakes():
    r = of([1, 0], [1, 0])
    with pytest.raises(ValueError, match=r"at least one reward and each once; got \(\)"):
        decoupled_relative(r, rewards=())
    with pytest.raises(ValueError, match=r"each once; got \('outcome', 'outcome'\)"):
        decoupled_relative(r, rewards=("outcome", "outcome"))
    with pytest.raises(ValueError, match=r"a weight for each of 2 rewards; got 1\. weights=None gives 1 to each"):
        gdpo(r, weights=(1.0,))
    with pytest.raises(ValueError, match=r'needs rollouts\.signals\["style"\], which this batch lacks'):
        gdpo(r, rewards=("outcome", "style"))
    with pytest.raises(ValueError, match=r"needs signals\['judge'\] with one value per trajectory"):
        decoupled_relative(r.with_signals(judge=Signal(torch.zeros(2, 1), "token")), rewards=("judge",))


# ---- agreement with plain loops -------------------------------------------------------------------------------------


def decoupled(r: Rollouts, weights, *, ddof, eps, alone, skip, others=False) -> dict[int, float]:
    """The weighted sum of normalised rewards of each trajectory that counts."""
    names = ("outcome", "format")
    every = episodes(r)
    reward = [[float(r.signals[n].values[k]) for n in names] for k in range(len(every))]
    total: dict[int, float] = {}
    for i, e in enumerate(every):
        if all(map(math.isnan, reward[i])) or (not skip and any(map(math.isnan, reward[i]))):
            continue
        total[i] = 0.0
        for k, w in enumerate(weights):
            mates = [
                j
                for j, x in enumerate(every)
                if x.group == e.group and not (math.isnan(reward[j][k]) if skip else any(map(math.isnan, reward[j])))
            ]
            if i not in mates:
                continue
            pool = [reward[j][k] for j in mates if not others or j != i]
            if len(mates) == 1:
                total[i] += w * reward[i][k] if alone == "raw" else 0.0
            elif len(set(pool)) > 1:
                total[i] += w * (reward[i][k] - mean(pool)) / (deviation(pool, ddof) + eps)
            elif others:
                total[i] += w * (reward[i][k] - mean(pool))
    return total


@pytest.mark.parametrize("name", DIALECTS)
@given(seed=SEEDS)
@tried
def test_random_batches(name, seed):
    r = random_batch(seed)
    how = {"eps": 1e-4, "alone": "zero", "skip": name == "trl", "others": name == "nemo"}
    how |= {"eps": 1e-6, "alone": "raw" if name == "verl" else "zero"} if name in ("verl", "nemo") else {}
    method = {"gdpo": gdpo, **{n: getattr(gdpo, n) for n in ("trl", "verl", "nemo")}}[name](weights=(1.0, 0.5))
    total = decoupled(r, (1.0, 0.5), ddof=1, **how)
    every, table = episodes(r), blank(r)
    counted = [
        total[i] for i in total for _ in range(len(every[i].actions) if name == "verl" else 1) if every[i].actions
    ]
    flat = not counted or max(counted) - min(counted) < 1e-11
    for i, a in total.items():
        if not flat:
            d = deviation(counted)
            divisor = math.sqrt(d * d + 1e-8) if name == "verl" else d + (1e-9 if name == "nemo" else 1e-4)
            put(table, every[i].actions, [(a - mean(counted)) / divisor] * len(every[i].actions))
    torch.testing.assert_close(method(r).advantages, table_of(table, r), rtol=1e-8, atol=1e-8)
