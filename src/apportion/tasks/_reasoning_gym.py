"""Any data set of reasoning-gym, verified by its own scorer."""

import json
import pickle
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from apportion.signals import Worker, last_number, lines, reward_of
from apportion.tasks._answers import plain_number
from apportion.tasks._core import BasicTask, Problem, draw, draws, problem_id
from apportion.tasks._names import nearest

_INSTRUCTIONS = {"tag": "Give your final answer between <answer> and </answer>.", "number": "", "text": ""}
_EXAMPLES = ("example_answer", "example_correct_answer", "possible_answer")
"""Where entries without one gold answer keep one that is right."""


def reasoning_gym_task(
    name: str,
    *,
    train: int = 1024,
    test: int = 256,
    seed: int = 0,
    extract: Literal["tag", "number", "text"] = "tag",
    instruction: str | None = None,
    chat: bool = True,
    **options: Any,
) -> BasicTask:
    """Any data set of the package reasoning-gym, by name.

    The reward is what the data set's own `score_answer` says of the extracted answer, with one change: an empty answer
    gets 0 (some scorers give up to 0.05). Many scorers give part of the reward for an answer that contains the gold one.
    Scoring runs in a process that is killed after 10 seconds; such an answer gets 0. The data sets composite, boxnet and
    rush_hour publish no gold answer and are refused; list_functions draws other questions each time, whatever the seed
    (reasoning-gym 0.1.25). Whether a question belongs to the test is decided by its text.

    Args:
        name: of the data set. train, test: how many problems. seed: which.
        extract: "tag" = what stands in the last `<answer>...</answer>`, or the whole text if there is none; "number" =
            the last number; "text" = the whole text.
        instruction: stands after the question; None = the one that fits `extract`.
        chat: prompts are chat messages; False = text.
        options: of the data set, such as min_terms of chain_sum.

    Raises:
        ValueError: an unknown data set or option (answered with the nearest known one), too few different questions, no
            gold answer or one that its own scorer does not accept, or reasoning-gym is not installed.
    """
    if extract not in _INSTRUCTIONS:
        raise ValueError(f"extract must be 'tag', 'number' or 'text'; got {extract!r}.")
    entries = _entries(name, seed, draws(train, test), options)
    ask = _INSTRUCTIONS[extract] if instruction is None else instruction
    learn, held = draw(name, (_problem(name, e, ask, chat) for e in entries), train, test)
    packed = pickle.dumps(options)

    def verify(problem: Problem, text: str) -> float:
        answer = extracted(text, extract)
        return reward_of(_scorer()(name, packed, answer, problem.data["entry"])) if answer else 0.0

    for problem in [*learn, *held][:1]:
        if verify(problem, problem.answer) != 1:
            raise ValueError(f"the scorer of {name} does not accept its own gold answer {problem.answer[:80]!r}.")
    return BasicTask(name, learn, held, verify, lines(), answer_of=lambda text: extracted(text, extract) or None)


def extracted(text: str, how: str) -> str:
    """The part of a response that is scored; empty if there is none."""
    if how == "number":
        number = last_number(text)
        return "" if number is None else plain_number(number)
    _, tag, after = text.rpartition("<answer>")
    return (after.partition("</answer>")[0] if tag and how == "tag" else text).strip()


@cache
def _scorer() -> Worker:
    """One process scores for all tasks of this interpreter."""
    return Worker(f"{Path(__file__).with_name('_scorer.py')}:score", seconds=10.0, memory=1 << 30)


def _problem(name: str, entry: Mapping[str, Any], instruction: str, chat: bool) -> Problem:
    question = str(entry["question"]).strip()
    text = f"{question}\n{instruction}".strip()
    prompt: Any = [{"role": "user", "content": text}] if chat else f"{text}\n"
    return Problem(problem_id(name, question), question, prompt, _gold(name, entry), data={"entry": dict(entry)})


def _gold(name: str, entry: Mapping[str, Any]) -> str:
    examples = (entry["metadata"].get(key) for key in _EXAMPLES)
    answer = next((a for a in (entry["answer"], *examples) if a is not None), None)
    if answer is None:
        raise ValueError(f"the reasoning-gym data set {name} publishes no gold answer. Choose another one.")
    return answer if isinstance(answer, str) else json.dumps(answer)


def _entries(name: str, seed: int, size: int, options: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError("reasoning_gym needs the package reasoning-gym: pip install reasoning-gym.") from error
    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no data set {name!r}.{nearest(name, DATASETS)}")
    config = DATASETS[name][1]
    known = [f for f in config.__dataclass_fields__ if f not in ("seed", "size")]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} of reasoning-gym has no option {option!r}.{nearest(option, known)}")
    try:
        data = create_dataset(name, seed=seed, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{name} of reasoning-gym refuses these options: {error}") from error
    return (data[i] for i in range(size))
