"""Near-duplicates of test prompts among the training prompts: found by MinHash, confirmed on the shingles themselves.

Why not datasketch: 34 s for 100,000 prompts where this takes 3, time that grows with the square where all are variants of
one text, and scipy (113 MB) as a requirement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apportion.tasks._core import Problem, question_key

SIMILARITY = 0.7
"""Two questions that are so alike tell one story with other names or numbers; fewer tell one story between 0.5 and here.
In GSM8K no training question lies in between."""
_SHINGLE = 5
_BANDS, _PER_BAND = 32, 4
_LOOKED_AT = 2
_MARGIN = 0.15
"""An estimate from 128 hashes has a standard deviation of at most 0.044."""
_ENOUGH = 100
_BLOCK = 1 << 18


@dataclass(frozen=True)
class NearDuplicate:
    """A training problem, a test problem that it resembles, and how much: 1 = the same questions."""

    train: Problem
    test: Problem
    similarity: float


def near_duplicates(
    train: Sequence[Problem], test: Sequence[Problem], *, similarity: float = SIMILARITY
) -> list[NearDuplicate]:
    r"""The training problems that resemble a test problem, the most similar first; each with one that it resembles.

    |A & B| / |A | B| >= similarity, where A and B are the sets of all pieces of five characters of two questions, in
    which case and the amount of white space do not count. From 100 questions on, text that all of them begin or end
    with is left out, because an instruction would make any two look alike.

    128 minima of hashed pieces are compared in 32 bands of 4, so the time grows as n log n, whatever is alike: a pair of
    similarity s is looked at with probability 1 - (1 - s^4)^32, which is 0.87 at 0.5, 0.9998 at 0.7, and 1 for what is
    the same. Of the test problems that share a band two are looked at, and the likeliest of all is confirmed; so a problem
    that resembles several need not be shown with the nearest, and among hundreds of variants of one text one in ten of
    those just above `similarity` is missed.

    Source: Broder, On the resemblance and containment of documents (1997). Departs: what the hashes propose is confirmed
    on the pieces.
    Degenerate: questions of fewer than five characters are filled with blanks. No problems give no pairs.

    Args:
        train, test: the problems; their `question` is compared.
        similarity: from 0.5 to 1.

    Raises:
        ValueError: `similarity` is out of range.

    Example:
        >>> def asked(text: str) -> Problem: return Problem(text, text, text, "1")
        >>> old, new = asked("Ann buys 12 red apples and eats 3 of them. How many are left?"), asked("What is pi?")
        >>> [pair] = near_duplicates([new, old], [asked("Bob buys 12 red apples and eats 5 of them. How many are left?")])
        >>> pair.train is old, round(pair.similarity, 2)
        (True, 0.75)
    """
    if not 0.5 <= similarity <= 1:
        raise ValueError(f"similarity must be from 0.5 to 1; got {similarity}.")
    if not train or not test:
        return []
    keys = _distinctive([question_key(p.question).ljust(_SHINGLE) for p in (*train, *test)])
    nearest, estimate = _proposed(_minima(keys), len(train))
    found = []
    for i in np.flatnonzero(estimate >= similarity - _MARGIN).tolist():
        j = int(nearest[i])
        alike = _resemblance(keys[i], keys[len(train) + j])
        if alike >= similarity:
            found.append(NearDuplicate(train[i], test[j], alike))
    return sorted(found, key=lambda pair: -pair.similarity)


def _distinctive(keys: list[str]) -> list[str]:
    """The texts without what all of them begin and end with, if they are many."""
    if len(keys) < _ENOUGH:
        return keys
    start = _common(keys)
    end = _common([key[start:][::-1] for key in keys])
    return [key[start : len(key) - end].ljust(_SHINGLE) for key in keys]


def _common(texts: Sequence[str]) -> int:
    """How many letters all texts begin with: as many as the first and the last in alphabetical order do."""
    low, high = min(texts), max(texts)
    return next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _resemblance(a: str, b: str) -> float:
    x, y = ({t[i : i + _SHINGLE] for i in range(len(t) - _SHINGLE + 1)} for t in (a, b))
    return len(x & y) / len(x | y)


def _minima(keys: Sequence[str]) -> NDArray[np.uint32]:
    """[texts, 128]: the least hash of a text's pieces under each of 128 hash functions."""
    multiply, add = np.random.default_rng(0).integers(0, 2**63, (2, _BANDS * _PER_BAND), dtype=np.uint64)
    out = np.empty((len(keys), _BANDS * _PER_BAND), np.uint32)
    ends = np.cumsum([len(key) for key in keys])
    first = 0
    while first < len(keys):  # a block of texts at a time, so that it stays in the cache
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + _BLOCK)))
        pieces, starts = _pieces(keys[first:last])
        for n, (a, b) in enumerate(zip(multiply | np.uint64(1), add, strict=True)):
            hashes = ((pieces * a + b) >> np.uint64(32)).astype(np.uint32)
            out[first:last, n] = np.minimum.reduceat(hashes, starts)
        first = last
    return out


def _pieces(keys: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A number for every piece of five characters of every text, and where each text's numbers begin."""
    letters = np.frombuffer("".join(keys).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(key) for key in keys])
    ends = np.repeat(np.cumsum(lengths), lengths)
    windows = len(letters) - _SHINGLE + 1
    numbers = np.zeros(windows, np.uint64)
    for i in range(_SHINGLE):
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15) + letters[i : i + windows]
    inside = np.arange(windows) + _SHINGLE <= ends[:windows]
    counts = lengths - _SHINGLE + 1
    return _mixed(numbers[inside]), np.cumsum(counts) - counts


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of x (the finalizer of MurmurHash3, public domain)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


def _proposed(minima: NDArray[np.uint32], train: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For every training text the test text with which most minima agree, of those that share a band, and their share."""
    learn, held = minima[:train], minima[train:]
    nearest, share = np.zeros(len(learn), np.int64), np.zeros(len(learn))
    for band in range(0, minima.shape[1], _PER_BAND):
        keys = _band(minima[:, band : band + _PER_BAND])
        order = np.argsort(keys[train:], kind="stable")
        known = keys[train:][order]
        place = np.searchsorted(known, keys[:train])
        for further in range(_LOOKED_AT):
            at = np.minimum(place + further, len(known) - 1)
            rows = np.flatnonzero(known[at] == keys[:train])
            others = order[at[rows]]
            alike = (learn[rows] == held[others]).mean(1)
            better = alike > share[rows]
            share[rows[better]], nearest[rows[better]] = alike[better], others[better]
    return nearest, share


def _band(part: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One number for the minima of a band."""
    number = np.zeros(len(part), np.uint64)
    for column in part.T:
        number = _mixed(number ^ column.astype(np.uint64)) * np.uint64(3)
    return number
