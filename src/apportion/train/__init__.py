"""Training on one machine: one flat configuration, one loop."""

from apportion.train.config import Config
from apportion.train.learner import NotFinite
from apportion.train.loop import run
from apportion.train.measuring import SpansFrom
from apportion.train.models import resolve_model
from apportion.train.policy import CausalPolicy, Policy, Request
from apportion.train.scoring import GoalCosine, ModelLogRatio, PromptContrast, goal_state

__all__ = [
    "CausalPolicy",
    "Config",
    "GoalCosine",
    "ModelLogRatio",
    "NotFinite",
    "Policy",
    "PromptContrast",
    "Request",
    "SpansFrom",
    "goal_state",
    "resolve_model",
    "run",
]
