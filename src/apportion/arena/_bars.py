"""The two bars that every method stands between: the exact advantage, and chance."""

from apportion.credit import assemble, estimator
from apportion.types import Credit, Rollouts


@estimator(requires=("signals.exact",))
def exact_advantage(rollouts: Rollouts) -> Credit:
    """The world's own advantage of every token, `A(s, a) = Q(s, a) - V(s)`: what no method can know.

    Reads: signals.exact. Scope: row. Unit: token.
    """
    return assemble(rollouts, rollouts.action_mask, {"exact": rollouts.signals["exact"]})


@estimator(requires=("signals.noise",))
def random_credit(rollouts: Rollouts) -> Credit:
    """A standard normal number for every token: what a method that knows nothing would give.

    Reads: signals.noise. Scope: row. Unit: token.
    """
    return assemble(rollouts, rollouts.action_mask, {"noise": rollouts.signals["noise"]})
