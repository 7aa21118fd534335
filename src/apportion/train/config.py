"""Everything a run is told, in one flat dataclass. Every option says its default and why."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from apportion.losses import (
    Aggregation,
    EntropyBonus,
    KLToReference,
    Loss,
    LossSum,
    PolicyGradient,
    ValueLoss,
    add_losses,
)
from apportion.tasks import Task
from apportion.types import Credit, Rollouts, Signal, Spans


class Estimator(Protocol):
    """What the trainer needs of a credit method: any estimator of `apportion.credit`, or the user's own."""

    @property
    def requires(self) -> tuple[str, ...]:
        """What the rollouts must have."""

    def __call__(self, rollouts: Rollouts) -> Credit:
        """The credit of every token."""


class Measure(Protocol):
    """Measures signals before credit: a judge, a process reward model. It may also cut spans.

    If it has a method `attach(policy)`, that is called once, when the model is loaded.
    """

    @property
    def provides(self) -> tuple[str, ...]:
        """What it measures, such as "signals.judge" or "spans.macro"."""

    @property
    def requires(self) -> tuple[str, ...]:
        """What the rollouts must have before."""

    def measure(self, rollouts: Rollouts) -> Mapping[str, Signal | Spans]:
        """The signals and spans it provides, by name."""


class Split(Protocol):
    """Cuts responses into steps."""

    def __call__(self, rollouts: Rollouts) -> Spans:
        """The spans "step"."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is told in numbers and words; `Config` adds the objects."""

    model: str
    """A folder, a hub name (owner/name) or a packaged model (smollm2-135m-instruct)."""
    out: str
    """Folder of the run; must be new or empty."""
    seed: int = 0
    """Fixes prompts, sampling and fresh weights; equal seeds give equal numbers on one machine."""

    steps: int = 50
    """Policy updates."""
    prompts_per_step: int = 8
    """Groups a step."""
    group_size: int = 8
    """Responses per prompt."""
    max_new_tokens: int = 32
    """Limit of a response."""
    temperature: float = 1.0
    """Of sampling; the learner's log-probabilities use the same."""
    truncated_reward: float | None = 0.0
    """Outcome of a response that was cut by the limit; None = let the verifier decide."""

    lr: float = 1e-5
    """Learning rate of AdamW (0.9, 0.99) after its linear ramp; on the 135M model 1e-5 learnt, 2e-5 got worse."""
    lr_ramp: int = 4
    """Steps of the linear ramp to `lr`."""
    weight_decay: float = 0.0
    """Of AdamW."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    clip_low: float | None = 0.2
    """The ratio is not rewarded below 1 - clip_low."""
    clip_high: float | None = 0.28
    """The ratio is not rewarded above 1 + clip_high."""
    ratio: Literal["token", "sequence"] = "token"
    """What one importance ratio covers."""
    aggregation: Aggregation = "token_mean"
    """How token losses become one number; token_mean weighs every token of the step equally."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference (the model after the warm-up); 0 keeps no reference."""
    kl_estimator: Literal["k3", "k1"] = "k3"
    """k3 is never negative."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    critic: bool = False
    """Train a value head on the last hidden state; methods that need `values` (gae) ask for it."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_clip: float | None = 0.2
    """Largest move of a value in one update."""
    critic_lr: float = 1e-3
    """Learning rate of the value head."""
    lora_rank: int = 0
    """Rank of a LoRA adapter on all linear layers; 0 trains all weights."""
    lora_alpha: int = 0
    """Scale of the adapter; 0 = twice the rank."""

    warmup: int = 0
    """Supervised steps on the task's worked solutions before the first policy update."""
    warmup_lr: float = 1e-4
    """Peak learning rate of the warm-up; it falls linearly to a tenth."""
    warmup_batch: int = 16
    """Solutions per supervised step."""

    unmeasured: Literal["stop", "skip"] = "stop"
    """A reward that is NaN: stop the run, or leave the response out of every statistic."""

    eval_every: int = 10
    """Steps between evaluations; there is one before and one after. 0 = no evaluation."""
    eval_size: int = 256
    """Held-out problems, the first of the task's test problems."""
    eval_temperature: float = 1.0
    """1 = as the policy samples, 0 = greedy."""
    save_every: int = 10
    """Steps between checkpoints; the newest is kept. 0 = none."""
    save_model: bool = True
    """Write RUN/model, a plain Hugging Face folder, at the end."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there too."""

    threads: int = 1
    """Processor threads; 1 is the safe choice on a busy machine."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of sampler and learner; weights are always float32. auto = bfloat16 where the processor has it."""
    micro_tokens: int = 1024
    """Tokens in one forward and backward pass; changes memory and speed, not the result."""
    sample_rows: int = 64
    """Responses decoded together."""
    share_prompt: bool = True
    """Compute a group's prompt once in the update."""
    skip_flat: bool = True
    """Skip responses on which every term of the loss has zero gradient."""
    progress: bool = True
    """Print a line per step and show progress bars."""


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """One run: its options, and the objects that do the work, the library's or the user's own."""

    task: Task
    """Prompts with a verifier; see `apportion tasks`."""
    credit: Estimator
    """The credit method; see `apportion methods`."""
    judge: Measure | None = None
    """Measures the signal "judge"; None = the task's own."""
    splitter: Split | None = None
    """Cuts responses into steps; None = the task's own."""
    measures: tuple[Measure, ...] = ()
    """More measures, in order."""

    def loss(self) -> LossSum:
        """The terms of the loss that these options ask for."""
        shape: dict[str, Any] = {"aggregation": self.aggregation, "horizon": self.max_new_tokens}
        terms: list[Loss] = [
            PolicyGradient(clip_low=self.clip_low, clip_high=self.clip_high, ratio=self.ratio, **shape)
        ]
        if self.kl_coef:
            terms.append(KLToReference(coef=self.kl_coef, estimator=self.kl_estimator, **shape))
        if self.entropy_coef:
            terms.append(EntropyBonus(coef=self.entropy_coef, **shape))
        if self.critic:
            terms.append(ValueLoss(coef=self.value_coef, clip=self.value_clip, **shape))
        return add_losses(*terms)

    def printable(self) -> dict[str, Any]:
        """Every option as JSON: numbers and text as they are, objects as their expression."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v if isinstance(v, str | int | float | bool | None) else _expression(v) for k, v in values.items()}

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out).expanduser()


def _expression(value: Any) -> str:
    if " object at 0x" in repr(value):  # an address would differ in every process
        return f"{type(value).__module__}:{type(value).__qualname__}"
    return repr(value)
