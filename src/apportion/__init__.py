"""Credit assignment for reinforcement learning of language models: every token gets the credit it earned."""

from apportion.types import Credit, Rollouts, Signal, Spans

__all__ = ["Credit", "Rollouts", "Signal", "Spans"]
__version__ = "0.1.0"
