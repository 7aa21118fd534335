"""From the problems of a source to train and test: repeats gone, no question in both, near-duplicates told or dropped."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from apportion.tasks._core import Problem, held_out, question_key
from apportion.tasks._overlap import NearDuplicate, near_duplicates
from apportion.tasks._rows import WHOLE

NearDuplicates = Literal["report", "drop", "ignore"]
_EXAMPLES = 3
_SHOWN = 100


def divide(
    problems: Mapping[str, Iterable[Problem]],
    source: str,
    *,
    test_share: float,
    near: NearDuplicates,
    similarity: float,
) -> tuple[list[Problem], list[Problem], tuple[str, ...]]:
    """Train, test and what is to be told about them, from the problems of "train" and "test", or of "all".

    Of questions that repeat within a split the first is kept. "all" is divided by a hash of the question, so that a
    question stays on its side when rows are added, removed or moved.

    Raises:
        ValueError: a setting is out of range, or train or test is empty.
    """
    if near not in get_args(NearDuplicates):
        raise ValueError(f"near_duplicates must be 'report', 'drop' or 'ignore'; got {near!r}.")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be above 0 and below 1; got {test_share}.")
    splits = {name: _distinct(rows) for name, rows in problems.items()}
    if WHOLE in splits:
        sides: dict[bool, list[Problem]] = {False: [], True: []}
        for problem in splits[WHOLE]:
            sides[held_out(problem.question, test_share)].append(problem)
        splits = {"train": sides[False], "test": sides[True]}
    learn, held = splits["train"], splits["test"]
    found = [] if near == "ignore" else near_duplicates(learn, held, similarity=similarity)
    if near == "drop":
        dropped = {id(pair.train) for pair in found}
        learn = [p for p in learn if id(p) not in dropped]
    if not learn or not held:
        how = f", divided with test_share={test_share}" if WHOLE in problems else ""
        raise ValueError(
            f"{source} has {len(learn)} problems for train and {len(held)} for test{how}; both need some. "
            "Give more problems, a test file, or another test_share."
        )
    return learn, held, _told(found, len(splits["train"]), near, similarity)


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(question_key(problem.question), problem)
    return list(first.values())


def _told(found: list[NearDuplicate], size: int, near: NearDuplicates, similarity: float) -> tuple[str, ...]:
    if not found:
        return ()
    done = "were dropped from train" if near == "drop" else "stay in train; near_duplicates='drop' drops them"
    head = f"{len(found)} of {size} train problems resemble a test problem (similarity {similarity} or more) and {done}"
    return (head, *(_pair(pair) for pair in found[:_EXAMPLES]))


def _pair(pair: NearDuplicate) -> str:
    train, test = (" ".join(p.question.split())[:_SHOWN] for p in (pair.train, pair.test))
    return f"{pair.similarity:.2f}: train {train!r}, test {test!r}"
