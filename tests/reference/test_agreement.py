"""Every estimator gives, on random ragged batches, what its slow reference gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import capo, gae, group_relative, prefix_td, process_min
from reference import loops
from reference.batches import random_batch

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)


def agree(got: torch.Tensor, table: list[list[float]], r) -> None:
    torch.testing.assert_close(got, loops.table_of(table, r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["std", "leave_one_out_std", "batch_std", "mean", None])
@given(seed=SEEDS, ddof=st.sampled_from([0, 1]), inside=st.sampled_from(["std", "var"]))
@settings(max_examples=15, deadline=None)
def test_group_relative(seed, baseline, scale, ddof, inside):
    r = random_batch(seed)
    inside = "std" if scale == "mean" else inside
    ours = group_relative(r, baseline=baseline, scale=scale, ddof=ddof, eps=1e-4, eps_inside=inside)
    agree(ours.advantages, loops.group_relative(r, baseline, scale, ddof, 1e-4, inside), r)


@pytest.mark.parametrize("vote", ["intersection", "majority", "union", "average"])
@given(seed=SEEDS)
@few
def test_capo(seed, vote):
    r = random_batch(seed)
    agree(capo(vote=vote)(r).advantages, loops.capo(r, vote), r)


@pytest.mark.parametrize("unmeasured", ["drop", "process"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"coef": 0.0, "gamma": 0.9},
        {"temperature": None, "horizon": 8},
        {"baseline": "step"},
        {"baseline": "token", "gamma": 0.5},
    ],
    ids=str,
)
@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_process_min(seed, how, unmeasured):
    r = random_batch(seed)
    agree(process_min(r, unmeasured=unmeasured, **how).advantages, loops.pure(r, unmeasured=unmeasured, **how), r)


@pytest.mark.parametrize("scale", ["std", None])
@given(seed=SEEDS)
@few
def test_prefix_td(seed, scale):
    r = random_batch(seed)
    agree(prefix_td(r, scale=scale).advantages, loops.tempo(r, scale), r)


@pytest.mark.parametrize("over", ["token", "step", "half"])
@given(seed=SEEDS, gamma=st.sampled_from([1.0, 0.9, 0.0]), lam=st.sampled_from([1.0, 0.95, 0.0]))
@few
def test_gae(seed, over, gamma, lam):
    r = random_batch(seed)
    ours = gae(r, gamma=gamma, lam=lam, over=over, kl_coef=0.1)
    advantages, returns = loops.gae(r, gamma, lam, over, 0.1)
    agree(ours.advantages, advantages, r)
    agree(ours.returns, returns, r)
