"""Before credit: everything that a method and a loss require is measured, and what cannot be is refused at the start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apportion.signals import TOKEN_STATISTICS, AttentionRhythm
from apportion.tasks import Problem
from apportion.train.config import Config, Measure, Split
from apportion.train.learner import NotFinite, in_parts
from apportion.train.policy import CausalPolicy
from apportion.types import Rollouts, Signal, Spans

ALWAYS = {"tokens", "logprobs", "signals.outcome", "group_ids", "trajectory_ids", "action_mask", "lengths", "truncated"}
STATISTICS = {f"signals.{name}": name for name in TOKEN_STATISTICS}


@dataclass(frozen=True)
class SpansFrom:
    """A measure that cuts the spans `name` with a splitter, as in `SpansFrom("macro", fixed_ngrams(5))`."""

    name: str
    splitter: Split
    requires: tuple[str, ...] = ("tokens",)

    @property
    def provides(self) -> tuple[str, ...]:
        """The spans."""
        return (f"spans.{self.name}",)

    def measure(self, rollouts: Rollouts) -> dict[str, Spans]:
        """The spans by their name."""
        return {self.name: self.splitter(rollouts)}


# ---- what is needed, and who supplies it ------------------------------------------------------------------------------


def measures_of(config: Config) -> list[Measure]:
    """The judge (the run's, else the task's), the other measures and the attention, those that are needed, in order.

    Raises:
        ValueError: something is required that nothing here supplies, with the cure.
    """
    chosen, needs = _chosen(config)
    supplied = ALWAYS | STATISTICS.keys() | {p for m in chosen for p in m.provides} | {"ref_logprobs"}
    supplied |= {"values"} if config.critic else set()
    supplied |= {"spans.step"} if splitter_of(config) is not None else set()
    missing = sorted(needs - supplied)
    if missing:
        raise ValueError(
            f"{config.credit!r} needs {', '.join(missing)}, which nothing in this run supplies. {_cure(missing[0])}"
        )
    return chosen


def required(config: Config) -> set[str]:
    """What the credit method, the loss and the measures chosen for them read."""
    return _chosen(config)[1]


def statistics_of(config: Config) -> list[str]:
    """The statistics of the policy's logits that are required and that no measure provides."""
    chosen, needs = _chosen(config)
    needs -= {p for m in chosen for p in m.provides}
    return [name for key, name in STATISTICS.items() if key in needs]


def _chosen(config: Config) -> tuple[list[Measure], set[str]]:
    """The measures that are needed, in order, and everything that is required with them.

    The last measure that provides something supplies it; one before is needed only for what the later ones require. The
    credit's own output is not an input.
    """
    judge = config.judge if config.judge is not None else getattr(config.task, "judge", None)
    offered: list[Measure] = [m for m in (AttentionRhythm(), judge, *config.measures) if m is not None]
    needs = {r for r in (*config.credit.requires, *config.loss().requires) if not r.startswith("credit.")}
    open_, chosen = set(needs), list[Measure]()
    for measure in reversed(offered):
        if open_ & set(measure.provides):
            chosen.insert(0, measure)
            open_ = (open_ - set(measure.provides)) | set(measure.requires)
            needs |= set(measure.requires)
    return chosen, needs


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
    """Reference log-probabilities, values, statistics of the logits, spans, judges: as far as they are required."""
    needs = required(config)

    def read(of: Any) -> Tensor:
        return in_parts(rollouts, config.micro_tokens, lambda part: of(part, part.action_mask))

    if "ref_logprobs" in needs:
        rollouts = replace(rollouts, ref_logprobs=read(policy.reference_logprobs))
    if "values" in needs:
        rollouts = replace(rollouts, values=read(policy.values))
    rollouts = with_statistics(rollouts, policy, statistics_of(config), config.micro_tokens)
    splitter = splitter_of(config)
    if splitter is not None:
        rollouts = rollouts.with_spans(step=splitter(rollouts))
    for measure in measures:
        rollouts = _with(rollouts, measure.measure(rollouts))
    return rollouts


def with_statistics(rollouts: Rollouts, policy: CausalPolicy, names: Sequence[str], micro_tokens: int) -> Rollouts:
    """The named statistics of the logits as token signals.

    What the sampler took stays: it describes the distribution that was acted upon, which in bfloat16 is not quite the
    learner's. For rollouts that came without, the learner makes one pass.
    """
    absent = [name for name in names if name not in rollouts.signals]
    if not absent:
        return rollouts
    found = in_parts(rollouts, micro_tokens, lambda part: policy.statistics(part, part.action_mask, absent))
    return rollouts.with_signals(**{n: Signal(x, "token") for n, x in zip(absent, found.unbind(2), strict=True)})


def _with(rollouts: Rollouts, found: Mapping[str, Signal | Spans]) -> Rollouts:
    """The rollouts with what a measure returned; spans first, because its signals may be over them."""
    spans = {name: x for name, x in found.items() if isinstance(x, Spans)}
    signals = {name: x for name, x in found.items() if isinstance(x, Signal)}
    return rollouts.with_spans(**spans).with_signals(**signals)


def _cure(missing: str) -> str:
    cures = {
        "values": "Train with critic=True (--critic).",
        "spans.step": "Give a splitter, such as lines() (--splitter lines).",
        "signals.judge": "Give a judge (--judge tool, or the address of an OpenAI-compatible server).",
        "signals.log_ratio": "Give measures=(ModelLogRatio(MODEL),).",
        "signals.contrast": "Give measures=(PromptContrast(MODEL),).",
        "signals.goal_cosine": "Give measures=(GoalCosine(STATE),).",
    }
    return cures.get(missing, f"Give a measure that provides {missing}, or choose another method.")
