"""Watches a run: which evaluation was the best, whether progress has ended, and whether the policy has collapsed."""

import math
from collections.abc import Mapping
from copy import deepcopy
from statistics import fmean
from typing import Any, Literal

from apportion.train.config import Config

WINDOW = 5
"""Steps whose mean is looked at: one step of a few prompts says little."""


class Watch:
    """Sees every step and every evaluation, and says whether to stop, and why.

    It remembers numbers of the run alone. Whether they are a reason to stop is asked of the present options, so a run that
    stopped stays stopped when it is resumed with the same ones (more `steps` included), and goes on when the option that
    stopped it is changed. A reward whose best is not above 0 has no share to fall below, and stops nothing.

    Args:
        config: for `patience`, `collapse_reward`, `collapse_entropy` and `collapse_length`; 0 switches each off.
    """

    def __init__(self, config: Config):
        self.config = config
        self.recent: dict[str, list[float]] = {"reward": [], "entropy": [], "length": []}
        self.first: dict[str, float] = {}  # the first mean of five, and the highest
        self.top: dict[str, float] = {}
        self.best: float | None = None
        self.best_step = self.waited = 0

    def sees(self, numbers: Mapping[str, Any]) -> None:
        """The training numbers of a step: "reward", "length", and "entropy" where it is measured.

        A number that is missing or not finite (no reward was measured) leaves its five as they are.
        """
        for name, recent in self.recent.items():
            value = numbers.get(name)
            if value is None or not math.isfinite(value):
                continue
            recent[:] = [*recent, float(value)][-WINDOW:]
            if len(recent) == WINDOW:
                mean = fmean(recent)
                self.first.setdefault(name, mean)
                self.top[name] = max(mean, self.top.get(name, mean))

    def saw(self, step: int, numbers: Mapping[str, Any]) -> Literal["best"] | None:
        """The numbers of an evaluation after `step`: "best" if no accuracy before was as high."""
        if self.best is None or numbers["accuracy"] > self.best:
            self.best, self.best_step, self.waited = numbers["accuracy"], step, 0
            return "best"
        self.waited += 1
        return None

    @property
    def reason(self) -> str | None:
        """Why the run should stop: what was measured, the limit, and what to do; None = it should not."""
        reasons = (self._no_progress(), self._reward(), self._entropy(), self._short(), self._long())
        return next((reason for reason in reasons if reason), None)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return deepcopy({name: value for name, value in vars(self).items() if name != "config"})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        vars(self).update(deepcopy(state))

    # ---- reasons ------------------------------------------------------------------------------------------------------

    def _no_progress(self) -> str | None:
        patience = self.config.patience
        if not patience or self.waited < patience:
            return None
        return _reason(
            f"no progress: {self.waited} evaluations (patience {patience}) were no better than the accuracy "
            f"{self.best:.3f} of step {self.best_step}",
            "RUN/best holds its model" if self.config.keep_best else "keep_best would have kept its model",
            "patience",
        )

    def _reward(self) -> str | None:
        share, top = self.config.collapse_reward, self.top.get("reward", 0.0)
        if not (share and top > 0 and self._mean("reward") < share * top):
            return None
        return self._collapsed("reward", "below", f"{share:g} of its best, {top:.3g}", "Lower lr, or raise kl_coef")

    def _entropy(self) -> str | None:
        share, first = self.config.collapse_entropy, self.first.get("entropy", 0.0)
        if not (share and self._mean("entropy") < share * first):
            return None
        cure = "The policy explores no more: lower lr, or raise clip_high or entropy_coef"
        return self._collapsed("entropy", "below", f"{share:g} of that of the first {WINDOW} steps, {first:.3g}", cure)

    def _short(self) -> str | None:
        share, first = self.config.collapse_length, self.first.get("length", 0.0)
        if not (share and self._mean("length") < share * first):
            return None
        cure = "See whether a short response is paid for (apportion show RUN), or lower lr"
        return self._collapsed("length", "below", f"{share:g} of that of the first {WINDOW} steps, {first:.3g}", cure)

    def _long(self) -> str | None:
        share, first = self.config.collapse_length, self.first.get("length", math.inf)
        if not (share and self._mean("length") > first / share):
            return None
        cure = "See whether a long response is paid for (apportion show RUN), or let one that is cut cost something"
        return self._collapsed("length", "above", f"1/{share:g} of that of the first {WINDOW} steps, {first:.3g}", cure)

    def _mean(self, name: str) -> float:
        """Of the last five; NaN, which is neither below nor above anything, before there are five."""
        recent = self.recent[name]
        return fmean(recent) if len(recent) == WINDOW else math.nan

    def _collapsed(self, name: str, side: str, limit: str, cure: str) -> str:
        what = f"the {name} collapsed: its mean over {WINDOW} steps is {self._mean(name):.3g}, {side} {limit}"
        return _reason(f"{what} (collapse_{name})", cure, f"collapse_{name}")


def _reason(measured: str, cure: str, option: str) -> str:
    return f"{measured}. {cure}. To go on all the same, resume with another {option} (0 = never stop)."
