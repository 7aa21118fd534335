"""Step rewards from episode returns (LaRe): factors of each step, and a small decoder that is trained on whole episodes."""

from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.functional import at_members, segment_any, segment_count, segment_mean, segment_sum
from apportion.types import Credit, Rollouts, Signal

# ---- losses -----------------------------------------------------------------------------------------------------------


def rd_loss(
    rewards: Float[Tensor, " S"], episodes: Int[Tensor, " S"], returns: Float[Tensor, " E"]
) -> Float[Tensor, ""]:
    """Return decomposition: the rewards of an episode's steps should add up to its return.

    `mean over episodes of ((sum of g - Y) / L)^2` with the L steps of the episode.

    Source: as in LaRe, arXiv 2412.11120, and its code.
    Degenerate: an episode without steps or without return (NaN) is left out; none left gives 0. Equal returns teach through
    the lengths.

    Args:
        rewards: g of each step, with gradient, [S].
        episodes: the episode of each step, -1 for none, [S].
        returns: Y of each episode, [E].

    Example:
        >>> rd_loss(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([4.0, 5.0]))
        tensor(0.1250, dtype=torch.float64)
    """
    length = segment_count(episodes, len(returns))
    kept = (length > 0) & ~returns.isnan()
    target = torch.where(kept, returns.double(), 0.0)
    gap = (segment_sum(rewards, episodes, len(returns)) - target) / length.clamp(min=1)
    return _mean(gap.square(), kept)


def rrd_loss(
    drawn: Float[Tensor, " M"],
    episodes: Int[Tensor, " M"],
    lengths: Int[Tensor, " E"],
    returns: Float[Tensor, " E"],
    *,
    unbiased: bool = False,
) -> Float[Tensor, ""]:
    """Randomised return decomposition: the mean of K drawn rewards should be the return per step.

    `mean over episodes of (mean of drawn g - Y / L)^2`; unbiased, less the mean of `(1 - K / L) var(drawn g) / K` (sample
    variance), whose expectation over the draws is `rd_loss`.

    Source: as in LaRe, arXiv 2412.11120, and its code. Departs: the factor 1 - K/L is never below 0, where drawing more
    often than there are steps would make it so; an episode with one draw has no variance and nothing is subtracted.
    Degenerate: as `rd_loss`; an episode of which nothing was drawn is left out.

    Args:
        drawn: g of the drawn steps, with gradient, [M].
        episodes: the episode of each of them, [M].
        lengths: L of each episode, [E].
        returns: Y of each episode, [E].
        unbiased: subtract what drawing adds.

    Example:
        >>> e, two = torch.tensor([0, 0]), torch.tensor([2])
        >>> rrd_loss(torch.tensor([1.0, 2.0]), e, two, torch.tensor([4.0]), unbiased=True)
        tensor(0.2500, dtype=torch.float64)
    """
    count, length = segment_count(episodes, len(returns)), lengths.clamp(min=1).double()
    kept = (count > 0) & ~returns.isnan()
    mean = segment_mean(drawn, episodes, len(returns))
    loss = _mean((mean - torch.where(kept, returns.double(), 0.0) / length).square(), kept)
    if not unbiased:
        return loss
    squares = segment_sum((drawn.double() - at_members(mean, episodes)).square(), episodes, len(returns))
    variance = squares / (count - 1).clamp(min=1)
    return loss - _mean((1 - count / length).clamp(min=0) * variance / count.clamp(min=1), kept)


def draw_steps(episodes: Int[Tensor, " S"], count: int, samples: int, generator: torch.Generator) -> Int[Tensor, " M"]:
    """Which steps `rrd_loss` looks at: `samples` of each episode, without repetition where it has that many.

    Source: as in LaRe's code. An episode with fewer steps is drawn from with repetition; one without steps not at all.

    Args:
        episodes: the episode of each step, -1 for none, [S].
        count: how many episodes there are.
        samples: K.
        generator: the source of randomness.

    Example:
        >>> draw_steps(torch.tensor([0, 0, -1, 1]), 2, 2, torch.Generator().manual_seed(0)).sort().values
        tensor([0, 1, 3, 3])
    """
    uniform = torch.rand(len(episodes) + count * samples, generator=generator, device=generator.device)
    uniform = uniform.to(episodes.device, torch.float64)
    shuffled = torch.argsort(uniform[: len(episodes)])
    shuffled = shuffled[torch.argsort(episodes[shuffled], stable=True)]
    length = segment_count(episodes, count).long()[:, None]
    first = (episodes < 0).sum() + length.cumsum(0) - length
    place = torch.arange(samples, device=episodes.device).expand(count, samples)
    repeated = (uniform[len(episodes) :].view(count, samples) * length).long()
    drawn = first + torch.where(length >= samples, place, repeated)
    return shuffled[drawn[(length > 0).expand(count, samples)]]


def _mean(values: Tensor, kept: Tensor) -> Float[Tensor, ""]:
    """Mean of the values that are kept; 0 if none is."""
    return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)


# ---- decoders ---------------------------------------------------------------------------------------------------------


class _Decoder:
    """A measure of the signal "decoded" over the steps; `_decoded` is None before an episode has taught."""

    factors: str
    outcome: str
    spans: str

    @property
    def provides(self) -> tuple[str, ...]:
        """The reward of each step."""
        return ("signals.decoded",)

    @property
    def requires(self) -> tuple[str, ...]:
        """The factors; outcomes are read by `update` alone."""
        return (f"spans.{self.spans}", f"signals.{self.factors}")

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"decoded": [S]}`, in the dtype of the factors."""
        phi = _factors_of(rollouts, self.factors, self.spans)
        decoded = self._decoded(phi)
        unknown = phi.new_full((len(phi),), torch.nan)
        return {"decoded": Signal(unknown if decoded is None else decoded.to(phi.dtype), self.spans)}

    def __repr__(self) -> str:
        settings = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "weights")
        return f"{type(self).__name__}({', '.join(settings)})"

    def _decoded(self, phi: Tensor) -> Tensor | None:
        raise NotImplementedError


class LinearDecoder(_Decoder):
    """Step rewards as a weighted sum of the factors, by least squares on the returns of all episodes seen so far.

        g_(e,t) = w . phi_(e,t),  w = argmin of the sum over episodes of ((w . sum of phi - Y) / L)^2

    of all minimisers the shortest, so that factors that never vary get no weight.

    Source: LaRe, arXiv 2412.11120, with the simplest decoder; the paper's is `MLPDecoder`.
    Reads: signals[factors] [S, D] over spans[spans], signals[outcome]. Unit of the result: `spans`.
    Degenerate: no reward is measured before an episode has taught; an episode with an unmeasured factor, without steps or
    without outcome teaches nothing, and a step with an unmeasured factor has no reward. Correlated factors share credit
    arbitrarily.

    Args:
        factors: signal with the factors of each step.
        outcome: signal with the return of each trajectory.
        spans: the steps.

    Example:
        >>> r = Rollouts.from_lists([[1, 2], [3]], [0, 0], outcome=[3.0, 1.0], steps=[[(0, 1), (1, 2)], [(0, 1)]],
        ...     signals={"factors": Signal(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), "step", ("factors",))})
        >>> decoder = LinearDecoder()
        >>> decoder.update(r)["decoder/episodes"], decoder.measure(r)["decoded"].values
        (2.0, tensor([1., 2., 1.]))
    """

    def __init__(self, *, factors: str = "factors", outcome: str = "outcome", spans: str = "step") -> None:
        self.factors, self.outcome, self.spans = factors, outcome, spans
        self._moments: tuple[Tensor, Tensor] | None = None
        self.weights: Float[Tensor, " D"] | None = None

    def _decoded(self, phi: Tensor) -> Tensor | None:
        return None if self.weights is None else phi.double() @ self.weights.to(phi.device)

    def update(self, rollouts: Rollouts, credit: Credit | None = None) -> dict[str, float]:
        """Learn from these episodes too; decoder/loss (`rd_loss` on them, after) and decoder/episodes (how many taught)."""
        phi, episodes, returns = _episodes(rollouts, self.factors, self.outcome, self.spans)
        count = segment_count(episodes, len(returns))
        kept = (count > 0) & ~returns.isnan()
        if not bool(kept.any()):
            return {"decoder/loss": 0.0, "decoder/episodes": 0.0}
        sums = torch.stack([segment_sum(column, episodes, len(returns)) for column in phi.unbind(1)], 1)
        x, y = sums[kept] / count[kept, None], returns.double()[kept] / count[kept]
        square, product = self._moments or (0.0, 0.0)
        self._moments = (square + x.T @ x, product + x.T @ y)
        self.weights = torch.linalg.pinv(self._moments[0], hermitian=True) @ self._moments[1]
        loss = rd_loss(phi.double() @ self.weights, episodes, returns)
        return {"decoder/loss": loss.item(), "decoder/episodes": float(kept.sum())}

    def state_dict(self) -> dict[str, Any]:
        """Everything it learnt."""
        return {"moments": self._moments, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._moments, self.weights = state["moments"], state["weights"]


class MLPDecoder(_Decoder):
    """Step rewards by a small network on the factors, trained on the returns of whole episodes.

    `g = f(phi)`, each `update` taking `steps` gradient steps of Adam on `rrd_loss`, or on `rd_loss` with `samples=None`.

    Source: LaRe, arXiv 2412.11120: three layers of 256, Adam with 3e-4, K = 64, from its code for MuJoCo. Departs: a
    batch is a training step's rollouts, without a replay buffer; `steps` is ours.
    Reads, Degenerate: as `LinearDecoder`. The same seed and the same updates give the same decoder.

    Args:
        layers: linear layers, the last one giving the reward. width: of the hidden ones.
        samples: K, the steps drawn of each episode; None looks at all of them.
        unbiased: subtract what drawing adds to the loss.
        rate: learning rate. steps: gradient steps per update.
        seed: of the first weights and of the draws.
        factors, outcome, spans: as in `LinearDecoder`.
    """

    def __init__(
        self,
        *,
        layers: int = 3,
        width: int = 256,
        samples: int | None = 64,
        unbiased: bool = False,
        rate: float = 3e-4,
        steps: int = 1,
        seed: int = 0,
        factors: str = "factors",
        outcome: str = "outcome",
        spans: str = "step",
    ) -> None:
        if layers < 1 or steps < 1 or (samples is not None and samples < 1):
            raise ValueError(
                f"MLPDecoder needs layers, steps and samples of at least 1; got {layers}, {steps}, {samples}."
            )
        self.layers, self.width, self.samples, self.unbiased = layers, width, samples, unbiased
        self.rate, self.steps, self.seed = rate, steps, seed
        self.factors, self.outcome, self.spans = factors, outcome, spans
        self._draws = torch.Generator().manual_seed(seed)
        self._model: torch.nn.Sequential | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def _decoded(self, phi: Tensor) -> Tensor | None:
        return None if self._model is None else self._model(phi.float())[:, 0]

    def update(self, rollouts: Rollouts, credit: Credit | None = None) -> dict[str, float]:
        """Learn from these episodes; decoder/loss (mean over the gradient steps) and decoder/episodes (how many taught)."""
        phi, episodes, returns = _episodes(rollouts, self.factors, self.outcome, self.spans)
        lengths = segment_count(episodes, len(returns)).long()
        taught = float(((lengths > 0) & ~returns.isnan()).sum())
        if not taught:
            return {"decoder/loss": 0.0, "decoder/episodes": 0.0}
        model, optimizer = self._built(phi.shape[1], phi.device)
        total = 0.0
        for _ in range(self.steps):
            if self.samples is None:
                loss = rd_loss(model(phi)[:, 0], episodes, returns)
            else:
                which = draw_steps(episodes, len(returns), self.samples, self._draws)
                drawn = model(phi[which])[:, 0]
                loss = rrd_loss(drawn, episodes[which], lengths, returns, unbiased=self.unbiased)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        return {"decoder/loss": total / self.steps, "decoder/episodes": taught}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and random state."""
        model, optimizer = self._model, self._optimizer
        return {
            "model": None if model is None else model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "draws": self._draws.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._draws.set_state(state["draws"])
        self._model = self._optimizer = None
        if state["model"] is not None:
            first = next(iter(state["model"].values()))
            model, optimizer = self._built(first.shape[1], first.device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(deepcopy(state["optimizer"]))  # which would keep the tensors it is given

    def _built(self, inputs: int, device: torch.device) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
        """The network, made with the first batch, which says how many factors there are."""
        if self._model is None or self._optimizer is None:
            sizes = [inputs, *[self.width] * (self.layers - 1), 1]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                linear = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
            modules = [m for layer in linear for m in (layer, torch.nn.ReLU())]
            self._model = torch.nn.Sequential(*modules[:-1]).to(device)
            self._optimizer = torch.optim.Adam(self._model.parameters(), lr=self.rate)
        return self._model, self._optimizer


def _factors_of(rollouts: Rollouts, factors: str, spans: str) -> Float[Tensor, "S D"]:
    signal = rollouts.signals[factors]
    if signal.unit != spans or signal.values.dim() != 2:
        raise ValueError(
            f"the decoder needs signals[{factors!r}] with shape [S, factors] over spans[{spans!r}]; got unit "
            f"{signal.unit!r} and shape {list(signal.values.shape)}. Measure the factors over these spans."
        )
    return signal.values


def _episodes(
    rollouts: Rollouts, factors: str, outcome: str, spans: str
) -> tuple[Float[Tensor, "S D"], Int[Tensor, " S"], Float[Tensor, " N"]]:
    """Factors, 0 where unmeasured; the episode of each step, -1 if a factor in it is unmeasured; the returns."""
    phi, returns = _factors_of(rollouts, factors, spans), rollouts.signals[outcome].values
    of = rollouts.trajectory_ids[rollouts.spans[spans].row]
    broken = segment_any(phi.isnan().any(1), of, rollouts.num_trajectories)
    return phi.nan_to_num(nan=0.0), torch.where(broken[of], -1, of), returns
