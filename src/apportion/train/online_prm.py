"""OPRL: a process reward model that is trained online on which response of a group was better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.functional import segment_count
from apportion.losses import Outputs, Totals, implicit_prm_loss
from apportion.train.learned import SecondModel
from apportion.train.scoring import check_against, compared, log_ratio
from apportion.types import Cover, Credit, Rollouts, Signal


@dataclass(eq=False, repr=False, kw_only=True)
class OnlinePRM(SecondModel):
    """Measures the token signal "log_ratio", as `ModelLogRatio` does, of a model that learns from every step.

        log_ratio_t = ln pi_phi(a_t | s_t) - ln pi_acting(a_t | s_t)
        loss(phi)   = mean of -ln sigmoid(S_i - S_j) over pairs of a group with outcome_i > outcome_j,
                      S_i = beta * sum of log_ratio over the response

    A step is scored first and then learnt from, so its rewards come from a phi that had not seen it.

    Source: OPRL, arXiv 2509.19199; `success=0.0` and `mean_over="turn"` are its released code.
    Reads: tokens, and `against`; to learn signals[outcome] and what it measured. Scope: group. Unit: token.
    Cost: a second trained model: its pass over the rollouts, and its update. The loss compares whole responses, yet any
        number of rows fits into memory: it depends on a row through one sum, which scoring has measured, so its slope in
        that sum is known before the update, and row by row `slope * ln pi_phi` has the gradient of the whole.
    Degenerate: phi = acting policy, as at the first step of a copy, gives 0 and the loss ln 2;
        without a pair the update is skipped.

    Args:
        beta: nats to reward in the loss; `oprl(beta=)` is its counterpart in the credit.
        against: "logprobs", those of the policy that acted (`old_logprobs` first), or "ref_logprobs", those of the kept reference.
        outcome: the signal that says which response was better.
        success: given, outcomes above it are equally good and all others equally bad.
        margin: a pair needs a difference above this; for noisy judges.
        mean_over: the name of spans: S is divided by how many of them the response has.
        model, lr, weight_decay, grad_clip, micro_tokens, activation_checkpointing: as in `SecondModel`; the paper has
            lr 1e-6 and grad_clip 10.

    Raises:
        ValueError: another `against`; more than one pass or part, whose later updates would need new scores.
    """

    lr: float = 1e-6
    grad_clip: float = 10.0
    beta: float = 0.05
    against: Literal["logprobs", "ref_logprobs"] = "logprobs"
    outcome: str = "outcome"
    success: float | None = None
    margin: float = 0.0
    mean_over: str | None = None

    provides = ("signals.log_ratio",)

    def __post_init__(self) -> None:
        check_against(self.against)
        if self.epochs != 1 or self.parts != 1:
            raise ValueError(f"OnlinePRM makes one update a step; got epochs={self.epochs} and parts={self.parts}.")

    @property
    def requires(self) -> tuple[str, ...]:
        """The tokens, what their log-probabilities are compared with, and the spans of `mean_over`."""
        spans = () if self.mean_over is None else (f"spans.{self.mean_over}",)
        return ("tokens", *compared(self.against), *spans)

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"log_ratio": [B, T]}`, NaN where there is no action."""
        return {"log_ratio": log_ratio(self.second, rollouts, self.against, self.micro_tokens)}

    def update(self, rollouts: Rollouts, credit: Credit | None = None) -> dict[str, float]:
        """Learn which responses were better; prm/loss, prm/pairs and prm/ranked before the update, and prm/grad_norm."""
        slopes, metrics = self._slopes(rollouts)
        if not metrics["prm/pairs"]:
            return {**metrics, "prm/grad_norm": 0.0}  # the averages of AdamW would move it all the same
        found = self._learn(self.second, rollouts, Credit(-slopes, rollouts.action_mask), _LogProbs())
        return {**metrics, "prm/grad_norm": found["grad_norm"]}

    def _slopes(self, rollouts: Rollouts) -> tuple[Float[Tensor, "B T"], Mapping[str, float]]:
        """The derivative of the loss in ln pi_phi of every action, the same along a response, and the metrics."""
        ratio = rollouts.signals["log_ratio"].values.detach().nan_to_num(nan=0.0).requires_grad_()
        steps = None
        if self.mean_over is not None:
            spans = rollouts.spans[self.mean_over]
            steps = segment_count(rollouts.trajectory_ids[spans.row], rollouts.num_trajectories).long()
        loss, metrics = implicit_prm_loss(
            ratio,
            torch.zeros_like(ratio),
            rollouts.action_mask,
            rollouts.trajectory_ids,
            rollouts.trajectory_groups,
            rollouts.signals[self.outcome].values,
            beta=self.beta,
            steps=steps,
            success=self.success,
            margin=self.margin,
        )
        (slopes,) = torch.autograd.grad(loss, ratio)
        return slopes, metrics


@dataclass(frozen=True)
class _LogProbs:
    """`- sum of advantage_t ln pi(a_t)`, whose gradient is that of any loss with the slopes `-advantage_t`."""

    needs: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[Cover] = "row"

    def __call__(
        self, outputs: Outputs, rollouts: Rollouts, credit: Credit, totals: Totals
    ) -> tuple[Float[Tensor, ""], Mapping[str, float]]:
        return -(credit.advantages * outputs.logprobs).sum(), {}

    def flat_rows(self, rollouts: Rollouts, credit: Credit) -> Bool[Tensor, " B"]:
        return (credit.advantages == 0).all(1)
