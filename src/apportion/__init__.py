"""Credit assignment for reinforcement learning of language models: every token gets the credit it earned."""

from apportion import credit
from apportion.credit import *  # noqa: F403  (its __all__ is the list of methods; there is no second one)
from apportion.types import Credit, Rollouts, Signal, Spans

__all__ = ["Credit", "Rollouts", "Signal", "Spans"]
__all__ += credit.__all__
__version__ = "0.1.0"
