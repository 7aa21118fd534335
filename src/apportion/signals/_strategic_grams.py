"""Planning phrases ("strategic grams"): where a response uses them, and how to find them in correct solutions."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from apportion.signals._split import _runs
from apportion.types import Rollouts, Signal

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class StrategicGrams:
    """The signal "planning": 1 on tokens that lie in a planning phrase, 0 on the others.

    Phrases match whole words, whatever the case and the white space between them; punctuation between two words breaks
    a phrase. All matches count, also those that overlap; a token belongs if it wrote a character of one.

    Source: HICRA, arXiv 2509.03646, which publishes neither its phrases nor how they are matched; the rules are ours.
    Reads: meta["pieces"], action_mask. Scope: row. Unit: token.
    Degenerate: no phrase in a row, all 0; a phrase does not run across tool output.

    Args:
        clusters: groups of phrases of one meaning; `of` makes them of a plain list.

    Example:
        >>> grams = StrategicGrams.of(["let's try a different approach"])
        >>> r = Rollouts.from_lists([[1, 2, 3, 4]], [0],
        ...                         meta={"pieces": [["So", " let's try", " a different", " approach."]]})
        >>> grams.measure(r)["planning"].values
        tensor([[0., 1., 1., 1.]])
    """

    clusters: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, phrases: Sequence[str]) -> "StrategicGrams":
        """A list of phrases, each a cluster of its own."""
        return cls(tuple((phrase,) for phrase in phrases))

    @property
    def provides(self) -> tuple[str, ...]:
        """The signal it measures."""
        return ("signals.planning",)

    @property
    def requires(self) -> tuple[str, ...]:
        """Nothing measured before."""
        return ()

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"planning": [B, T]}`.

        Raises:
            ValueError: meta["pieces"] is missing.
        """
        marks = torch.zeros(rollouts.batch, rollouts.width)
        for row, start, pieces in _written(rollouts):
            ends = torch.tensor([0, *accumulate(map(len, pieces))])
            covered = torch.zeros(int(ends[-1]) + 1, dtype=torch.int64)
            for _, first, last in self._matches("".join(pieces)):
                covered[first + 1 : last + 1] = 1
            before = covered.cumsum(0)[ends]  # characters of phrases before each edge between tokens
            marks[row, start : start + len(pieces)] = (before[1:] > before[:-1]).float()
        return {"planning": Signal(marks.to(rollouts.device), "token")}

    def semantic_entropy(self, rollouts: Rollouts) -> float:
        """Shannon entropy, in nats, of how often each cluster is used in the batch: how varied its planning is.

        Raises:
            ValueError: meta["pieces"] is missing.
        """
        texts = ("".join(pieces) for _, _, pieces in _written(rollouts))
        used = Counter(cluster for text in texts for cluster, _, _ in self._matches(text))
        total = used.total()
        return math.fsum(n / total * math.log(total / n) for n in used.values())

    def _matches(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Every use of a phrase: its cluster, its first character, the character after its last."""
        found = list(_WORD.finditer(text))
        words = [_plain(m[0]) for m in found]
        for i in range(len(words)):
            for n in self._sizes:
                cluster = self._cluster_of.get(tuple(words[i : i + n])) if i + n <= len(words) else None
                if cluster is not None:
                    yield cluster, found[i].start(), found[i + n - 1].end()

    @cached_property
    def _cluster_of(self) -> dict[tuple[str, ...], int]:
        return {tuple(words): c for c, phrases in enumerate(self.clusters) for p in phrases if (words := _words(p))}

    @cached_property
    def _sizes(self) -> list[int]:
        return sorted({len(words) for words in self._cluster_of})


def mine_strategic_grams(
    solutions: Sequence[str],
    *,
    embed: Callable[[Sequence[str]], Any] | None = None,
    sizes: Sequence[int] = (3, 4, 5),
    similarity: float = 0.8,
    top: float = 0.2,
    min_solutions: int = 1,
) -> StrategicGrams:
    """The phrases that many correct solutions share: strategy, where arithmetic differs from problem to problem.

    All runs of 3 to 5 words are embedded and clustered by meaning; the document frequency of a cluster is the number of
    solutions with at least one of its members, and the clusters of the highest frequency are kept.

    Source: arXiv 2509.03646. Its encoder and its clustering are not known to us: here a phrase joins the cluster whose
        first phrase it is nearest to, if their cosine is at least `similarity`; frequent phrases come first.

    Args:
        solutions: texts of correct solutions, of many problems.
        embed: texts to one vector each, [n, d]: the `encode` of any sentence encoder. None for `hashed_characters`, a
            stand-in that knows spelling and not meaning.
        sizes: words of a phrase.
        similarity: smallest cosine inside a cluster, ours. top: share of the clusters that is kept.
        min_solutions: leave out phrases in fewer solutions before anything is embedded; 2 saves most of the time.

    Example:
        >>> mine_strategic_grams(["We can use the sum. 1 + 1 = 2", "So we can use 3"], sizes=(3,), top=0.1)
        StrategicGrams(clusters=(('we can use',),))
    """
    uses: defaultdict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, text in enumerate(solutions):
        words = _words(text)
        for n in sizes:
            for i in range(len(words) - n + 1):
                uses[tuple(words[i : i + n])].add(number)
    grams = [g for g, s in uses.items() if len(s) >= min_solutions and all(w[0].isalnum() or w[0] == "_" for w in g)]
    grams.sort(key=lambda g: -len(uses[g]))
    phrases = [" ".join(g) for g in grams]
    clusters = _clusters(torch.as_tensor((embed or hashed_characters)(phrases)), similarity) if grams else []
    clusters.sort(key=lambda c: -len(set().union(*(uses[grams[i]] for i in c))))
    return StrategicGrams(tuple(tuple(phrases[i] for i in c) for c in clusters[: math.ceil(top * len(clusters))]))


def hashed_characters(texts: Sequence[str], *, size: int = 3, dims: int = 512) -> Tensor:
    """How often each run of `size` characters occurs, hashed into `dims` places, [n, dims].

    It needs no download and no model, and it is a stand-in: texts of like spelling are near, texts of like meaning are
    not.
    """
    out = torch.zeros(len(texts), dims)
    for vector, text in zip(out, texts, strict=True):
        runs = (f" {text} "[i : i + size] for i in range(len(text) + 3 - size))
        at = torch.tensor([crc32(run.encode()) % dims for run in runs], dtype=torch.int64)
        vector.index_add_(0, at, torch.ones(len(at)))
    return out


def _clusters(vectors: Tensor, similarity: float) -> list[list[int]]:
    """Each vector joins the nearest of the first members so far, if it is near enough, else it begins a cluster."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    firsts = torch.empty_like(unit)
    clusters: list[list[int]] = []
    for i, vector in enumerate(unit):
        cosine, nearest = (firsts[: len(clusters)] @ vector).max(0) if clusters else (torch.tensor(-1.0), -1)
        if cosine >= similarity:
            clusters[int(nearest)].append(i)
        else:
            firsts[len(clusters)] = vector
            clusters.append([i])
    return clusters


def _words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return [_plain(m[0]) for m in _WORD.finditer(text)]


def _plain(word: str) -> str:
    return word.lower().replace("’", "'")


def _written(rollouts: Rollouts) -> Iterator[tuple[int, int, Sequence[str]]]:
    """The unbroken runs of actions of all rows: row, first position, and the text of each token."""
    pieces = rollouts.meta.get("pieces")
    if pieces is None:
        raise ValueError(
            'StrategicGrams needs meta["pieces"], one string per token, which this batch lacks. Make it with pieces_of.'
        )
    for row, (keep, n) in enumerate(zip(rollouts.action_mask.tolist(), rollouts.lengths.tolist(), strict=True)):
        for start, stop in _runs(keep[:n]):
            yield row, start, pieces[row][start:stop]
