"""Training on one machine: one flat configuration, one loop."""

from apportion.train.config import Config
from apportion.train.critic import Critic
from apportion.train.learner import NotFinite
from apportion.train.loop import run
from apportion.train.measuring import SpansFrom
from apportion.train.models import resolve_model
from apportion.train.online_prm import OnlinePRM
from apportion.train.policy import CausalPolicy, Policy, Request
from apportion.train.reward_adapters import openrlhf_reward, trl_reward, verl_reward
from apportion.train.reward_model import RewardModel
from apportion.train.rewards import Reward, RewardFailed
from apportion.train.sampler import Sampling
from apportion.train.scoring import GoalCosine, ModelLogRatio, PromptContrast, goal_state
from apportion.train.step_reward import StepReward
from apportion.train.turns import EnvironmentFailed, converse

__all__ = [
    "CausalPolicy",
    "Config",
    "Critic",
    "EnvironmentFailed",
    "GoalCosine",
    "ModelLogRatio",
    "NotFinite",
    "OnlinePRM",
    "Policy",
    "PromptContrast",
    "Request",
    "Reward",
    "RewardFailed",
    "RewardModel",
    "Sampling",
    "SpansFrom",
    "StepReward",
    "converse",
    "goal_state",
    "openrlhf_reward",
    "resolve_model",
    "run",
    "trl_reward",
    "verl_reward",
]
