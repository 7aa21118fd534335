"""Before credit: everything that a method and a loss require is measured, and what cannot be is refused at the start."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from apportion.tasks import Problem
from apportion.train.config import Config, Measure
from apportion.train.learner import NotFinite
from apportion.train.policy import CausalPolicy
from apportion.types import Rollouts, Signal

ALWAYS = {"tokens", "logprobs", "signals.outcome", "group_ids", "trajectory_ids", "action_mask", "lengths", "truncated"}


def required(config: Config) -> set[str]:
    """What the credit method and the loss read; the credit's own output is not an input."""
    return {r for r in (*config.credit.requires, *config.loss().requires) if not r.startswith("credit.")}


def measures_of(config: Config) -> list[Measure]:
    """The judge (the run's, else the task's) and the other measures, those that are needed, in order.

    Raises:
        ValueError: something is required that nothing here supplies, with the cure.
    """
    judge = config.judge if config.judge is not None else getattr(config.task, "judge", None)
    offered: list[Measure] = [m for m in (judge, *config.measures) if m is not None]
    needs = required(config)
    chosen: list[Measure] = []
    for measure in reversed(offered):
        if needs & set(measure.provides):
            chosen.insert(0, measure)
            needs |= set(measure.requires)
    supplied = ALWAYS | {p for m in chosen for p in m.provides} | {"ref_logprobs"}
    supplied |= {"values"} if config.critic else set()
    supplied |= {"spans.step"} if splitter_of(config) is not None else set()
    missing = sorted(needs - supplied)
    if missing:
        raise ValueError(
            f"{config.credit!r} needs {', '.join(missing)}, which nothing in this run supplies. {_cure(missing[0])}"
        )
    return chosen


def splitter_of(config: Config) -> Any:
    """The run's splitter, else the task's."""
    return config.splitter if config.splitter is not None else getattr(config.task, "splitter", None)


def verified(rollouts: Rollouts, problems: Sequence[Problem], config: Config, *, may_miss: bool) -> Rollouts:
    """The outcome of every response, as the signal "outcome".

    Raises:
        NotFinite: an outcome is infinite, or NaN unless some `may_miss`.
    """
    assert rollouts.truncated is not None
    rewards = []
    for problem, text, cut in zip(problems, rollouts.meta["text"], rollouts.truncated.tolist(), strict=True):
        fixed = config.truncated_reward if cut else None
        rewards.append(float(config.task.verify(problem, text)) if fixed is None else fixed)
    outcome = torch.tensor(rewards, device=rollouts.device)
    bad = outcome.isinf() if may_miss else ~outcome.isfinite()
    if bool(bad.any()):
        rows = bad.nonzero()[:, 0].tolist()
        raise NotFinite(f"the reward is {rewards[rows[0]]}", rows)
    return rollouts.with_signals(outcome=Signal(outcome, "trajectory"))


def measured(rollouts: Rollouts, policy: CausalPolicy, config: Config, measures: Sequence[Measure]) -> Rollouts:
    """Spans, judges, values and reference log-probabilities, as far as they are required."""
    needs = required(config) | {r for m in measures for r in m.requires}
    splitter = splitter_of(config)
    if splitter is not None:
        rollouts = rollouts.with_spans(step=splitter(rollouts))
    for measure in measures:
        rollouts = rollouts.with_signals(**measure.measure(rollouts))
    if "values" in needs:
        with torch.no_grad():
            values = policy.outputs(rollouts, rollouts.action_mask, ("values",)).values
        rollouts = replace(rollouts, values=values)
    if "ref_logprobs" in needs:
        rollouts = replace(rollouts, ref_logprobs=policy.reference_logprobs(rollouts, rollouts.action_mask))
    return rollouts


def _cure(missing: str) -> str:
    cures = {
        "values": "Train with critic=True (--critic).",
        "spans.step": "Give a splitter, such as lines() (--splitter lines).",
        "signals.judge": "Give a judge (--judge tool, or the address of an OpenAI-compatible server).",
    }
    return cures.get(missing, f"Give a measure that provides {missing}, or choose another method.")
