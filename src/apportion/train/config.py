"""Everything a run is told, in one flat dataclass. Every option says its default and why."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from apportion.credit import Estimator as LibraryEstimator
from apportion.credit import chain, without_truncated
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
from apportion.tasks import Problem, Task
from apportion.train.rewards import Reward
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

    def measure(self, rollouts: Rollouts) -> Mapping[str, Signal | Spans | Tensor]:
        """The signals and spans it provides, by name; a plain tensor is a field of the rollouts, such as `values`."""


@runtime_checkable
class Learned(Measure, Protocol):
    """A measure that learns beside the policy: it is asked before credit and taught after it."""

    def update(self, rollouts: Rollouts, credit: Credit) -> Mapping[str, float]:
        """Learn from this step's rollouts, whose signals it measured before; returns its metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold: tensors, numbers, text, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""


class Split(Protocol):
    """Cuts responses into steps."""

    def __call__(self, rollouts: Rollouts) -> Spans:
        """The spans "step"."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is told in numbers and words; `Config` adds the objects."""

    model: str
    """A folder, a hub name (owner/name), a packaged model (smollm2-135m-instruct), or the adapter folder of a LoRA run, which is trained on."""
    out: str
    """Folder of the run; must be new or empty."""
    seed: int = 0
    """Fixes prompts, sampling and fresh weights; equal seeds give equal numbers on one machine."""

    # ---- how much ----
    steps: int = 50
    """Batches of rollouts, each followed by its updates."""
    prompts_per_step: int = 8
    """Groups a step."""
    group_size: int = 8
    """Responses per prompt."""
    refill: int = 0
    """Most further rounds of sampling in a step, each with as many new prompts as groups had all rewards equal, which it replaces; 0 keeps them."""

    # ---- sampling ----
    max_new_tokens: int = 32
    """Limit of a response; with a task of several turns, of each turn."""
    min_new_tokens: int = 0
    """The response cannot end before."""
    temperature: float = 1.0
    """Of sampling; the learner's log-probabilities use the same."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this much probability; below 1 the update no longer follows the policy that acted."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 = all."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, and stay in it."""
    max_turns: int = 8
    """Most turns of a task that answers back (tools, games)."""
    tool_seconds: float = 30.0
    """Longest wait for the answer to a turn; then the run stops and names the rollout."""

    # ---- rewards ----
    task_weight: float = 1.0
    """Weight of the task's own verifier beside `rewards`; 0 does not ask it."""
    reward_seconds: float = 60.0
    """Longest wait for one reward; then the run stops and names the reward and the rollout, or leaves it out (`unmeasured`)."""
    unmeasured: Literal["stop", "skip"] = "stop"
    """A reward that is NaN, raises or hangs: stop the run, or leave the response out of every statistic."""
    truncated_reward: float | None = 0.0
    """Outcome of a response that was cut by the limit; below 0 it is a penalty; None = let the rewards decide."""
    mask_truncated: bool = False
    """Leave responses that were cut out of the loss; their outcome still counts in the baseline of their group."""

    # ---- updates ----
    inner_epochs: int = 1
    """Passes over a step's rollouts; above 1 the clip holds the policy near the one that acted."""
    mini_batches: int = 1
    """Parts that a pass is cut into, whole groups in each, one optimizer step per part."""
    lr: float = 1e-5
    """Peak learning rate of AdamW (0.9, 0.99); on the 135M model 1e-5 learnt, 2e-5 got worse."""
    lr_ramp: int = 4
    """Steps of the linear ramp to `lr`."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the ramp; the others fall to `lr_final` at the last step."""
    lr_final: float = 0.1
    """Share of `lr` at the end of a falling schedule."""
    weight_decay: float = 0.0
    """Of AdamW."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    objective: Literal["clip", "cispo"] = "clip"
    """clip drops the gradient where the ratio left its range, cispo keeps it with the ratio cut at 1 + clip_high."""
    clip_low: float | None = 0.2
    """The ratio is not rewarded below 1 - clip_low."""
    clip_high: float | None = 0.28
    """The ratio is not rewarded above 1 + clip_high."""
    dual_clip: float | None = None
    """Largest loss of a bad token, in multiples of its advantage (usually 3); None = no limit."""
    ratio: str = "token"
    """What one importance ratio covers: a token, a sequence, or the name of a span set such as step, turn, macro."""
    aggregation: Aggregation = "token_mean"
    """How token losses become one number; token_mean weighs every token of the step equally."""
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weigh by learner over sampler probability, cut at the cap or dropped beyond it; matters where the two compute differently."""
    correction_cap: float = 2.0
    """Largest such weight."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference (the model after the warm-up); 0 keeps no reference."""
    kl_in: Literal["loss", "reward", "credit"] = "loss"
    """Where the penalty stands: in the loss, taken off the outcome as the sum over the response, or token by token in a method that reads its weight, such as gae(kl_coef="kl_coef")."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    """Of the penalty in the loss; k3 is never negative and pulls towards the reference."""
    kl_weighed: bool = False
    """Multiply the penalty in the loss by the ratio of each token, which TRL does by default."""
    kl_target: float | None = None
    """Nats per token that kl_coef is steered to, up or down by at most a fifth of a step's share; None = fixed."""
    kl_horizon: int = 10000
    """Responses over which kl_coef follows kl_target."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""

    # ---- critic ----
    critic: Literal["none", "head", "model"] = "none"
    """Who supplies `values` to methods that read them (gae): a linear head on the policy's last state, or a model of its own."""
    critic_model: str = ""
    """Where the critic's own model starts; empty = a copy of the policy."""
    critic_lr: float | None = None
    """Learning rate of the critic; None = 1e-3 for a head, 1e-5 for a model of its own, which 1e-3 would wreck."""
    critic_warmup: int = 0
    """First steps that train the critic alone, so that the policy does not follow an empty one."""
    value_coef: float = 0.1
    """Weight of the value loss; with a critic of its own it only scales the gradient before AdamW."""
    value_clip: float | None = 0.2
    """Largest move of a value in one step."""

    # ---- adapter ----
    lora_rank: int = 0
    """Rank of a LoRA adapter on all linear layers; 0 trains all weights."""
    lora_alpha: int = 0
    """Scale of the adapter; 0 = twice the rank."""

    # ---- warm-up ----
    warmup: int = 0
    """Supervised steps on the task's worked solutions before the first policy update."""
    warmup_lr: float = 1e-4
    """Peak learning rate of the warm-up; it falls linearly to a tenth."""
    warmup_batch: int = 16
    """Solutions per supervised step."""

    # ---- evaluation and stopping ----
    eval_every: int = 10
    """Steps between evaluations; there is one before and one after. 0 = no evaluation."""
    eval_size: int = 256
    """Held-out problems, the first of the task's test problems."""
    eval_temperature: float = 1.0
    """1 = as the policy samples, 0 = greedy."""
    eval_samples: int = 1
    """Responses per held-out problem; more give pass@k and the majority's accuracy. The run's top_p, top_k and min_new_tokens do not apply."""
    eval_greedy: bool = False
    """One greedy response more per held-out problem."""
    keep_best: bool = False
    """Keep the model of the best evaluation in RUN/best; it costs the time of writing it."""
    patience: int = 0
    """Stop after this many evaluations without a new best accuracy; 0 = never."""
    collapse_reward: float = 0.0
    """Stop when the mean reward of five steps falls below this share of its best, if that is above 0; 0 = never."""
    collapse_entropy: float = 0.0
    """Stop when the mean entropy of five steps falls below this share of the first five's; 0 = never."""
    collapse_length: float = 0.0
    """Stop when the mean length of five steps falls below this share of the first five's, or rises above its inverse; 0 = never."""

    # ---- what is kept ----
    save_every: int = 10
    """Steps between checkpoints; the newest is kept. 0 = none."""
    save_model: bool = True
    """Write RUN/model at the end, a plain Hugging Face folder with a model card, and RUN/adapter with LoRA."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there too."""

    # ---- machine ----
    threads: int = 1
    """Processor threads; 1 is the safe choice on a busy machine."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of sampler and learner; weights are always float32. auto = bfloat16 where the processor has it."""
    micro_tokens: int = 1024
    """Tokens in one forward and backward pass; gradients are accumulated over them, so it changes memory and speed, not the result."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a fifth to a third more time."""
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
    rewards: tuple[Reward, ...] = ()
    """Rewards beside the task's verifier; the outcome is their weighted sum, and each is a signal of its own name."""
    judge: Measure | None = None
    """Measures the signal "judge"; None = the task's own."""
    splitter: Split | None = None
    """Cuts responses into steps; None = the task's own."""
    measures: tuple[Measure, ...] = ()
    """More measures, in order. Those that learn (`Learned`) are trained after every step and kept in the checkpoint."""
    group_sizes: Callable[[Problem], int] | None = None
    """Responses for a problem; None = `group_size` for each."""

    @property
    def estimator(self) -> LibraryEstimator:
        """The credit that is used: the method, or a class or function of one's own; after it what other options do to it."""
        method = self.credit if isinstance(self.credit, LibraryEstimator) else _estimator(self.credit)
        return chain(method, without_truncated()) if self.mask_truncated else method

    def loss(self, kl_coef: float | None = None) -> LossSum:
        """The terms of the loss that these options ask for; `kl_coef` is the present one, where it is steered."""
        shape: dict[str, Any] = {"aggregation": self.aggregation, "horizon": self.max_new_tokens}
        terms: list[Loss] = [
            PolicyGradient(
                objective=self.objective,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                dual_clip=self.dual_clip,
                ratio=self.ratio,
                correction=self.correction,
                correction_cap=self.correction_cap,
                **shape,
            )
        ]
        if self.kl_coef and self.kl_in == "loss":
            coef = self.kl_coef if kl_coef is None else kl_coef
            terms.append(KLToReference(coef=coef, estimator=self.kl_estimator, weighed=self.kl_weighed, **shape))
        if self.entropy_coef:
            terms.append(EntropyBonus(coef=self.entropy_coef, **shape))
        if self.critic == "head":
            terms.append(self.value_loss())
        return add_losses(*terms)

    def value_loss(self) -> ValueLoss:
        """The loss of the critic."""
        shape: dict[str, Any] = {"aggregation": self.aggregation, "horizon": self.max_new_tokens}
        return ValueLoss(coef=self.value_coef, clip=self.value_clip, **shape)

    def printable(self) -> dict[str, Any]:
        """Every option as JSON: numbers and text as they are, objects as their expression."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: _plain(v) for k, v in values.items()}

    @property
    def reads_outcome(self) -> bool:
        """The credit method says that it reads the outcome, or does not say what it reads."""
        reads = getattr(self.credit, "requires", ())
        return not reads or "signals.outcome" in reads

    @property
    def rate_of_critic(self) -> float:
        """`critic_lr`, or what it stands for."""
        if self.critic_lr is not None:
            return self.critic_lr
        return 1e-5 if self.critic == "model" else 1e-3

    @property
    def evaluates(self) -> bool:
        """There is something to evaluate on, and a time for it."""
        return bool(self.eval_every and self.eval_size and self.task.test)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out).expanduser()


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, tuple) and all(isinstance(x, str) for x in value):
        return list(value)
    return _expression(value)


def _expression(value: Any) -> str:
    """The same text in every process; of functions, and of objects that print their address, what could be imported."""
    if not hasattr(value, "__qualname__") and " object at 0x" in repr(value):
        value = type(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # of what stands inside


def _estimator(own: Any) -> LibraryEstimator:
    name = _expression(own)
    requires, needs = tuple(getattr(own, "requires", ())), getattr(own, "needs_group_of", 1)
    return LibraryEstimator(name, name, name, own, requires, scope="batch", needs_group_of=needs, laws=())
