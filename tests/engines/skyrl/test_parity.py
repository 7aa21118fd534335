"""Our dialects beside SkyRL's own advantage functions: every name of its registry, on ragged batches with gaps.

In the environment of the comparison with verl, where SkyRL can be imported too.
"""

import typing

import pytest
import torch
import typing_extensions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion import Estimator
from apportion import credit as c
from reference.responses import Batch, batch, group, made

with pytest.MonkeyPatch.context() as patch:
    # In Python 3.11 pydantic refuses SkyRL's configuration without this; it tells what to use instead.
    patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
    from skyrl.backends.skyrl_train.utils import ppo_utils

GAMMA, LAM = 0.9, 0.8
SEEDS = given(seed=st.integers(0, 10**6))
FEW = settings(max_examples=20, deadline=None)
CENTRED = {"grpo_norm_by_std": False}
# SkyRL's name, settings, our estimator.
CASES: dict[str, tuple[str, dict[str, bool], Estimator]] = {
    "grpo": ("grpo", {}, c.group_relative.skyrl()),
    "grpo, centred": ("grpo", CENTRED, c.group_relative.skyrl(norm_by_std=False)),
    "rloo": ("rloo", {}, c.rloo.skyrl()),
    "maxrl": ("maxrl", {}, c.max_rl.skyrl()),
    "reinforce++": ("reinforce++", {}, c.reinforce_plus_plus.skyrl(gamma=GAMMA)),
    "gae": ("gae", {}, c.gae.skyrl(gamma=GAMMA, lam=LAM)),
}


def skyrl(b: Batch, name: str, **config: bool) -> tuple[Tensor, Tensor]:
    """Advantages and returns of SkyRL's function of that name, [B, W]."""
    t = b.tensors
    return ppo_utils.compute_advantages_and_returns(
        token_level_rewards=t["token_level_rewards"].clone(),
        response_mask=t["response_mask"].float(),
        index=t["index"],
        values=t["values"],
        adv_estimator=name,
        config=None,  # none of these functions reads it
        gamma=GAMMA,
        lambd=LAM,
        **config,
    )


def ended(b: Batch) -> Batch:
    """V is 0 behind the end of a response: SkyRL's GAE goes on there."""
    behind = ~b.mask & (b.mask.flip(1).cumsum(1).flip(1) == 0)
    b.tensors["values"][behind] = 0
    return b


def test_every_estimator_of_skyrl_is_compared():
    assert {name for name, _, _ in CASES.values()} == set(ppo_utils.AdvantageEstimatorRegistry.list_available())


@pytest.mark.parametrize("case", CASES)
@FEW
@SEEDS
def test_the_same_advantages(case, seed):
    """With groups of one. The rewards are positive, as maxrl divides by their mean."""
    name, config, ours = CASES[case]
    b = ended(batch(seed, sizes=(1, 6), shift=2.0))
    b.same(ours(b.rollouts).advantages, skyrl(b, name, **config)[0])


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("reinforce++", c.reinforce_plus_plus.skyrl(gamma=GAMMA, reward="rewards")),
        ("gae", c.gae.skyrl(gamma=GAMMA, lam=LAM, reward="rewards")),
    ],
    ids=["reinforce++", "gae"],
)
@FEW
@SEEDS
def test_the_same_with_a_reward_on_every_action(name, ours, seed):
    b = ended(batch(seed, dense=True))
    advantages, returns = skyrl(b, name)
    credit = ours(b.rollouts)
    b.same(credit.advantages, advantages)
    b.same(credit.returns, returns)


# ---- where we differ, and mean to -------------------------------------------------------------------------------------


def test_equal_rewards_give_nothing():
    """99 groups of twelve rewards of 0.01 ... 0.99: ours are exactly 0; SkyRL divides what rounding leaves by 1e-6."""
    b = made([row for k in range(1, 100) for row in group(str(k), *[(k / 100, "aa")] * 12)])
    noise = {}
    for case in ("grpo", "rloo", "maxrl"):
        name, config, ours = CASES[case]
        assert not ours(b.rollouts).advantages.any(), case
        noise[case] = float(skyrl(b, name, **config)[0].abs().max())
    assert noise.pop("grpo") > 0.01
    assert max(noise.values()) < 2e-6


@pytest.mark.parametrize("case", ["grpo", "rloo", "maxrl"])
def test_an_unmeasured_reward_is_left_out(case):
    """NaN: in SkyRL its whole group becomes NaN; here the others are compared as if it were not there."""
    name, config, ours = CASES[case]
    b = made(group("one", (1.0, "aa"), (0.0, "aa"), (0.25, "aa"), (torch.nan, "aa")))
    assert skyrl(b, name, **config)[0].isnan().all()
    credit = ours(b.rollouts)
    assert not credit.mask[3].any()
    others = ours(b.rollouts.select(torch.arange(3), covers="batch"))
    torch.testing.assert_close(credit.advantages[:3], others.advantages)


def test_a_negative_mean_does_not_turn_the_signs():
    """maxrl: the better of two bad answers gets -1/3 in SkyRL; max_rl gives nothing where it has no meaning."""
    b = made(group("one", (-1.0, "a"), (-2.0, "a")))
    assert skyrl(b, "maxrl")[0][:, 0].tolist() == pytest.approx([-1 / 3, 1 / 3], abs=1e-6)
    assert not CASES["maxrl"][2](b.rollouts).advantages.any()


def test_values_behind_the_end_are_not_read():
    """In SkyRL the critic's V of padding moves the advantages of the response before it."""
    b = made(group("one", (1.0, "aaa"), (0.0, "a")))
    behind = skyrl(b, "gae")[0]
    theirs = skyrl(ended(b), "gae")[0]
    assert not torch.allclose(behind, theirs)
    b.same(CASES["gae"][2](b.rollouts).advantages, theirs)
