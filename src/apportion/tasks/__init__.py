"""Problems to train on, each with a verifier of its answers."""

from apportion.tasks._arithmetic import arithmetic
from apportion.tasks._core import BasicTask, Problem, Task, check_disjoint
from apportion.tasks._reasoning_gym import reasoning_gym_task
from apportion.tasks._resolve import TaskInfo, available, resolve_task
from apportion.tasks._words import gsm8k, mawps, svamp, word_problems

__all__ = [
    "BasicTask",
    "Problem",
    "Task",
    "TaskInfo",
    "arithmetic",
    "available",
    "check_disjoint",
    "gsm8k",
    "mawps",
    "reasoning_gym_task",
    "resolve_task",
    "svamp",
    "word_problems",
]
