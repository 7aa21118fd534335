"""Before credit: everything that a method and a loss require is measured, and what cannot be is refused at the start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apportion.signals import TOKEN_STATISTICS, AttentionRhythm
from apportion.train.config import Config, Measure, Split
from apportion.train.critic import Critic
from apportion.train.kl import penalised
from apportion.train.learner import in_parts
from apportion.train.policy import CausalPolicy
from apportion.train.rewards import signal_names
from apportion.train.turns import supplied as supplied_by
from apportion.types import Rollouts, Signal, Spans

ALWAYS = {"tokens", "logprobs", "signals.outcome", "group_ids", "trajectory_ids", "action_mask", "lengths", "truncated"}
FROM_POLICY = {"old_logprobs", "ref_logprobs", "signals.kl_coef"}
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
    """The judge (the run's, else the task's), the other measures, the critic and the attention: those that are needed.

    Raises:
        ValueError: something is required that nothing here supplies, with the cure.
    """
    chosen, _ = _chosen(config)
    supplied = ALWAYS | FROM_POLICY | STATISTICS.keys() | {p for m in chosen for p in m.provides}
    supplied |= {"values"} if config.critic == "head" else set()
    supplied |= {"spans.step"} if splitter_of(config) is not None else set()
    supplied |= {f"signals.{name}" for name in signal_names(config)}
    supplied |= supplied_by(config.task)
    asking = {repr(config.estimator): config.estimator.requires, f"ratio={config.ratio!r}": config.loss().requires}
    for who, requires in {**asking, **{repr(m): m.requires for m in chosen}}.items():
        missing = sorted(r for r in requires if r not in supplied and not r.startswith("credit."))
        if missing:
            raise ValueError(f"{who} needs {', '.join(missing)}, which nothing in this run supplies. {_cures(missing)}")
    return chosen


def required(config: Config) -> set[str]:
    """What the credit method, the loss, the other options and the measures chosen for them read."""
    return _chosen(config)[1]


def _needs(config: Config) -> set[str]:
    """What the credit method, the loss and the other options read; the credit's own output is not an input."""
    needs = {r for r in (*config.estimator.requires, *config.loss().requires) if not r.startswith("credit.")}
    needs |= {"ref_logprobs"} if config.kl_coef else set()
    # A distance from the reference is taken between two passes of one kind: a bfloat16 sampler would add its rounding, which
    # a method that divides by the spread of its group blows up to full size.
    apart = config.kl_coef and (config.kl_in != "loss" or config.kl_target is not None)
    if apart or "ref_logprobs" in config.estimator.requires or config.inner_epochs * config.mini_batches > 1:
        needs |= {"old_logprobs"}
    return needs | {"signals.entropy"}  # logged in every run: the first thing to look at when one collapses


def statistics_of(config: Config) -> list[str]:
    """The statistics of the policy's logits that are required and that no measure provides."""
    chosen, needs = _chosen(config)
    needs -= {p for m in chosen for p in m.provides}
    return [name for key, name in STATISTICS.items() if key in needs]


def _chosen(config: Config) -> tuple[list[Measure], set[str]]:
    """The measures that are needed, in order, and everything that is required with them.

    The last measure that provides something supplies it; one before is needed only for what the later ones require.
    """
    judge = config.judge if config.judge is not None else getattr(config.task, "judge", None)
    critic = Critic.of(config) if config.critic == "model" else None
    offered: list[Measure] = [m for m in (AttentionRhythm(), judge, critic, *config.measures) if m is not None]
    needs = _needs(config)
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


def measured(
    rollouts: Rollouts, policy: CausalPolicy, config: Config, measures: Sequence[Measure], kl_coef: float
) -> Rollouts:
    """Log-probabilities of learner and reference, values, statistics, spans, judges: as far as they are required.

    `kl_coef` is the present weight of the KL penalty.
    """
    needs = required(config)

    def read(of: Any) -> Tensor:
        return in_parts(rollouts, config.micro_tokens, lambda part: of(part, part.action_mask))

    if "old_logprobs" in needs:
        rollouts = replace(rollouts, old_logprobs=read(lambda part, where: policy.outputs(part, where).logprobs))
    if "ref_logprobs" in needs:
        rollouts = replace(rollouts, ref_logprobs=read(policy.reference_logprobs))
    if "values" in needs and config.critic == "head":
        rollouts = replace(rollouts, values=read(policy.values))
    if "signals.kl_coef" in needs:
        rollouts = rollouts.with_signals(kl_coef=Signal(torch.tensor([kl_coef], device=rollouts.device), "batch"))
    if config.kl_coef and config.kl_in == "reward":
        rollouts = penalised(rollouts, kl_coef)
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


def _with(rollouts: Rollouts, found: Mapping[str, Signal | Spans | Tensor]) -> Rollouts:
    """The rollouts with what a measure returned; spans first, because its signals may be over them."""
    fields: dict[str, Any] = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    rollouts = replace(rollouts, **fields)
    spans = {name: x for name, x in found.items() if isinstance(x, Spans)}
    signals = {name: x for name, x in found.items() if isinstance(x, Signal)}
    return rollouts.with_spans(**spans).with_signals(**signals)


def _cures(missing: Sequence[str]) -> str:
    cures = {
        "values": "Train with a critic (--critic head, or --critic model).",
        "spans.step": "Give a splitter, such as lines() (--splitter lines).",
        "spans.turn": "Use a task that answers turns, such as calculator.",
        "signals.turn_reward": "Use a task that answers turns, such as calculator.",
        "spans.turn.state": "Use a task whose environment tells its state from the start.",
        "spans.macro": 'Give measures=(SpansFrom("macro", fixed_ngrams(5)),).',
        "signals.judge": "Give a judge (--judge tool, or the address of an OpenAI-compatible server).",
        "signals.log_ratio": "Give measures=(OnlinePRM(),), or ModelLogRatio(MODEL).",
        "signals.decoded": "Give a measure of the factors and a decoder, measures=(FACTORS, LinearDecoder()).",
        "signals.contrast": "Give measures=(PromptContrast(MODEL),).",
        "signals.goal_cosine": "Give measures=(GoalCosine(STATE),).",
    }
    found = dict.fromkeys(cures.get(m, f"Give a measure that provides {m}, or choose another method.") for m in missing)
    return " ".join(found)
