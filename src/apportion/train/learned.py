"""A second model that learns beside the policy: what the critic and the online reward model have in common."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from apportion.losses import Loss, add_losses
from apportion.train.learner import NotFinite, learn
from apportion.train.policy import CausalPolicy
from apportion.train.schedule import LEARNING, generator_for
from apportion.train.scoring import check_tokens, second_model
from apportion.types import Credit, Rollouts


@dataclass(eq=False, repr=False, kw_only=True)
class SecondModel:
    """A model with an optimizer of its own, made when it is first needed, and all of it in the checkpoint.

    Args:
        model: a folder, a hub name or a packaged model with the policy's tokenizer; all its weights are trained, of the
            folder of an adapter only the adapter.
            None = a copy of the policy at the first step, which is after its warm-up; of a policy with a LoRA adapter
            only the adapter is copied and trained, the rest is shared.
        lr: constant learning rate of AdamW (0.9, 0.99).
        weight_decay: of AdamW.
        grad_clip: largest gradient norm.
        epochs, parts: passes over the rollouts of a step, and how many updates in each, as for the policy.
        micro_tokens: tokens in one pass; no result depends on it.
        activation_checkpointing: less memory for a third more time.
        seed: of the order of the parts.

    Raises:
        ValueError: not attached to a policy; a model that reads other tokens than the policy writes.
    """

    model: str | None = None
    lr: float = 1e-5
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    epochs: int = 1
    parts: int = 1
    micro_tokens: int = 1024
    activation_checkpointing: bool = False
    seed: int = 0
    updates: int = field(default=0, init=False)
    _policy: CausalPolicy | None = field(default=None, init=False)
    _second: CausalPolicy | None = field(default=None, init=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False)

    def __repr__(self) -> str:
        own = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init and self._differs(f)]
        return f"{type(self).__name__}({', '.join(own)})"

    def _differs(self, f: Any) -> bool:
        return bool(getattr(self, f.name) != f.default)

    def attach(self, policy: CausalPolicy) -> None:
        """Start afresh beside this policy; a named model is loaded now."""
        self._policy, self._second, self._optimizer, self.updates = policy, None, None, 0
        if self.model is not None:
            self.second  # noqa: B018

    @property
    def second(self) -> CausalPolicy:
        """The model, loaded or copied when it is first asked for."""
        if self._second is None:
            if self._policy is None:
                raise ValueError(f"{self!r} is not attached to a policy. Call attach(policy); the trainer does.")
            self._second = self._made(self._policy)
            check_tokens(repr(self), self._second, self._policy)
        return self._second

    def _made(self, policy: CausalPolicy) -> CausalPolicy:
        recomputed = self.activation_checkpointing
        return second_model(self.model, policy, temperature=policy.temperature, activation_checkpointing=recomputed)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that learn, by name."""
        return self.second.trainable()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over them."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(
                self.trained.values(), lr=self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True
            )
        return self._optimizer

    def _learn(self, model: Any, rollouts: Rollouts, credit: Credit, loss: Loss) -> Mapping[str, float]:
        """The updates of one step; `model` is what is asked for outputs."""
        try:
            metrics = learn(
                model,
                list(self.trained.values()),
                self.optimizer,
                rollouts,
                credit,
                add_losses(loss),
                epochs=self.epochs,
                parts=self.parts,
                generator=generator_for(self.seed, self.updates, LEARNING),
                micro_tokens=self.micro_tokens,
                grad_clip=self.grad_clip,
            )
        except NotFinite as error:
            raise NotFinite(f"in {self!r} {error}", error.rows) from error
        self.updates += 1
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The weights that learn, the optimizer, and the number of updates."""
        if self._second is None:
            return {"updates": 0, "weights": None, "optimizer": None}
        weights = {name: p.detach() for name, p in self.trained.items()}
        return {"updates": self.updates, "weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.updates = state["updates"]
        if state["weights"] is None:
            return
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # which would keep the tensors it is given
