"""Losses: policy outputs, rollouts and credit in, one scalar with gradient and its metrics out."""

from apportion.losses._core import Aggregation, Loss, Outputs, Totals, aggregate, totals_of
from apportion.losses._policy import EntropyBonus, KLToReference, PolicyGradient
from apportion.losses._sum import LossSum, add_losses
from apportion.losses._value import ValueLoss

__all__ = [
    "Aggregation",
    "EntropyBonus",
    "KLToReference",
    "Loss",
    "LossSum",
    "Outputs",
    "PolicyGradient",
    "Totals",
    "ValueLoss",
    "add_losses",
    "aggregate",
    "totals_of",
]
