"""The rollouts of a step: prompts are drawn, responses sampled and rewarded, and groups that teach nothing replaced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from apportion.tasks import Problem
from apportion.train.config import Config
from apportion.train.joining import joined
from apportion.train.learner import NotFinite
from apportion.train.measuring import statistics_of
from apportion.train.policy import CausalPolicy, Request
from apportion.train.rewards import rewarded
from apportion.train.sampler import Sampling
from apportion.train.schedule import draw, generator_for
from apportion.train.turns import converse
from apportion.types import Rollouts

Sample = Callable[..., Rollouts]
"""`sample(requests, sampling, generator=..., statistics=..., on_rows=...)`."""


@dataclass(frozen=True)
class Collected:
    """What a step sampled: the rollouts kept, the prompts drawn, every token sampled, and the groups thrown away."""

    rollouts: Rollouts
    drawn: int
    tokens: int
    refilled: int


def sampler_of(config: Config, policy: CausalPolicy) -> Sample:
    """How this task's rollouts are sampled: in one turn, or in a conversation with its environment."""
    environment = getattr(config.task, "environment", None)
    if environment is None:
        return policy.sample
    return partial(
        converse, policy, environment=environment, max_turns=config.max_turns, tool_seconds=config.tool_seconds
    )


def sampling_of(config: Config) -> Sampling:
    """How the policy draws its tokens."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=config.stop,
    )


def collect(config: Config, sample: Sample, step: int, start: int, bar: Any) -> Collected:
    """Sample and reward the groups of a step, whose prompts begin at place `start` of the training list.

    With `refill`, every group whose rewards are all equal is replaced by a new prompt, in at most that many further
    rounds (dynamic sampling, DAPO, arXiv 2503.14476). What is still flat then stays, so a step always has its number of
    groups; a group with an unmeasured reward counts as flat if the measured ones are equal.
    """
    kept: list[Rollouts] = []
    wanted, drawn, tokens, refilled = config.prompts_per_step, 0, 0, 0
    for turn in range(config.refill + 1):
        problems = draw(config.task.train, wanted, config.seed, start + drawn)
        drawn += wanted
        rollouts = _sampled(config, sample, problems, step, turn, bar)
        tokens += int(rollouts.action_mask.sum())
        flat = flat_groups(rollouts)
        last = turn == config.refill or not bool(flat.any())
        alive = torch.ones_like(flat) if last else ~flat
        wanted = int((~alive).sum())
        refilled += wanted
        if bool(alive.any()):
            kept.append(rollouts if last else _groups(rollouts, alive))
        if last:
            break
    return Collected(replace(joined(kept), covers="batch"), drawn, tokens, refilled)


def requests_of(config: Config, problems: Sequence[Problem]) -> list[Request]:
    """Each problem with the number of responses it gets.

    Raises:
        ValueError: the user's `group_sizes` gives no whole number of at least 1; a group without rows is none.
    """
    if config.group_sizes is None:
        return [Request(p, config.group_size) for p in problems]
    requests = [Request(p, config.group_sizes(p)) for p in problems]
    for r in requests:
        if not isinstance(r.count, Integral) or r.count < 1:
            raise ValueError(
                f"group_sizes gives problem {r.problem.id} {r.count!r} responses. Give a whole number of at least 1."
            )
    return requests


def flat_groups(rollouts: Rollouts) -> Bool[Tensor, " G"]:
    """Groups whose measured outcomes are all equal, or none is measured, [G]: their baseline leaves nothing to learn."""
    outcome = rollouts.signals["outcome"].values.double()
    groups, beyond = rollouts.trajectory_groups, outcome.new_full((rollouts.num_groups,), torch.inf)
    low = beyond.scatter_reduce(0, groups, outcome.nan_to_num(torch.inf), "amin")
    top = (-beyond).scatter_reduce(0, groups, outcome.nan_to_num(-torch.inf), "amax")
    return top <= low


def _sampled(config: Config, sample: Sample, problems: list[Problem], step: int, turn: int, bar: Any) -> Rollouts:
    requests = requests_of(config, problems)
    again = f", round {turn + 1}" if turn else ""
    with bar(f"step {step}: sampling{again}", sum(r.count for r in requests)) as advance:
        rollouts = sample(
            requests,
            sampling_of(config),
            generator=generator_for(config.seed, step, turn),
            statistics=statistics_of(config),
            on_rows=advance,
        )
    asked = [problems[g] for g in rollouts.group_ids.tolist()]
    try:
        return rewarded(rollouts, asked, config, may_miss=config.unmeasured == "skip")
    except NotFinite as error:
        error.rollouts = rollouts
        raise


def _groups(rollouts: Rollouts, which: Bool[Tensor, " G"]) -> Rollouts:
    return rollouts.select(which[rollouts.group_ids].nonzero()[:, 0], covers="group")
