"""Our dialects beside verl's own advantage functions: every name of its registry, on ragged batches with gaps.

These tests need the environment that `make test` builds from constraints-verl.txt; the other tests leave this folder out.
"""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, kl_penalty

from apportion import Estimator
from apportion import credit as c
from reference.responses import Batch, batch, group, made

GAMMA, LAM = 0.9, 0.8
SEEDS = given(seed=st.integers(0, 10**6))
FEW = settings(max_examples=20, deadline=None)


def verl(b: Batch, name: str, *, zero_tail: bool = True, **config: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns of verl's function of that name, [B, W]; what its mask leaves out is 0."""
    function = ADV_ESTIMATOR_REGISTRY[name]
    known = {
        **b.tensors,
        "gamma": GAMMA,
        "lam": LAM,
        "config": AlgoConfig(gamma=GAMMA, lam=LAM, **config),
        "norm_adv_by_std_in_grpo": config.get("norm_adv_by_std_in_grpo", True),
        "handle_zero_tail": zero_tail,
    }
    found = function(**{k: known[k] for k in inspect.signature(function).parameters if k in known})
    advantages, returns = (torch.where(b.mask, x, 0) for x in found)
    return advantages, returns


CENTRED = {"norm_adv_by_std_in_grpo": False}
GDPO = {"gdpo_reward_keys": ["outcome", "format"]}
WEIGHTED = {**GDPO, "gdpo_reward_weights": [1.0, 0.5]}
# verl's name, settings of its configuration, our estimator.
CASES: dict[str, tuple[str, dict[str, Any], Estimator]] = {
    "grpo": ("grpo", {}, c.group_relative.verl()),
    "grpo, centred": ("grpo", CENTRED, c.group_relative.verl(norm_by_std=False)),
    "grpo_vectorized": ("grpo_vectorized", {}, c.group_relative.verl()),
    "grpo_vectorized, centred": ("grpo_vectorized", CENTRED, c.group_relative.verl(norm_by_std=False)),
    "grpo_passk": ("grpo_passk", {}, c.pass_at_k()),
    "grpo_passk, centred": ("grpo_passk", CENTRED, c.pass_at_k(norm_by_std=False)),
    "gdpo": ("gdpo", GDPO, c.gdpo.verl()),
    "gdpo, weighted": ("gdpo", WEIGHTED, c.gdpo.verl(weights=(1.0, 0.5))),
    "gdpo, centred": ("gdpo", {**GDPO, **CENTRED}, c.gdpo.verl(norm_by_std=False)),
    "rloo": ("rloo", {}, c.rloo.verl()),
    "rloo_vectorized": ("rloo_vectorized", {}, c.rloo.verl_vectorized()),
    "opo": ("opo", {}, c.opo(singleton="raw")),
    "gpg": ("gpg", {}, c.gpg(singleton="raw")),
    "remax": ("remax", {}, c.remax()),
    "rf++": ("reinforce_plus_plus", {}, c.reinforce_plus_plus.verl(gamma=GAMMA)),
    "rf++ baseline": ("reinforce_plus_plus_baseline", {}, c.reinforce_plus_plus_baseline(singleton="raw")),
    "gae": ("gae", {}, c.gae.verl(gamma=GAMMA, lam=LAM)),
    "otb": ("optimal_token_baseline", {}, c.optimal_token_baseline.verl()),
    "tir otb": ("tir_optimal_token_baseline", {}, c.optimal_token_baseline.verl(align="action")),
}
DENSE = {
    "rf++": c.reinforce_plus_plus.verl(gamma=GAMMA, reward="rewards"),
    "gae": c.gae.verl(gamma=GAMMA, lam=LAM, reward="rewards"),
    "tir otb": c.optimal_token_baseline.verl(align="action", reward="rewards"),
}
COMPARED = ["grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "opo", "gpg", "otb", "tir otb"]


def test_every_estimator_of_verl_is_compared():
    assert {name for name, _, _ in CASES.values()} == set(ADV_ESTIMATOR_REGISTRY)


@pytest.mark.parametrize("case", [case for case in CASES if case != "otb"])  # with gaps: see the end
@FEW
@SEEDS
def test_the_same_advantages(case, seed):
    name, config, ours = CASES[case]
    b = batch(seed)
    b.same(ours(b.rollouts).advantages, verl(b, name, **config)[0])


@pytest.mark.parametrize("case", [case for case in CASES if "passk" not in case])  # verl refuses a group of one
@FEW
@SEEDS
def test_the_same_advantages_beside_groups_of_one(case, seed):
    name, config, ours = CASES[case]
    b = batch(seed, sizes=(1, 3), gaps=False)
    b.same(ours(b.rollouts).advantages, verl(b, name, **config)[0])


@pytest.mark.parametrize("case", DENSE)
@FEW
@SEEDS
def test_the_same_with_a_reward_on_every_action(case, seed):
    b = batch(seed, dense=True)
    b.same(DENSE[case](b.rollouts).advantages, verl(b, CASES[case][0])[0])


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("reinforce_plus_plus", c.reinforce_plus_plus.verl(gamma=GAMMA, kl_coef=0.1)),
        ("gae", c.gae.verl(gamma=GAMMA, lam=LAM, kl_coef=0.1)),
    ],
    ids=["rf++", "gae"],
)
@FEW
@SEEDS
def test_the_same_with_a_penalty_in_the_reward(name, ours, seed):
    """verl's trainer takes `kl_coef` times this estimate off the rewards before it calls these functions."""
    b = batch(seed)
    penalty = kl_penalty(b.tensors["old_log_probs"], b.tensors["ref_log_probs"], "kl") * b.mask
    b.tensors["token_level_rewards"] -= 0.1 * penalty
    b.same(ours(b.rollouts).advantages, verl(b, name)[0])


@pytest.mark.parametrize("case", ["gae", "rf++"])
@FEW
@SEEDS
def test_the_same_returns_for_a_critic(case, seed):
    name, _, ours = CASES[case]
    b = batch(seed)
    returns = ours(b.rollouts).returns
    assert returns is not None
    b.same(returns, verl(b, name)[1])


# ---- degenerate groups, and where we mean to differ -------------------------------------------------------------------


def test_a_group_of_one():
    """verl's rloo and its rloo_vectorized disagree; whitened ones are compared above, beside larger groups."""
    b = made(group("alone", (0.75, "aa")))
    kept = {case: verl(b, CASES[case][0])[0][0, 0].item() for case in COMPARED if case != "grpo_passk"}
    assert kept.pop("rloo_vectorized") == 0
    assert all(abs(value - 0.75) < 1e-6 for value in kept.values())
    with pytest.raises(ValueError, match="at least 2 samples"):
        verl(b, "grpo_passk")
    for case, alone in {**kept, "rloo_vectorized": 0, "grpo_passk": 0}.items():
        assert CASES[case][2](b.rollouts).advantages[0, 0].item() == pytest.approx(alone, abs=1e-6), case


def test_equal_rewards_give_nothing():
    """99 groups of twelve rewards of 0.01 ... 0.99: ours are exactly 0; verl divides what rounding leaves by 1e-6."""
    b = made([row for k in range(1, 100) for row in group(str(k), *[(k / 100, "aa")] * 12)])
    noise = {}
    for case in COMPARED:
        name, config, ours = CASES[case]
        assert not ours(b.rollouts).advantages.any(), case
        noise[case] = float(verl(b, name, **config)[0].abs().max())
    assert min(noise.pop("grpo"), noise.pop("grpo_vectorized")) > 0.01  # 0.15 where this was written
    assert max(noise.values()) < 2e-6


@pytest.mark.parametrize("case", COMPARED)
def test_an_unmeasured_reward_is_left_out(case):
    """NaN: in verl its group becomes NaN or loses its best; here the others are compared as if it were not there."""
    name, config, ours = CASES[case]
    b = made(group("one", (1.0, "aa"), (0.0, "aa"), (0.25, "aa"), (torch.nan, "aa")))
    assert verl(b, name, **config)[0].isnan().any()
    credit = ours(b.rollouts)
    assert not credit.mask[3].any()
    others = ours(b.rollouts.select(torch.arange(3), covers="batch"))
    torch.testing.assert_close(credit.advantages[:3], others.advantages)


@pytest.mark.parametrize("case", ["gae", "rf++"])
def test_an_outcome_after_tool_output_is_kept(case):
    """verl puts the outcome on the response's last token; if that is tool output, these two never see it."""
    name, _, ours = CASES[case]
    b = made(group("one", (1.0, "aa-"), (0.0, "aaa"), (0.0, "aaa")))
    kept = verl(b, name)[0]
    b.same(ours(b.rollouts).advantages, kept)
    b.tensors["token_level_rewards"][0] = torch.tensor([0.0, 0.0, 1.0])  # as verl's agent loop does
    lost = verl(b, name)[0]
    b.tensors["token_level_rewards"][0] = 0
    torch.testing.assert_close(lost, verl(b, name)[0])
    assert not torch.allclose(lost, kept)


@FEW
@SEEDS
def test_otb_with_gaps(seed):
    """verl compares columns, and counts actions to find the tail where a response has no partner; we count columns."""
    b = batch(seed)
    columns = c.optimal_token_baseline(align="position", tail="zero", singleton="raw")
    b.same(columns(b.rollouts).advantages, verl(b, "optimal_token_baseline", zero_tail=False)[0])


def test_the_tail_of_otb_with_gaps():
    b = made(group("one", (1.0, "a---aa"), (0.0, "a---aaa")))
    theirs = verl(b, "optimal_token_baseline")[0]
    assert theirs[1, 4:].tolist() == [0, 0, 0]  # its return: column 4 is beyond the three actions of the first
    ours = c.optimal_token_baseline.verl()(b.rollouts).advantages
    assert (ours[1, 4:6] < 0).all()  # compared with the first response, which has columns 4 and 5 too
    assert ours[1, 6] == 0
