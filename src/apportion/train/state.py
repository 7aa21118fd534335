"""What changes from step to step, and what a checkpoint holds of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from apportion.train.checkpoint import load_checkpoint, save_checkpoint
from apportion.train.config import Config, Learned, Measure
from apportion.train.measuring import required
from apportion.train.policy import CausalPolicy
from apportion.train.schedule import rate
from apportion.train.watching import Watch
from apportion.types import Rollouts


class State:
    """Counters, optimizer, the steered KL weight, measures that learn, and the watch over collapse and progress."""

    def __init__(self, config: Config, policy: CausalPolicy, measures: Sequence[Measure]):
        self.config, self.policy = config, policy
        self.learned = [m for m in measures if isinstance(m, Learned)]
        self.step = self.warmed = self.drawn = self.tokens = 0
        self.kl_coef = config.kl_coef
        self.watch = Watch(config)
        self.rollouts: Rollouts | None = None
        self.optimizer = self.new_optimizer()

    @property
    def done(self) -> bool:
        """No step is left, or the watch has stopped the run."""
        return self.step >= self.config.steps or self.watch.reason is not None

    @property
    def _checkpoints(self) -> Path:
        return self.config.folder / "checkpoints"

    @property
    def critic_alone(self) -> bool:
        """The step that comes belongs to the critic's warm-up."""
        return self.step < self._policy_begins

    @property
    def _policy_begins(self) -> int:
        """Steps before the first that trains the policy."""
        return 0 if self.config.critic == "none" else self.config.critic_warmup

    def new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; the value head has its own learning rate."""
        named = self.policy.trainable()
        head = [p for name, p in named.items() if name.startswith("value_head.")]
        body = [p for name, p in named.items() if not name.startswith("value_head.")]
        groups = [
            {"params": body, "peak": self.config.lr, "after": self._policy_begins},
            {"params": head, "peak": self.config.rate_of_critic, "after": 0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=self.config.lr,
            betas=(0.9, 0.99),
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    def set_rate(self) -> float:
        """The learning rates of the step that comes, as the schedule says; returns that of the policy.

        Each ramp begins with the first step that trains what it is for.
        """
        c = self.config
        for group in self.optimizer.param_groups:
            done, total = self.step - group["after"], c.steps - group["after"]
            share = rate(done + 1, total, ramp=c.lr_ramp, schedule=c.lr_schedule, final=c.lr_final)
            group["lr"] = group["peak"] * max(share, 0.0)
        return float(self.optimizer.param_groups[0]["lr"])

    @contextmanager
    def parameters(self) -> Iterator[list[torch.nn.Parameter]]:
        """What the step that comes may change: everything trainable, or the value head alone."""
        named = self.policy.trainable()
        frozen = [p for name, p in named.items() if self.critic_alone and not name.startswith("value_head.")]
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield list(self.policy.trainable().values())
        finally:
            for p in frozen:
                p.requires_grad_(True)

    def save(self) -> None:
        """Write a checkpoint; killed during it, the one before is still there."""
        state = {
            "step": self.step,
            "warmed": self.warmed,
            "drawn": self.drawn,
            "tokens": self.tokens,
            "kl_coef": self.kl_coef,
            "weights": {name: p.detach() for name, p in self.policy.trainable().items()},
            "optimizer": self.optimizer.state_dict(),
            "reference": self.policy.reference_state(),
            "learned": [measure.state_dict() for measure in self.learned],
            "watch": self.watch.state_dict(),
        }
        save_checkpoint(self._checkpoints, self.warmed + self.step, state)

    def load(self) -> None:
        """Go on from the newest checkpoint, or from the beginning if there is none."""
        saved = load_checkpoint(self._checkpoints)
        if saved is None:
            return
        for name in ("step", "warmed", "drawn", "tokens", "kl_coef"):
            setattr(self, name, saved[name])
        with torch.no_grad():
            for name, p in self.policy.trainable().items():
                p.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        for measure, state in zip(self.learned, saved["learned"], strict=True):
            measure.load_state_dict(state)
        self.watch.load_state_dict(saved["watch"])
        if "ref_logprobs" in required(self.config) and self.step:
            self.policy.load_reference(saved["reference"])
