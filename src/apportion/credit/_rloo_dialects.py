"""The dialects of `rloo`: what other trainers compute under that name; they differ in the lone member and in whitening.

Conventions as in `_group_dialects`. A KL penalty that a peer adds to the reward is no part of them.
"""

from apportion.credit._base import Estimator, dialect
from apportion.credit._combine import chain
from apportion.credit._group import group_relative, rloo
from apportion.credit._transforms import whiten


@dialect(rloo)
def trl(*, reward: str = "outcome", normalize_advantages: bool = False) -> Estimator:
    """TRL's RLOOTrainer: `r - mean of the others`; alone 0; the batch's trajectories whitened if asked.

    Whitened: `(A - mean) / (std + 1e-4)`, sample deviation, each trajectory counted once.

    Source: trl 1.16.0, `RLOOTrainer._generate_and_score_completions`; settings `normalize_advantages`, `beta=0.0`.
    Cost: none beyond the rollouts.
    """
    others = rloo(reward=reward)
    return chain(others, whiten(unit="trajectory", eps=1e-4, eps_inside="std")) if normalize_advantages else others


@dialect(rloo)
def verl(*, reward: str = "outcome") -> Estimator:
    """verl's rloo: `(r - mean) n / (n - 1)`; alone its reward.

    Source: verl 0.9.1, `compute_rloo_outcome_advantage`. Departs: several rows of a trajectory count once.
    Cost: none beyond the rollouts.

    Example:
        >>> rloo.verl()
        group_relative(reward='outcome', baseline='leave_one_out', scale=None, singleton='raw')
    """
    return group_relative(reward=reward, baseline="leave_one_out", scale=None, singleton="raw")


@dialect(rloo)
def verl_vectorized(*, reward: str = "outcome") -> Estimator:
    """verl's rloo_vectorized: as its rloo, but alone 0.

    Source: verl 0.9.1, `compute_rloo_vectorized_outcome_advantage`.
    Cost: none beyond the rollouts.
    """
    return rloo(reward=reward)


@dialect(rloo)
def openrlhf(*, reward: str = "outcome") -> Estimator:
    """OpenRLHF's rloo: `r - (sum - r) / (n - 1)`; alone 0 (NaN there).

    Source: openrlhf 0.11.2, `compute_advantages_and_returns` of `experience_maker.py`.
    Cost: none beyond the rollouts.
    """
    return rloo(reward=reward)


@dialect(rloo)
def skyrl(*, reward: str = "outcome") -> Estimator:
    """SkyRL's rloo: `(r - mean) n / (n - 1)`; alone 0.

    Source: skyrl 0.3.0, `compute_rloo_outcome_advantage`.
    Cost: none beyond the rollouts.
    """
    return rloo(reward=reward)


@dialect(rloo)
def rllm(*, reward: str = "outcome") -> Estimator:
    """rLLM's rloo: `(r - mean) n / (n - 1)`; alone its reward.

    Source: rllm 9beb6e0, `calculate_rloo_advantages_per_group`.
    Cost: none beyond the rollouts.
    """
    return verl(reward=reward)
