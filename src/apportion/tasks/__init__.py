"""Problems to train on, each with a verifier of its answers."""

from apportion.tasks._answers import unverified
from apportion.tasks._arithmetic import arithmetic
from apportion.tasks._calculator import calculator
from apportion.tasks._core import BasicTask, Problem, Task, check_disjoint
from apportion.tasks._data import from_data
from apportion.tasks._environment import Environment, Reply, ToolUse, calculate
from apportion.tasks._overlap import NearDuplicate, near_duplicates
from apportion.tasks._reasoning_gym import reasoning_gym_task
from apportion.tasks._resolve import TaskInfo, available, resolve_task
from apportion.tasks._words import gsm8k, mawps, svamp, word_problems

__all__ = [
    "BasicTask",
    "Environment",
    "NearDuplicate",
    "Problem",
    "Reply",
    "Task",
    "TaskInfo",
    "ToolUse",
    "arithmetic",
    "available",
    "calculate",
    "calculator",
    "check_disjoint",
    "from_data",
    "gsm8k",
    "mawps",
    "near_duplicates",
    "reasoning_gym_task",
    "resolve_task",
    "svamp",
    "unverified",
    "word_problems",
]
