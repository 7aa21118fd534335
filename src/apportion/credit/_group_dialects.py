"""The dialects of `group_relative`: what other trainers call GRPO, each with its own deviation, eps and lone member.

Named after the package; the formula was read in the version given. Kept are the numbers and the rule for a group of one
measured member; not kept are rounding (equal rewards give exactly 0 here, and a lone member its reward, where a peer
that divides it by `1 + eps` gets 1e-6 less) and NaN: what a peer would pass on is not measured and not counted here.
"""

from typing import Literal

from apportion.credit._base import Estimator, dialect
from apportion.credit._group import Scale, group_relative


@dialect(group_relative)
def trl(*, reward: str = "outcome", scale_rewards: Literal["group", "batch", "none"] = "group") -> Estimator:
    """TRL's GRPOTrainer: `(r - mean) / (std + 1e-4)`, sample deviation of the group or of the batch; alone 0.

    Source: trl 1.16.0, `GRPOTrainer._generate_and_score_completions`; setting `scale_rewards`.
    Cost: none beyond the rollouts.

    Example:
        >>> group_relative.trl(scale_rewards="batch")
        group_relative(reward='outcome', scale='batch_std', eps=0.0001)
    """
    scales: dict[str, Scale | None] = {"group": "std", "batch": "batch_std", "none": None}
    return group_relative(reward=reward, scale=scales[scale_rewards], eps=1e-4)


@dialect(group_relative)
def trl_async(*, reward: str = "outcome") -> Estimator:
    """TRL's experimental AsyncGRPOTrainer: `(r - mean) / (std + 1e-8)`, population deviation; alone 0.

    Source: trl 1.16.0, `trl/experimental/async_grpo/async_rollout_worker.py`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, ddof=0, eps=1e-8)


@dialect(group_relative)
def verl(*, reward: str = "outcome", norm_by_std: bool = True) -> Estimator:
    """verl's grpo and grpo_vectorized: `(r - mean) / (std + 1e-6)`, sample deviation; alone its reward.

    Source: verl 0.9.1, `compute_grpo_outcome_advantage`, `compute_grpo_vectorized_outcome_advantage`; setting
        `norm_adv_by_std_in_grpo`.
    Cost: none beyond the rollouts.

    Example:
        >>> group_relative.verl()
        group_relative(reward='outcome', scale='std', eps=1e-06, singleton='raw')
    """
    return group_relative(reward=reward, scale="std" if norm_by_std else None, eps=1e-6, singleton="raw")


@dialect(group_relative)
def skyrl(*, reward: str = "outcome", norm_by_std: bool = True) -> Estimator:
    """SkyRL's grpo: `(r - mean) / (std + 1e-6)`, sample deviation; alone its reward.

    Source: skyrl 0.3.0, `compute_grpo_outcome_advantage`; setting `grpo_norm_by_std`.
    Cost: none beyond the rollouts.
    """
    return verl(reward=reward, norm_by_std=norm_by_std)


@dialect(group_relative)
def slime(*, reward: str = "outcome") -> Estimator:
    """slime's grpo, gspo and cispo: `(r - mean) / (std + 1e-6)`, sample deviation; alone 0.

    Source: slime 624b824, `RolloutManager._post_process_rewards`. Departs: groups of different sizes, which slime compares
        as one, stay groups.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, eps=1e-6)


@dialect(group_relative)
def roll(*, reward: str = "outcome") -> Estimator:
    """ROLL's grpo: `(r - mean) / (std + 1e-6)`, sample deviation; alone 0 (NaN in its single-turn pipeline).

    Source: ROLL 8eb27cc, `reward_norm` as `adv_estimator="grpo"` sets it, `agentic_reward_norm`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, eps=1e-6)


@dialect(group_relative)
def oat(*, reward: str = "outcome") -> Estimator:
    """oat's critic_type=grpo: `(r - mean) / (std + 1e-8)`, sample deviation; alone 0 (NaN there).

    Source: oat c1a074c, `PPOLearner.compute_monte_carlo_advantages`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, eps=1e-8)


@dialect(group_relative)
def openrlhf(*, reward: str = "outcome") -> Estimator:
    """OpenRLHF's group_norm: `(r - mean) / (std + 1e-9)`, sample deviation; alone 0 (NaN there).

    Source: openrlhf 0.11.2, `compute_advantages_and_returns` of `experience_maker.py`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, eps=1e-9)


@dialect(group_relative)
def torchforge(*, reward: str = "outcome") -> Estimator:
    """torchforge's GRPO app: `(r - mean) / (std + 1e-4)`, sample deviation; alone 0 (NaN there).

    Source: torchforge 6e77f0b, `ComputeAdvantages` of `apps/grpo/main.py`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, eps=1e-4)


@dialect(group_relative)
def rllm(*, reward: str = "outcome", norm_by_std: bool = True) -> Estimator:
    """rLLM's grpo: `(r - mean) / (std + 1e-6)`, population deviation; alone its reward.

    Source: rllm 9beb6e0, `calculate_grpo_advantages_per_group`; setting `norm_adv_by_std_in_grpo`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, scale="std" if norm_by_std else None, ddof=0, eps=1e-6, singleton="raw")


@dialect(group_relative)
def art(*, reward: str = "outcome") -> Estimator:
    """ART's local backend: `(r - mean) / (std + 1e-6)`, population deviation; alone 0.

    ART then drops trajectories whose advantage is 0 from the loss: `chain(group_relative.art(),
    scale_by_sign(drop_zero=True))`.

    Source: openpipe-art 0.5.18, `tokenize_trajectory_groups`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, ddof=0, eps=1e-6)


@dialect(group_relative)
def art_tinker(*, reward: str = "outcome") -> Estimator:
    """ART's tinker backend: `(r - mean) / std`, sample deviation without eps; alone 0.

    Source: openpipe-art 0.5.18, `art/tinker_native/data.py`, `compute_advantages`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, eps=0.0)


@dialect(group_relative)
def open_instruct(*, reward: str = "outcome", normalization: Literal["standard", "centered"] = "standard") -> Estimator:
    """open-instruct: `(r - mean) / (std + 1e-8)`, population deviation, or "centered", `r - mean`; alone 0.

    Source: open-instruct e6c3044, `data_loader.py`; setting `advantage_normalization_type`.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, scale="std" if normalization == "standard" else None, ddof=0, eps=1e-8)


@dialect(group_relative)
def nemo(*, reward: str = "outcome") -> Estimator:
    """NeMo-RL's grpo: mean and sample deviation of the others, `/ (std + 1e-6)`; undivided if they are equal; alone 0.

    Two responses with rewards 1 and 0 hence get 1 and -1.

    Source: NeMo-RL 7ea279a, `GRPOAdvantageEstimator`, `calculate_baseline_and_std_per_prompt`, with its default settings.
        Departs: their deviation comes from float32 squares, so equal others may seem to differ; here they do not.
    Cost: none beyond the rollouts.

    Example:
        >>> from apportion.types import Rollouts
        >>> r = Rollouts.from_lists([[5]] * 4, [0] * 4, outcome=[1.0, 0.0, 0.0, 0.0])
        >>> group_relative.nemo()(r).advantages[:2, 0]
        tensor([ 1.0000, -0.5773])
    """
    return group_relative(reward=reward, baseline="leave_one_out", scale="leave_one_out_std", eps=1e-6, flat="unscaled")


@dialect(group_relative)
def prime_rl(*, reward: str = "outcome") -> Estimator:
    """prime-rl's grpo: `r - mean`; alone 0.

    Source: prime-rl 559b447, `GRPOAlgorithm.score_group`, without its length penalty.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, scale=None)
