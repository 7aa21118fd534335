"""Training on one machine: one flat configuration, one loop."""

from apportion.train.config import Config
from apportion.train.learner import NotFinite
from apportion.train.loop import run
from apportion.train.models import resolve_model
from apportion.train.policy import CausalPolicy, Policy, Request

__all__ = ["CausalPolicy", "Config", "NotFinite", "Policy", "Request", "resolve_model", "run"]
