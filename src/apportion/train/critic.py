"""A critic with a model of its own, and how well any critic foretells."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from apportion.losses import Outputs, ValueLoss
from apportion.train.config import Config
from apportion.train.learned import SecondModel
from apportion.train.learner import in_parts
from apportion.train.policy import CausalPolicy, body_and_head
from apportion.train.scoring import second_model
from apportion.types import Credit, Rollouts

VALUE_LOSS = ValueLoss()


@dataclass(eq=False, repr=False, kw_only=True)
class Critic(SecondModel):
    """Measures `values` with a model of its own, and teaches it the returns of the credit.

    `V_t = w . h_t + b`, h_t the last hidden state of the model after everything before action t; w and b start at 0, so
    the first step sees V = 0. Its output layer is not used: no logits are formed, and its weights are not trained
    unless they are those of the input layer too.

    Source: PPO, arXiv 1707.06347; a model apart from the policy as in 2203.02155 and 2406.09279.
    Reads: tokens, action_mask; to learn credit.returns, credit.mask and the values measured before. Scope: row.
        Unit: token.
    Cost: a second trained model: its pass over the rollouts, and its update.
    Degenerate: 0 where there is no action. A response cut by the limit has no value after the cut (`bootstrap` stays
        empty, V = 0 there): the limit belongs to the task, and `truncated_reward` is what running into it is worth.

    Args:
        loss: what it learns by.
        model, lr, weight_decay, grad_clip, epochs, parts, micro_tokens, activation_checkpointing,
            seed: as in `SecondModel`.
    """

    loss: ValueLoss = VALUE_LOSS

    provides = ("values",)
    requires = ("tokens",)

    @classmethod
    def of(cls, config: Config) -> "Critic":
        """The critic that the options of a run describe."""
        return cls(
            model=config.critic_model or None,
            loss=config.value_loss(),
            lr=config.rate_of_critic,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            epochs=config.inner_epochs,
            parts=config.mini_batches,
            micro_tokens=config.micro_tokens,
            activation_checkpointing=config.activation_checkpointing,
            seed=config.seed,
        )

    def measure(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """`{"values": [B, T]}`, 0 where there is no action."""
        return {
            "values": in_parts(rollouts, self.micro_tokens, lambda part: self.second.values(part, part.action_mask))
        }

    def update(self, rollouts: Rollouts, credit: Credit) -> dict[str, float]:
        """Learn the returns; value/loss, value/error, value/clipped as `ValueLoss`, and value/grad_norm."""
        metrics = self._learn(self, rollouts, credit, self.loss)
        return {k: v for k, v in metrics.items() if k.startswith("value/")} | {"value/grad_norm": metrics["grad_norm"]}

    def outputs(self, rollouts: Rollouts, where: Bool[Tensor, "B T"], needs: Any = ()) -> Outputs:
        """Values at the positions of `where`, with gradient; a critic has no log-probabilities, they are 0."""
        values = self.second.values(rollouts, where)
        return Outputs(torch.zeros_like(values), values)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights of the body and of the value head."""
        body, _ = body_and_head(self.second.model)
        used = {id(p) for p in body.parameters()}
        return {k: p for k, p in self.second.trainable().items() if id(p) in used or k.startswith("value_head.")}

    def _made(self, policy: CausalPolicy) -> CausalPolicy:
        return second_model(self.model, policy, critic=True, activation_checkpointing=self.activation_checkpointing)


def explained(rollouts: Rollouts, credit: Credit) -> dict[str, float]:
    """value/explained: the share of the variance of the returns R that the critic foretold, over the counted tokens.

    `1 - Var(R - V) / Var(R)`: 1 foretells all, 0 no more than a constant would, below 0 it misleads. V was measured
    before the update, so the rollouts were new to the critic. Returns of GAE with lam < 1 are made of V in part, which
    flatters it; with gamma = lam = 1 they are the outcomes.

    Degenerate: {} without values or returns, and where the returns do not vary.

    Example:
        >>> rollouts = Rollouts.from_lists([[5, 6]], [0], values=[[0.0, 1.0]])
        >>> explained(rollouts, Credit(torch.zeros(1, 2), rollouts.action_mask, returns=torch.tensor([[0.0, 2.0]])))
        {'value/explained': 0.75}
    """
    if rollouts.values is None or credit.returns is None:
        return {}
    values, returns = rollouts.values[credit.mask].double(), credit.returns[credit.mask].double()
    spread = float(returns.var(correction=0)) if len(returns) else 0.0
    return {"value/explained": 1 - float((returns - values).var(correction=0)) / spread} if spread else {}
