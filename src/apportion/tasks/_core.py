"""A problem, a task, and the promise that no question of the test is in the training."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from apportion.tasks._environment import Environment

TEST_SHARE = 0.25
"""Share of all questions that `held_out` keeps for tests."""
_DRAWS_PER_PROBLEM = 20

Message = Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """One question with its answer.

    Args:
        id: the same in every run, and different from that of every other question.
        question: plain text, for judges and people.
        prompt: what the policy reads: raw text, or chat messages with `role` and `content`.
        answer: the gold answer; the task's verifier accepts it.
        solution: a worked solution that ends with the answer, as the policy should write it; None = there is none.
        data: whatever else the verifier needs.
    """

    id: str
    question: str
    prompt: str | Sequence[Message]
    answer: str
    solution: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> SimpleNamespace:
        """An object with the same fields that a process reads without this library."""
        return SimpleNamespace(**{**vars(self), "data": dict(self.data)})


@runtime_checkable
class Task(Protocol):
    """Prompts with a verifier.

    A task may also have `splitter` and `judge`: the default ones for its responses, or None; and
    `environment(problem) -> Environment`: what answers a rollout's turns, or None.
    """

    @property
    def name(self) -> str:
        """What the record calls it."""

    @property
    def train(self) -> Sequence[Problem]:
        """Problems to learn from."""

    @property
    def test(self) -> Sequence[Problem]:
        """Problems whose questions are not in `train`."""

    def verify(self, problem: Problem, text: str) -> float:
        """The reward of a response, 0 to 1; NaN = it could not be measured."""


@dataclass(frozen=True)
class BasicTask:
    """A task made of two lists of problems and a function.

    Args:
        verifier: `(problem, text) -> reward`; responses of nothing but white space get 0 without asking it, unless
            there is an environment, which may have paid for them.
        splitter: finds the written steps of a response. judge: judges them. None = no default.
        environment: `problem -> Environment`, which answers the turns of a rollout; None = a response is one turn.
        answer_of: the answer that a response gives, by which responses vote (majority@k), None = it gives none. Left out,
            it is the number where the gold answer is one, else what the response marks as its answer, else all of it.
        notes: what a person should know before training: rows that were left out, near-duplicates.

    Raises:
        ValueError: a question is in both `train` and `test`.
    """

    name: str
    train: Sequence[Problem]
    test: Sequence[Problem]
    verifier: Callable[[Problem, str], float] = field(repr=False)
    splitter: Any = None
    judge: Any = None
    environment: Callable[[Problem], Environment] | None = field(default=None, repr=False)
    answer_of: Callable[[str], Hashable | None] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_disjoint(self.name, self.train, self.test)

    def __repr__(self) -> str:
        verifier = getattr(self.verifier, "__qualname__", type(self.verifier).__qualname__)
        problems = [(p.id, p.prompt, p.answer) for pool in (self.train, self.test) for p in pool]
        digest = hashlib.sha256(repr((verifier, problems)).encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return f"<task {self.name}: {len(self.train)} train, {len(self.test)} test, {digest}>"

    def verify(self, problem: Problem, text: str) -> float:
        """The reward of a response, 0 to 1; NaN = it could not be measured."""
        return self.verifier(problem, text) if text.strip() or self.environment else 0.0


def check_disjoint(name: str, train: Sequence[Problem], test: Sequence[Problem]) -> None:
    """Refuse a task whose test can be learnt by heart. Case and white space do not make another question."""
    known = {question_key(p.question) for p in train}
    shared = [p.question for p in test if question_key(p.question) in known]
    if shared:
        raise ValueError(
            f"train and test of {name} share {len(shared)} question{'s' * (len(shared) > 1)}, for example {shared[0][:80]!r}. "
            "Remove them from one of the two."
        )


def question_key(question: str) -> str:
    """The same for questions that differ in case, in the amount of white space or in that before punctuation."""
    words = " ".join(question.casefold().split())
    for mark in ".,;:?!":
        words = words.replace(f" {mark}", mark)
    return words


def problem_id(task: str, question: str) -> str:
    """A stable name for a question: the task and twelve digits of a hash."""
    return f"{task}-{_digest(question)[:12]}"


def held_out(question: str, share: float = TEST_SHARE) -> bool:
    """Whether the question belongs to the test: decided by a hash of its text alone, so no seed moves it."""
    return int(_digest(question)[12:24], 16) < share * 16**12


def draw(name: str, problems: Iterable[Problem], train: int, test: int) -> tuple[list[Problem], list[Problem]]:
    """Fill both lists with different questions, in the order they come; `held_out` says where each belongs.

    Raises:
        ValueError: the stream ends, or repeats itself, before both lists are full.
    """
    if train < 0 or test < 0:
        raise ValueError(f"{name} needs sizes of at least 0; got train={train}, test={test}.")
    pools: tuple[list[Problem], list[Problem]] = ([], [])
    seen: set[str] = set()
    for problem, _ in zip(problems, range(draws(train, test)), strict=False):
        key = question_key(problem.question)
        pool, size = (pools[1], test) if held_out(problem.question) else (pools[0], train)
        if key not in seen and len(pool) < size:
            seen.add(key)
            pool.append(problem)
        if len(pools[0]) == train and len(pools[1]) == test:
            return pools
    raise ValueError(
        f"{name} has too few different questions: {draws(train, test)} draws gave {len(pools[0])} for train and "
        f"{len(pools[1])} for test, but train={train} and test={test} were asked for. Ask for fewer, or for longer questions."
    )


def draws(train: int, test: int) -> int:
    """How many problems `draw` looks at before it gives up."""
    return _DRAWS_PER_PROBLEM * (train + test) + 1000


def _digest(question: str) -> str:
    return hashlib.sha256(question_key(question).encode()).hexdigest()
