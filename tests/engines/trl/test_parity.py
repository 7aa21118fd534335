"""Our dialects beside TRL's own trainers: a tiny model answers, reward functions give chosen rewards, TRL divides them."""

import asyncio
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apportion import Credit, Rollouts, Signal
from apportion import credit as c

SEEDS = given(seed=st.integers(0, 10**6))
FEW = settings(max_examples=15, deadline=None)
Rewards = list[float | None]
# TRL sets an option that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


def outcome(completions: list, outcome: Rewards, **_: Any) -> Rewards:
    return outcome


def format(completions: list, format: Rewards, **_: Any) -> Rewards:
    return format


def trainer(name: str, model: str, folder: str, functions: list[Callable], **settings: Any) -> Any:
    import trl
    from datasets import Dataset

    config = getattr(trl, name.replace("Trainer", "Config"))(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        beta=0.0,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    made = getattr(trl, name)(
        model=model, args=config, train_dataset=Dataset.from_dict({"prompt": ["ab"]}), reward_funcs=functions
    )
    made.model.train()
    return made


@pytest.fixture(scope="module")
def grpo(tiny_model, tmp_path_factory):
    return trainer("GRPOTrainer", tiny_model, str(tmp_path_factory.mktemp("grpo")), [outcome])


@pytest.fixture(scope="module")
def gdpo(tiny_model, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gdpo"))
    several = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]}
    return trainer("GRPOTrainer", tiny_model, folder, [outcome, format], **several)


@pytest.fixture(scope="module")
def rloo(tiny_model, tmp_path_factory):
    return trainer("RLOOTrainer", tiny_model, str(tmp_path_factory.mktemp("rloo")), [outcome])


def stepped(trainer: Any, size: int, **rewards: Rewards) -> tuple[Rollouts, Tensor]:
    """What TRL sampled for groups of `size`, with our signals, and the advantages [B] it gave."""
    trainer.num_generations = size
    inputs = [{"prompt": "ab", **dict(zip(rewards, row, strict=True))} for row in zip(*rewards.values(), strict=True)]
    out = trainer._generate_and_score_completions(inputs)
    prompts, mask = out["prompt_ids"], out["completion_mask"].bool()
    rollouts = Rollouts.from_lists(
        torch.cat([prompts, out["completion_ids"]], 1).tolist(),
        [row // size for row in range(len(mask))],
        action_mask=torch.cat([torch.zeros_like(prompts, dtype=torch.bool), mask], 1).tolist(),
    )
    return rollouts.with_signals(**{k: Signal(measured(v), "trajectory") for k, v in rewards.items()}), out[
        "advantages"
    ]


def measured(rewards: Rewards) -> Tensor:
    return torch.tensor([torch.nan if r is None else r for r in rewards])


def same(credit: Credit, theirs: Tensor) -> None:
    """TRL multiplies every token of a row by one number; where ours does not count a token, theirs is 0 for the row."""
    assert not theirs[~credit.mask.any(1)].any()
    everywhere = torch.where(credit.mask, theirs[:, None], 0)
    torch.testing.assert_close(credit.advantages, everywhere, rtol=2e-6, atol=2e-6)


def random_rewards(seed: int, holes: float = 0.2) -> tuple[int, Rewards, Rewards]:
    """A group size and two rewards for each row, eighths, some not measured; no group has equal rewards.

    The first two members of a group are measured, or TRL divides rounding errors by 1e-4.
    """
    rng = Random(seed)
    size, groups = rng.choice([2, 3, 4, 6]), rng.randint(1, 4)

    def draw() -> Rewards:
        out: Rewards = []
        for _ in range(groups):
            first = rng.randint(-8, 8) / 8
            others = [None if rng.random() < holes else rng.randint(-8, 8) / 8 for _ in range(size - 2)]
            out += [first, first + rng.choice([-1, 1]) * rng.randint(1, 8) / 8, *others]
        return out

    return size, draw(), draw()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@FEW
@SEEDS
def test_grpo(grpo, scale, seed):
    grpo.scale_rewards = scale
    size, rewards, _ = random_rewards(seed)
    rollouts, theirs = stepped(grpo, size, outcome=rewards)
    same(c.group_relative.trl(scale_rewards=scale)(rollouts), theirs)


@pytest.mark.parametrize("normalize", [False, True])
@FEW
@SEEDS
def test_rloo(rloo, normalize, seed):
    rloo.normalize_advantages = normalize
    size, rewards, _ = random_rewards(seed)
    rollouts, theirs = stepped(rloo, size, outcome=rewards)
    same(c.rloo.trl(normalize_advantages=normalize)(rollouts), theirs)


@FEW
@SEEDS
def test_gdpo(gdpo, seed):
    size, first, second = random_rewards(seed)
    rollouts, theirs = stepped(gdpo, size, outcome=first, format=second)
    same(c.gdpo.trl(weights=(1.0, 0.5))(rollouts), theirs)


def scored(rewards: Rewards) -> tuple[Rollouts, Tensor]:
    """The method of AsyncGRPO's rollout worker that scores a group needs neither vLLM nor the rest of the worker."""
    from accelerate import PartialState
    from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, TrainingSequence, _AsyncRolloutLoop

    PartialState()  # TRL's logger asks for it
    worker = SimpleNamespace(
        reward_funcs=[outcome], reward_func_names=["outcome"], _env_reward_types=[], _provides_rollout_reward=False
    )
    size = len(rewards)
    group = RolloutGroup(
        prompts=[[]] * size,
        reward_kwargs={"outcome": rewards},
        completions=[[]] * size,
        completions_ids=[[1]] * size,
        completions_sequences=[[TrainingSequence([0, 1], [0, 1], [0.0, -1.0], "")]] * size,
        tool_call_counts=[0] * size,
        tool_failure_counts=[0] * size,
        model_version=0,
        group_id=0,
        env_rewards=[None] * size,
        rollout_rewards=[None] * size,
    )
    samples = asyncio.run(_AsyncRolloutLoop._score_group(worker, group))
    rollouts = Rollouts.from_lists([[0, 1]] * size, [0] * size, action_mask=[[False, True]] * size)
    rollouts = rollouts.with_signals(outcome=Signal(measured(rewards), "trajectory"))
    return rollouts, torch.tensor([s.advantage for s in samples])


@FEW
@SEEDS
def test_async_grpo(seed):
    size, rewards, _ = random_rewards(seed)
    rollouts, theirs = scored(rewards[:size])
    same(c.group_relative.trl_async()(rollouts), theirs)


@pytest.mark.parametrize("rewards", [[0.75, None, None, None], [None] * 4])
def test_one_measured_response_or_none(grpo, rloo, rewards):
    grpo.scale_rewards, rloo.normalize_advantages = "group", False
    for (rollouts, theirs), ours in [
        (stepped(grpo, 4, outcome=rewards), c.group_relative.trl()),
        (stepped(rloo, 4, outcome=rewards), c.rloo.trl()),
        (scored(rewards), c.group_relative.trl_async()),
    ]:
        same(ours(rollouts), theirs)
        assert not theirs.any()


def test_equal_rewards_give_nothing(grpo):
    """99 groups of twelve rewards of 0.01 ... 0.99: ours are exactly 0; TRL divides what rounding leaves by 1e-4."""
    grpo.scale_rewards = "group"
    rollouts, theirs = stepped(grpo, 12, outcome=[k / 100 for k in range(1, 100) for _ in range(12)])
    assert not c.group_relative.trl()(rollouts).advantages.any()
    assert 1e-4 < theirs.abs().max() < 0.01


def test_equal_rewards_give_nothing_in_async_grpo():
    """There eps is 1e-8, but the arithmetic is in float64."""
    rollouts, theirs = scored([0.99] * 12)
    assert not c.group_relative.trl_async()(rollouts).advantages.any()
    assert theirs.abs().max() < 1e-6
