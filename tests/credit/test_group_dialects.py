"""The dialects of group_relative and rloo against the formulas of the packages they are named after."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Credit, Rollouts, chain, group_relative, max_rl, rloo, whiten
from apportion.cli._compose import dialects_of
from apportion.credit import _group_dialects, _rloo_dialects
from reference.batches import random_batch
from reference.loops import blank, deviation, episodes, mean, put, table_of

NAN = float("nan")
GRPO = ["trl", "trl_async", "verl", "skyrl", "slime", "roll", "oat", "openrlhf", "torchforge", "rllm", "art"]
GRPO += ["art_tinker", "open_instruct", "nemo", "prime_rl"]
RLOO = ["trl", "verl", "verl_vectorized", "openrlhf", "skyrl", "rllm"]
NAMED = {f"group_relative.{n}": getattr(group_relative, n) for n in GRPO} | {
    f"rloo.{n}": getattr(rloo, n) for n in RLOO
}
NAMED |= {f"max_rl.{n}": getattr(max_rl, n) for n in ("skyrl", "prime_rl")}
EVERY = {name: make() for name, make in NAMED.items()} | {
    "trl batch": group_relative.trl(scale_rewards="batch"),
    "trl none": group_relative.trl(scale_rewards="none"),
    **{f"{n} centred": NAMED[f"group_relative.{n}"](norm_by_std=False) for n in ("verl", "skyrl", "rllm")},
    "open_instruct centred": group_relative.open_instruct(normalization="centered"),
    "rloo.trl whitened": rloo.trl(normalize_advantages=True),
}
RAW = {"verl", "skyrl", "rllm"}  # those whose lone member keeps its reward
every = pytest.mark.parametrize(("name", "method"), EVERY.items(), ids=EVERY)


def of(outcome: Sequence[float], groups: Sequence[int] | None = None, dtype: torch.dtype = torch.float64) -> Rollouts:
    """One token for each reward."""
    return Rollouts.from_lists([[5]] * len(outcome), groups or [0] * len(outcome), outcome=list(outcome), dtype=dtype)


def numbers(credit: Credit) -> list[float]:
    return [round(x, 4) for x in credit.advantages[:, 0].tolist()]


def raw(name: str) -> bool:
    package = name.replace("group_relative.", "").replace(" centred", "")
    return package in RAW or name in ("rloo.verl", "rloo.rllm", "max_rl.skyrl")


def test_every_name_is_there_and_says_what_it_is():
    assert set(dialects_of(group_relative)) == set(GRPO)
    assert set(dialects_of(rloo)) == set(RLOO)
    for module, names in ((_group_dialects, GRPO), (_rloo_dialects, RLOO)):
        for name in names:
            for field in ("Source: ", "Cost: "):
                assert field in getattr(module, name).__doc__, name


# Rewards 1, 0, 0, 0: mean 1/4. Sample deviation 1/2, population deviation sqrt(3)/4 = 0.433013; the others of the 1 are
# equal, those of a 0 have mean 1/3 and sample deviation sqrt(1/3) = 0.577350.
SAMPLE, POPULATION, CENTRED = [1.5, -0.5], [1.7321, -0.5774], [0.75, -0.25]
FIRST_TWO = {
    "group_relative.trl": [1.4997, -0.4999],
    "trl batch": [1.4997, -0.4999],
    "trl none": CENTRED,
    "group_relative.trl_async": POPULATION,
    **{f"group_relative.{n}": SAMPLE for n in ("verl", "skyrl", "slime", "roll", "oat", "openrlhf", "art_tinker")},
    **{f"{n} centred": CENTRED for n in ("verl", "skyrl", "rllm", "open_instruct")},
    "group_relative.torchforge": [1.4997, -0.4999],
    "group_relative.open_instruct": POPULATION,
    **{f"group_relative.{n}": [1.732, -0.5773] for n in ("rllm", "art")},  # eps 1e-6 shows in the fourth digit
    "group_relative.nemo": [1.0, -0.5773],
    "group_relative.prime_rl": CENTRED,
    **{f"rloo.{n}": [1.0, -0.3333] for n in RLOO},
    "rloo.trl whitened": [1.4998, -0.4999],  # mean 0, sample deviation 2/3: 1 / (2/3 + 1e-4)
    "max_rl.skyrl": [3.0, -1.0],
    "max_rl.prime_rl": [3.0, -1.0],
}


@every
def test_one_success_of_four(name, method):
    assert numbers(method(of([1, 0, 0, 0])))[:2] == FIRST_TWO[name]


@every
def test_a_lone_member(name, method):
    """Reward 0.5 alone in its group, beside a group of two that goes on as ever."""
    credit = method(of([0.5, 1, 0], [0, 1, 1]))
    if name == "rloo.trl whitened":
        assert numbers(credit) == [0.0, 0.9999, -0.9999]  # 0, 1, -1 with sample deviation 1
    else:
        assert credit.advantages[0, 0] == (0.5 if raw(name) else 0.0)
        assert numbers(credit)[1] == -numbers(credit)[2] > 0
    assert credit.mask.all()
    assert method.needs_group_of == (1 if raw(name) else 2)


PAIR = {
    "group_relative.nemo": 1.0,  # one other has no deviation: the difference itself
    **{f"group_relative.{n}": 1.0 for n in ("trl_async", "rllm", "art", "open_instruct")},
    **{n: 0.5 for n in EVERY if n.endswith((" centred", " none", ".prime_rl"))},
    **{f"rloo.{n}": 1.0 for n in RLOO},
    "max_rl.skyrl": 1.0,
    "max_rl.prime_rl": 1.0,
    **dict.fromkeys(("group_relative.trl", "trl batch", "group_relative.torchforge", "rloo.trl whitened"), 0.707),
}


@every
def test_a_pair(name, method):
    """Rewards 1 and 0: sample deviation sqrt(1/2), population deviation 1/2."""
    size = PAIR.get(name, 0.7071)
    credit = method(of([1, 0]))
    assert [round(x, len(str(size)) - 2) for x in credit.advantages[:, 0].tolist()] == [size, -size]


@every
def test_an_unmeasured_trajectory_is_not_there(name, method):
    with_it, without = method(of([1, NAN, 0, 0])), method(of([1, 0, 0]))
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(with_it.advantages[kept], without.advantages, rtol=0, atol=0)
    assert with_it.advantages[1, 0] == 0
    assert with_it.mask[:, 0].tolist() == [True, False, True, True]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "times"), [(0.99, 12), (0.98, 16), (1 / 3, 7), (0.0, 4)])
def test_equal_rewards_give_exactly_nothing(name, method, dtype, value, times):
    assert (method(of([value] * times, dtype=dtype)).advantages == 0).all()


@every
def test_another_reward_can_be_named(name, method):
    make = NAMED.get(name)
    assert make is None or "signals.score" in make(reward="score").requires


# ---- the packages' formulas on lists of rewards ---------------------------------------------------------------------

Formula = Callable[[list[float], list[float]], list[float]]


def standardised(
    group: list[float], batch: list[float], *, ddof: int = 1, eps: float = 0.0, alone: str = "zero", over: str = "group"
) -> list[float]:
    if len(group) == 1:
        return group if alone == "raw" else [0.0]
    d = deviation(group if over == "group" else batch, ddof)
    return [0.0 if len(set(group)) == 1 else (r - mean(group)) / (d + eps) for r in group]


def centred(group: list[float], batch: list[float], *, alone: str = "zero") -> list[float]:
    return list(group) if len(group) == 1 and alone == "raw" else [r - mean(group) for r in group]


def one_out(group: list[float], batch: list[float], *, alone: str = "zero") -> list[float]:
    n = len(group)
    if n == 1:
        return list(group) if alone == "raw" else [0.0]
    return [r - (sum(group) - r) / (n - 1) for r in group]


def one_out_with_deviation(group: list[float], batch: list[float]) -> list[float]:
    out = []
    for i, r in enumerate(group):
        others = group[:i] + group[i + 1 :]
        above = r - mean(others) if others else 0.0
        d = deviation(others, 1)
        out.append(above / (d + 1e-6) if len(set(others)) > 1 else above)
    return out


def by_mean(group: list[float], batch: list[float], *, eps: float, alone: str) -> list[float]:
    if len(group) == 1:
        return list(group) if alone == "raw" else [0.0]
    m = mean(group)
    return [(r - m) / (m + eps) if m > 0 else 0.0 for r in group]


FORMULAS: dict[str, Formula] = {
    "group_relative.trl": partial(standardised, eps=1e-4),
    "trl batch": partial(standardised, eps=1e-4, over="batch"),
    "group_relative.trl_async": partial(standardised, ddof=0, eps=1e-8),
    **{f"group_relative.{n}": partial(standardised, eps=1e-6, alone="raw") for n in ("verl", "skyrl")},
    **{f"{n} centred": partial(centred, alone="raw") for n in ("verl", "skyrl", "rllm")},
    **{f"group_relative.{n}": partial(standardised, eps=1e-6) for n in ("slime", "roll")},
    "group_relative.oat": partial(standardised, eps=1e-8),
    "group_relative.openrlhf": partial(standardised, eps=1e-9),
    "group_relative.torchforge": partial(standardised, eps=1e-4),
    "group_relative.rllm": partial(standardised, ddof=0, eps=1e-6, alone="raw"),
    "group_relative.art": partial(standardised, ddof=0, eps=1e-6),
    "group_relative.art_tinker": standardised,
    "group_relative.open_instruct": partial(standardised, ddof=0, eps=1e-8),
    "group_relative.nemo": one_out_with_deviation,
    **dict.fromkeys(("group_relative.prime_rl", "trl none", "open_instruct centred"), centred),
    **{f"rloo.{n}": partial(one_out, alone="raw" if n in ("verl", "rllm") else "zero") for n in RLOO},
    "max_rl.skyrl": partial(by_mean, eps=1e-6, alone="raw"),
    "max_rl.prime_rl": partial(by_mean, eps=0.0, alone="zero"),
}


@pytest.mark.parametrize("name", [n for n in EVERY if n != "rloo.trl whitened"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_random_batches(name, seed):
    r = random_batch(seed)
    table = blank(r)
    measured = [e for e in episodes(r) if not math.isnan(e.outcome)]
    for e in measured:
        mates = [k for k in measured if k.group == e.group]
        group, batch = [k.outcome for k in mates], [k.outcome for k in measured]
        mine = FORMULAS[name](group, batch)[mates.index(e)]
        put(table, e.actions, [mine] * len(e.actions))
    torch.testing.assert_close(EVERY[name](r).advantages, table_of(table, r), rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_whitened_leave_one_out_on_random_batches(seed):
    r = random_batch(seed)
    table = blank(r)
    measured = [e for e in episodes(r) if not math.isnan(e.outcome) and e.actions]
    above = []
    for e in measured:
        group = [k.outcome for k in episodes(r) if k.group == e.group and not math.isnan(k.outcome)]
        above.append(one_out(group, [])[group.index(e.outcome)])
    for e, a in zip(measured, above, strict=True):
        white = (a - mean(above)) / (deviation(above) + 1e-4) if max(above) - min(above) > 1e-11 else 0.0
        put(table, e.actions, [white] * len(e.actions))
    torch.testing.assert_close(EVERY["rloo.trl whitened"](r).advantages, table_of(table, r), rtol=1e-9, atol=1e-9)


def test_whitening_counts_a_trajectory_once_however_long():
    """Advantages 1 and -1, of five tokens and one: mean 0 over trajectories, 2/3 over tokens."""
    r = Rollouts.from_lists([[5] * 5, [6]], [0, 0], outcome=[1, 0], dtype=torch.float64)
    credit = rloo.trl(normalize_advantages=True)(r)
    assert credit.advantages[0].tolist() == [1 / (math.sqrt(2) + 1e-4)] * 5
    assert credit.advantages[1, 0] == -credit.advantages[0, 0]


def test_whitening_the_trajectories_of_each_group():
    """Rewards 1, 0 and 4, 0, 0: each group in its own deviation; a group of one gives 0."""
    r = of([1, 0, 4, 0, 0, 9], [0, 0, 1, 1, 1, 2])
    white = chain(group_relative(scale=None), whiten(over="group", unit="trajectory", ddof=0, eps=0.0))(r)
    assert numbers(white) == [1.0, -1.0, 1.4142, -0.7071, -0.7071, 0.0]
    assert white.parts["baseline"].values.shape == (3,)


# ---- settings of group_relative that the dialects brought -----------------------------------------------------------


def test_flat_says_what_happens_without_a_divisor():
    """Others of the 1 are equal: 0, or what is above their mean."""
    how = {"baseline": "leave_one_out", "scale": "leave_one_out_std", "eps": 0.0}
    assert numbers(group_relative(of([1, 0, 0, 0]), **how))[:2] == [0.0, -0.5774]
    assert numbers(group_relative(of([1, 0, 0, 0]), flat="unscaled", **how))[:2] == [1.0, -0.5774]
    assert numbers(group_relative(of([1, 0]), flat="unscaled", **how)) == [1.0, -1.0]
    assert (group_relative(of([0.99] * 12), flat="unscaled", **how).advantages == 0).all()


def test_a_mean_not_above_0_is_no_scale():
    """Divided by their mean, -1/2, the rewards -1 and 0 would change places."""
    assert numbers(group_relative(of([-1, 0]), scale="mean")) == [0.0, 0.0]
    assert numbers(group_relative(of([-1, 1]), scale="mean", eps=0.0)) == [0.0, 0.0]
    assert numbers(group_relative(of([-1, 0]), scale="mean", flat="unscaled")) == [-0.5, 0.5]


MASK = [[False, True, True, True], [False, True]]


def test_weights_by_length_at_every_unit():
    """Rewards 1 and 0 over three actions and one: mean 3/4. Prompt positions are no actions."""
    r = Rollouts.from_lists([[1, 5, 5, 5], [1, 6]], [0, 0], outcome=[1, 0], action_mask=MASK)
    weighted = group_relative(r, baseline="length_weighted", scale=None)
    assert weighted.advantages.tolist() == [[0, 0.25, 0.25, 0.25], [0, -0.75, 0, 0]]
    assert weighted.advantages.sum() == 0
    by_token = group_relative(r, baseline="length_weighted", scale=None, unit="token")
    assert torch.equal(by_token.advantages, weighted.advantages)
    spans = [[(0, 2), (2, 4)], [(0, 2)]]  # of the first spans each has one action, the second has no mate
    r = Rollouts.from_lists([[1, 5, 5, 5], [1, 6]], [0, 0], steps=spans, process=[[1, 9], [0]], action_mask=MASK)
    steps = group_relative(r, reward="process", unit="step", baseline="length_weighted", scale=None)
    assert steps.parts["process"].values.tolist() == [0.5, 0.0, -0.5]
    steps = group_relative(r, reward="process", unit="step", baseline="length_weighted", scale=None, pool="all")
    assert steps.parts["process"].values.tolist() == [1 - 19 / 4, 9 - 19 / 4, -19 / 4]


def test_which_dialects_are_the_same():
    """A name for each package, although some compute the same."""
    assert group_relative.verl() == group_relative.skyrl() != group_relative.slime() == group_relative.roll()
    assert rloo.verl() == rloo.rllm() != rloo.skyrl() == rloo()
