"""Reward functions written for TRL, verl or OpenRLHF, as they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.signals import acted_tokens
from apportion.tasks import Problem
from apportion.train.asking import is_async, name_of, shown
from apportion.types import Rollouts


@dataclass(frozen=True)
class _Foreign:
    """A function with the arguments of another trainer."""

    function: Callable[..., Any]
    maker: str

    @property
    def name(self) -> str:
        """The function's own name."""
        return name_of(self.function)

    def __repr__(self) -> str:
        return f"{self.maker}({shown(self.function)})"


class _OfTRL(_Foreign):
    def score_rollouts(self, problems: Sequence[Problem], rollouts: Rollouts) -> Any:
        """What the function returns for the whole batch."""
        texts, chat = rollouts.meta["text"], [not isinstance(p.prompt, str) for p in problems]
        return self.function(
            prompts=[p.prompt for p in problems],
            completions=[[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat, strict=True)],
            completion_ids=acted_tokens(rollouts),
            **_columns(problems),
        )


class _OfTRLAsync(_OfTRL):
    async def score_rollouts(self, problems: Sequence[Problem], rollouts: Rollouts) -> Any:
        """What the function returns for the whole batch."""
        return await super().score_rollouts(problems, rollouts)


def trl_reward(function: Callable[..., Any]) -> _OfTRL:
    """A reward function of TRL: `f(prompts, completions, **columns)`, a number or None for each, sync or async.

    It is asked once for all responses of a step (as TRL does) and gets `prompts`, `completions` (messages where the prompt
    is), `completion_ids`, and as columns `question`, `answer`, `solution` and every key of `Problem.data`; a key that a
    problem lacks is None there. Not given: `trainer_state`, `log_extra`, `log_metric`, `environments`.

    Source: trl 1.16.0, `GRPOTrainer`, argument `reward_funcs`.

    Example:
        >>> def shorter(completions, **columns):
        ...     return [-len(c) for c in completions]
        >>> r = Rollouts.from_lists([[1, 2]], [0], meta={"text": ["12"]})
        >>> trl_reward(shorter).score_rollouts([Problem("a", "7+5=?", "7+5=?", "12")], r)
        [-2]
    """
    return (_OfTRLAsync if is_async(function) else _OfTRL)(function, "trl_reward")


class _OfVerl(_Foreign):
    def __call__(self, problem: Problem, text: str) -> Any:
        """The score of one response."""
        return _score(self.function(**_verl_arguments(problem, text)))


class _OfVerlAsync(_Foreign):
    async def __call__(self, problem: Problem, text: str) -> Any:
        """The score of one response."""
        return _score(await self.function(**_verl_arguments(problem, text)))


def verl_reward(function: Callable[..., Any]) -> _OfVerl | _OfVerlAsync:
    """A reward function of verl: `f(data_source, solution_str, ground_truth, extra_info)`, a number or a dict with "score".

    `ground_truth` is the problem's answer, `extra_info` its data, `data_source` the data's key of that name (else "").
    Sync or async.

    Source: verl 0.9.1, setting `custom_reward_function` (`compute_score`).

    Example:
        >>> def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        ...     return {"score": float(solution_str == ground_truth), "acc": 1.0}
        >>> verl_reward(compute_score)(Problem("a", "7+5=?", "7+5=?", "12"), "12")
        1.0
    """
    return (_OfVerlAsync if is_async(function) else _OfVerl)(function, "verl_reward")


class _OfOpenRLHF(_Foreign):
    def score(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Any]:
        """What the function returns for the whole batch."""
        prompts = [prompt_text(p) for p in problems]
        queries = [p + t for p, t in zip(prompts, texts, strict=True)]
        found = self.function(queries, prompts, [p.answer for p in problems])
        return list(found["rewards"] if isinstance(found, Mapping) else found)


def openrlhf_reward(function: Callable[..., Any]) -> _OfOpenRLHF:
    """A reward function of OpenRLHF: `f(queries, prompts, labels)`, numbers or a dict with "rewards".

    `labels` are the answers; `queries` are the prompts, each with its response after it. A chat's messages are joined by
    line breaks, without the tokens of a template.

    Source: OpenRLHF, setting `remote_rm_url` with the path of a file (`reward_func`).

    Example:
        >>> def reward_func(queries, prompts, labels):
        ...     return {"rewards": [float(q == p + a) for q, p, a in zip(queries, prompts, labels)]}
        >>> openrlhf_reward(reward_func).score([Problem("a", "7+5=?", "7+5=?", "12")], ["12"])
        [1.0]
    """
    return _OfOpenRLHF(function, "openrlhf_reward")


def prompt_text(problem: Problem) -> str:
    """The prompt as plain text; the messages of a chat one after the other."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "".join(f"{m['content']}\n" for m in problem.prompt)


def _columns(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """The problems' fields and data, one list for each key."""
    rows = [{"question": p.question, "answer": p.answer, "solution": p.solution, **p.data} for p in problems]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompts", "completions"))
    return {name: [row.get(name) for row in rows] for name in names}


def _verl_arguments(problem: Problem, text: str) -> dict[str, Any]:
    return {
        "data_source": problem.data.get("data_source", ""),
        "solution_str": text,
        "ground_truth": problem.answer,
        "extra_info": dict(problem.data),
    }


def _score(found: Any) -> Any:
    return found["score"] if isinstance(found, Mapping) else found
