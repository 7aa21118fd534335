"""How right is a credit? Every measure of one batch of episodes, with bootstrap intervals over its groups."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.functional import segment_mean, segment_sum
from apportion.types import Credit

MEASURES = {
    "bias": "distance of the expected credit from the exact advantage, at the best single scale; 0 = right, 1 = no relation",
    "noise": "variance of the credit of one and the same choice, at that scale; 1 = as large as the mean square of the advantage",
    "raw_bias": "as bias, without a scale",
    "raw_noise": "as noise, without a scale",
    "rank": "Spearman correlation with the exact advantage inside a group; 0 = chance",
    "sign": "share of decisive tokens whose credit has the right sign, 0 counting half; 0.5 = chance",
    "auc": "chance that a token of the first wrong step has less credit than another token of its rollout; 0.5 = chance",
    "blame": "share of a rollout's negative credit that lies on its first wrong step",
    "cosine": "of one group's policy gradient with the exact one; 0 = chance, or nothing to learn from the group",
    "aim": "cosine of the average policy gradient with the exact one: what more samples come to",
    "snr": "squared length of the average policy gradient over the variance of a group's",
}
"""Every measure in words. All are relative: none depends on the unit of the outcome, bias to aim not on credit's either."""

_BLOCK = 4096  # choices whose resamples are computed together
_EQUAL = 1e-9  # numbers closer than this, relative to the largest, are the same number with rounding


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval; NaN = nothing in these episodes could be measured."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The truth of a batch of episodes, made ready to be held against many credits.

    Groups are the unit that is resampled, since the rollouts of a group share its statistics.

    Args:
        episodes: at least two groups.
        resamples: bootstrap samples.

    Example:
        >>> from apportion.arena import Trees, exact_advantage
        >>> episodes = Trees().episodes(groups=16, size=4, seed=0)
        >>> found = Yardstick(episodes, resamples=100).measure(exact_advantage()(episodes.rollouts))
        >>> found["sign"].value, found["rank"].value
        (1.0, 1.0)
    """

    episodes: Episodes
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.episodes.rollouts.num_groups < 2:
            raise ValueError("intervals over groups need at least two groups; the episodes have one or none.")

    def measure(self, credit: Credit) -> dict[str, Estimate]:
        """Every entry of `MEASURES`."""
        return {name: estimate_of(values) for name, values in self.samples(credit).items()}

    def difference(self, credit: Credit, other: Credit) -> dict[str, Estimate]:
        """How much more of each measure `credit` has than `other`, in the same resamples of the groups."""
        first, second = self.samples(credit), self.samples(other)
        return {name: estimate_of(first[name] - second[name]) for name in MEASURES}

    def samples(self, credit: Credit) -> dict[str, Float[Tensor, " R"]]:
        """Every measure, of the sample itself and of its resamples."""
        given = torch.where(self._acted, credit.advantages.double(), 0.0)
        if not bool(given.isfinite().all()):
            raise ValueError("credit must be finite at every position; an estimator gave NaN or infinity.")
        by_group = {
            "rank": self._rank(given),
            "sign": self._sign(given),
            "auc": self._auc(given),
            "blame": self._blame(given),
        }
        found = {name: self._mean(values) for name, values in by_group.items()}
        found |= self._deviations(given) | self._gradients(given)
        return {name: found[name] for name in MEASURES}

    # ---- the batch ----------------------------------------------------------------------------------------------------

    @cached_property
    def _acted(self) -> Bool[Tensor, "B T"]:
        return self.episodes.rollouts.action_mask

    @cached_property
    def _groups(self) -> Int[Tensor, "B T"]:
        return self.episodes.rollouts.unit_ids("group")

    @cached_property
    def _count(self) -> int:
        return self.episodes.rollouts.num_groups

    @cached_property
    def _weights(self) -> Float[Tensor, "G R"]:
        """How often each group stands in each resample; the first column is the sample itself."""
        generator = torch.Generator().manual_seed(self.episodes.seed + 1)
        drawn = torch.randint(self._count, (self.resamples, self._count), generator=generator)
        counts = torch.zeros(self.resamples, self._count, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        return torch.cat([torch.ones(self._count, 1, dtype=torch.float64), counts.T], 1)

    def _mean(self, values: Float[Tensor, " G"]) -> Float[Tensor, " R"]:
        """Mean over the groups that have a value."""
        known = ~values.isnan()
        total = self._weights.T @ torch.where(known, values, 0.0)
        return total / (self._weights.T @ known.double())

    def _by_group(self, values: Tensor, where: Tensor) -> Float[Tensor, " G"]:
        """Mean over the positions of each group; NaN where it has none."""
        where = where & ~values.isnan()
        count = segment_sum(where[where].double(), self._groups[where], self._count)
        return segment_sum(values[where].double(), self._groups[where], self._count) / count

    # ---- order and sign -------------------------------------------------------------------------------------------------

    def _rank(self, given: Tensor) -> Float[Tensor, " G"]:
        ids = self._groups[self._acted]
        x = _ranks(given[self._acted], ids)
        y = _ranks(self.episodes.advantages[self._acted], ids)
        x, y = (v - segment_mean(v, ids, self._count)[ids] for v in (x, y))
        both, xx, yy = (segment_sum(v, ids, self._count) for v in (x * y, x * x, y * y))
        return torch.where(xx > 0, both / (xx * yy).sqrt(), torch.where(yy > 0, 0.0, torch.nan))

    def _sign(self, given: Tensor) -> Float[Tensor, " G"]:
        exact = self.episodes.advantages
        surely = exact.abs() > _EQUAL if self.episodes.errors is None else exact.abs() > 2 * self.episodes.errors
        agree = (_snapped(given).sign() * exact.sign() + 1) / 2
        return self._by_group(agree, self.episodes.decisive & self._acted & surely)

    def _auc(self, given: Tensor) -> Float[Tensor, " G"]:
        mistaken, rows = self.episodes.mistake & self._acted, given.shape[0]
        ids = torch.arange(rows)[:, None].expand_as(given)[self._acted]
        flag = mistaken[self._acted]
        ranks = _ranks(given[self._acted], ids)
        inside = segment_sum(flag.double(), ids, rows)
        outside = segment_sum((~flag).double(), ids, rows)
        above = segment_sum(torch.where(flag, 0.0, ranks), ids, rows) - outside * (outside + 1) / 2
        return self._row_mean(above / (inside * outside))

    def _blame(self, given: Tensor) -> Float[Tensor, " G"]:
        mistaken = self.episodes.mistake & self._acted
        blame = (-_snapped(given)).clamp(min=0)
        share = torch.where(mistaken, blame, 0.0).sum(1) / blame.sum(1)
        return self._row_mean(torch.where(mistaken.any(1), share, torch.nan))

    def _row_mean(self, values: Float[Tensor, " B"]) -> Float[Tensor, " G"]:
        known = values.isfinite()
        ids = self.episodes.rollouts.group_ids[known]
        return segment_sum(values[known], ids, self._count) / segment_sum(
            torch.ones_like(values[known]), ids, self._count
        )

    # ---- bias and variance ----------------------------------------------------------------------------------------------

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Int[Tensor, " M"], int]:
        """Choices that more than one group made: at which positions, whose group, which choice, and how many there are."""
        at = self.episodes.pairs >= 0
        groups = self._groups[at]
        _, pair = torch.unique(self.episodes.pairs[at], return_inverse=True)
        first = torch.full((int(pair.max()) + 1 if len(pair) else 0,), self._count)
        first = first.scatter_reduce_(0, pair, groups, "amin")
        several = torch.zeros_like(first, dtype=torch.bool).index_fill_(0, pair[groups != first[pair]], True)
        keep = several[pair]
        where = torch.zeros_like(at).masked_scatter_(at, keep)
        _, pair = torch.unique(pair[keep], return_inverse=True)
        return where, groups[keep], pair, int(several.sum())

    def _moments(self, given: Tensor) -> tuple[Float[Tensor, " R"], ...]:
        """On average over the choices on-policy, in each resample: m^2, credit^2, A m and A^2, for m = E[credit | s, a].

        m^2 comes from products of visits in different groups, which are independent. Choices are taken a block at a time:
        there may be 100,000 of them, and a number for each of them and each resample fills gigabytes.
        """
        where, groups, pair, count = self._pairs
        credit, exact = given[where], segment_mean(self.episodes.advantages[where].double(), pair, count)
        twice = self._weights**2
        found = torch.zeros(5, self._weights.shape[1], dtype=torch.float64)
        for first in range(0, count, _BLOCK):
            mine = (pair >= first) & (pair < first + _BLOCK)
            size = (min(_BLOCK, count - first), self._count)
            at, x = torch.stack([pair[mine] - first, groups[mine]]), credit[mine]
            visits, sums, squares = (
                torch.sparse_coo_tensor(at, v, size, check_invariants=False).coalesce()
                for v in (torch.ones_like(x), x, x * x)
            )
            total, of_choice = visits @ self._weights, sums @ self._weights
            crossed = total**2 - visits.pow(2) @ twice
            known = crossed > 0  # two groups of the resample made the choice
            a = exact[first : first + size[0], None]
            products = (of_choice**2 - sums.pow(2) @ twice) / crossed.clamp(min=1)
            for sum_, each in zip(
                found, (total, total * products, squares @ self._weights, a * of_choice, a * a * total), strict=True
            ):
                sum_ += torch.where(known, each, 0.0).sum(0)
        return tuple(found[1:] / found[0])

    def _deviations(self, given: Tensor) -> dict[str, Float[Tensor, " R"]]:
        if not self._pairs[3]:
            return dict.fromkeys(
                ("bias", "noise", "raw_bias", "raw_noise"), torch.full((1 + self.resamples,), torch.nan)
            )
        m2, xx, am, aa = self._moments(given)
        if self.episodes.errors is not None:
            aa = aa - self.episodes.errors[self._pairs[0]].double().square().mean()
        related = torch.where(m2 > 0, (am.square() / (m2 * aa)).clamp(max=1.0), 0.0)
        variance = (xx - m2).clamp(min=0.0)
        scale = torch.where(m2 > 0, am / m2, torch.inf)
        return {
            "bias": (1 - related).sqrt(),
            "noise": torch.where(variance > 0, scale.square() * variance / aa, 0.0),
            "raw_bias": ((m2 - 2 * am + aa).clamp(min=0.0) / aa).sqrt(),
            "raw_noise": variance / aa,
        }

    # ---- the gradient -----------------------------------------------------------------------------------------------------

    def _gradients(self, given: Tensor) -> dict[str, Float[Tensor, " R"]]:
        got, exact = self.episodes.gradients(given).double(), self.episodes.gradient.double()
        dot, gg, ee = (got * exact).sum(1), got.square().sum(1), exact.square().sum(1)
        cosine = torch.where(gg > 0, dot / (gg * ee).sqrt(), torch.where(ee > 0, 0.0, torch.nan))
        same = (self.episodes.prompts[:, None] == self.episodes.prompts).double().fill_diagonal_(0)
        w = self._weights
        signal = (w * ((same * (got @ got.T)) @ w)).sum(0) / (w * (same @ w)).sum(0)
        spread = (w.T @ gg) / w.sum(0) - signal
        towards = (w.T @ dot) / w.sum(0)
        return {
            "cosine": self._mean(cosine),
            "aim": torch.where(
                signal > 0, (towards / (signal * (w.T @ ee) / w.sum(0)).clamp(min=1e-300).sqrt()).clamp(-1.0, 1.0), 0.0
            ),
            "snr": torch.where(spread > 0, signal.clamp(min=0.0) / spread, torch.nan),
        }


def estimate_of(values: Float[Tensor, " R"]) -> Estimate:
    """The first entry is the sample's own; the others are the resamples'."""
    again = values[1:][~values[1:].isnan()]
    if not len(again):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = torch.quantile(again, again.new_tensor([0.025, 0.975]), interpolation="nearest").tolist()
    return Estimate(float(values[0]), low, high)


def _snapped(values: Tensor) -> Tensor:
    """Numbers that differ by rounding made equal."""
    top = values.abs().max() if values.numel() else values.new_zeros(())
    unit = torch.where(top > 0, top * _EQUAL, 1.0)
    return (values / unit).round() * unit


def _ranks(values: Float[Tensor, " M"], ids: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Ranks 1, 2, ... among the values of the same id; equal values share the mean of theirs."""
    values = _snapped(values.double())
    order = values.argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]
    v, i = values[order], ids[order]
    new = torch.ones_like(i, dtype=torch.bool)
    new[1:] = (v[1:] != v[:-1]) | (i[1:] != i[:-1])
    run = new.cumsum(0) - 1
    begins = torch.ones_like(new)
    begins[1:] = i[1:] != i[:-1]
    first = torch.arange(len(i)).where(begins, torch.zeros_like(i)).cummax(0).values
    place = (torch.arange(len(i)) - first + 1).double()
    shared = segment_mean(place, run, int(new.sum()))[run]
    return torch.empty_like(shared).index_put_((order,), shared)
