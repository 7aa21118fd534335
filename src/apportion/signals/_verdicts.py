"""Step scores from step verdicts, for methods that want a process reward where only a judge is at hand."""

from dataclasses import dataclass

import torch

from apportion.types import Rollouts, Signal


@dataclass(frozen=True)
class VerdictScore:
    """The signal "process" from the signal "judge": 1 where every usable critique lets the step pass, -1 where none does.

        p_s = 1 - 2 * (usable critiques that call step s wrong) / (usable critiques of step s)

    Reads: signals["judge"] [S, critiques]. Scope: row. Unit: step.
    Degenerate: a step without a usable critique is NaN, not measured.

    Example:
        >>> r = Rollouts.from_lists([[1, 2]], [0], steps=[[(0, 1), (1, 2)]], judge=[[[0.0, 1.0], [1.0, float("nan")]]])
        >>> VerdictScore().measure(r)["process"].values
        tensor([ 0., -1.])
    """

    @property
    def provides(self) -> tuple[str, ...]:
        """The signal it measures."""
        return ("signals.process",)

    @property
    def requires(self) -> tuple[str, ...]:
        """The verdicts it reads."""
        return ("signals.judge",)

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"process": [S]}`."""
        verdicts = rollouts.signals["judge"]
        return {"process": Signal(1 - 2 * torch.nanmean(verdicts.values, dim=1), verdicts.unit)}
