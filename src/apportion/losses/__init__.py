"""Losses: policy outputs, rollouts and credit in, one scalar with gradient and its metrics out."""

from apportion.losses._contrastive import StatePositions, contrastive_loss, draw_positions
from apportion.losses._core import Aggregation, Loss, Outputs, Totals, aggregate, totals_of
from apportion.losses._hinted import HintedPolicyGradient
from apportion.losses._implicit import implicit_prm_loss
from apportion.losses._policy import EntropyBonus, KLToReference, PolicyGradient
from apportion.losses._preference import dpo_loss, ranking_loss, t_reg_loss
from apportion.losses._sum import LossSum, add_losses
from apportion.losses._value import ValueLoss

__all__ = [
    "Aggregation",
    "EntropyBonus",
    "HintedPolicyGradient",
    "KLToReference",
    "Loss",
    "LossSum",
    "Outputs",
    "PolicyGradient",
    "StatePositions",
    "Totals",
    "ValueLoss",
    "add_losses",
    "aggregate",
    "contrastive_loss",
    "dpo_loss",
    "draw_positions",
    "implicit_prm_loss",
    "ranking_loss",
    "t_reg_loss",
    "totals_of",
]
