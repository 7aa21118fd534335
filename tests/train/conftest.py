"""A small task and a policy of a tiny model, for every test of the trainer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apportion.credit import grpo
from apportion.tasks import BasicTask, arithmetic
from apportion.train import CausalPolicy, Config


@pytest.fixture(scope="session")
def task() -> BasicTask:
    return arithmetic(terms=3, train=64, test=16)


@pytest.fixture
def policy(tiny_model: str) -> CausalPolicy:
    return CausalPolicy.load(tiny_model, precision="float32")


@pytest.fixture
def config(tiny_model: str, task: BasicTask, tmp_path: Path) -> Callable[..., Config]:
    """A configuration of a run that takes about a second; any option can be changed."""
    base = Config(
        model=tiny_model,
        task=task,
        credit=grpo(),
        out=str(tmp_path / "run"),
        steps=2,
        prompts_per_step=4,
        group_size=4,
        max_new_tokens=24,
        eval_size=8,
        eval_every=1,
        save_every=1,
        save_model=False,
        truncated_reward=None,
        precision="float32",
        progress=False,
    )

    def make(**changes: Any) -> Config:
        return replace(base, **changes)

    return make


class NumberTask:
    """Rewards any response with a digit in it: a random model gets mixed groups, so the loss is not flat."""

    name = "digit"
    splitter = None
    judge = None

    def __init__(self, task: BasicTask):
        self.train, self.test = task.train, task.test

    def __repr__(self) -> str:
        return "digit"

    def verify(self, problem: Any, text: str) -> float:
        return float(any(c in "0123456789" for c in text))


@pytest.fixture(scope="session")
def digits(task: BasicTask) -> NumberTask:
    return NumberTask(task)
