import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, prime, process_implicit, rloo
from reference import loops
from reference.batches import random_batch

NAN = float("nan")
DTYPES = {torch.float64: 1e-9, torch.float32: 2e-6}


def batch(ratios, outcome, groups=None, dtype=torch.float64) -> Rollouts:
    tokens, groups = [[1] * len(row) for row in ratios], groups or [0] * len(ratios)
    r = Rollouts.from_lists(tokens, groups, outcome=outcome, dtype=dtype)
    wide = [row + [7.0] * (r.width - len(row)) for row in ratios]
    return r.with_signals(log_ratio=Signal(torch.tensor(wide, dtype=dtype), "token"))


def table(got, want, dtype=torch.float64, atol=None) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), rtol=0, atol=atol or DTYPES[dtype])


RATIOS = [[2.0, 0.0], [-1.0, -3.0], [0.5, 0.0]]
"""beta 1: means 1, -2, .25. Outcomes 1, 0, 0: above the others 1, -1/2, -1/2."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_as_in_the_code(dtype):
    """Every process reward times 3/2, less (1 - 2 + .25) / 2 = -.375: 3.375, .375; -1.125, -4.125; 1.125, .375."""
    credit = process_implicit(batch(RATIOS, [1, 0, 0], dtype=dtype), beta=1.0)
    table(credit.parts["log_ratio"].values, [[3.75, 0.375], [-5.25, -4.125], [1.5, 0.375]], dtype)
    table(credit.advantages, [[4.75, 1.375], [-5.75, -4.625], [1.0, -0.125]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_as_in_the_paper(dtype):
    """The others' means are on average -.875, .625, -.5: rewards above 2.875, .875; -1.625, -3.625; 1, .5."""
    credit = process_implicit(batch(RATIOS, [1, 0, 0], dtype=dtype), beta=1.0, baseline="paper")
    table(credit.parts["log_ratio"].values, [[3.75, 0.875], [-5.25, -3.625], [1.5, 0.5]], dtype)


def test_both_baselines_agree_over_a_whole_response():
    r = batch([[0.3, -0.2, 0.9], [1.0], [0.4, 0.1]], [1, 0, 1])
    code, paper = (process_implicit(r, baseline=b).parts["log_ratio"].values[:, 0] for b in ("code", "paper"))
    torch.testing.assert_close(code, paper)


def test_discounts_of_both_sources():
    """gamma 1/2 for the process rewards above, 1/4 for the outcomes, which lie on the last action."""
    credit = process_implicit(batch(RATIOS, [1, 0, 0]), beta=1.0, gamma=0.5, outcome_gamma=0.25)
    table(credit.parts["log_ratio"].values, [[3.5625, 0.375], [-3.1875, -4.125], [1.3125, 0.375]])
    table(credit.parts["outcome"].values, [[0.25, 1.0], [-0.125, -0.5], [-0.125, -0.5]])


def test_rescaling_by_the_largest_sum_of_the_batch():
    """Sums from each action on: 2, 0; -4, -3; .5, 0. The largest size is 4, whatever beta, and also for another group."""
    r = batch([*RATIOS, [1.0], [0.0]], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    credit = process_implicit(r, beta=123.0, rescale="batch_max")
    plain = process_implicit(r, beta=0.25)
    table(credit.parts["log_ratio"].values, plain.parts["log_ratio"].values.tolist(), atol=1e-6)
    assert process_implicit(rescale="batch_max").scope == "batch"


def test_prime_is_whitened():
    credit = prime(rescale=None, beta=1.0)(batch(RATIOS, [1, 0, 0]))
    x = torch.tensor([[4.75, 1.375], [-5.75, -4.625], [1.0, -0.125]], dtype=torch.float64)
    torch.testing.assert_close(credit.advantages, (x - x.mean()) / x.std(), rtol=0, atol=1e-8)
    assert list(credit.parts) == ["outcome", "log_ratio", "baseline"]
    assert credit.parts["outcome"].unit == "trajectory"


def test_without_ratios_it_is_rloo():
    r = random_batch(4)
    r = r.with_signals(log_ratio=Signal(torch.zeros_like(r.signals["log_ratio"].values), "token"))
    assert (process_implicit(r).advantages == rloo(r).advantages).all()


def test_degenerate_groups():
    """A group of one; an unmeasured outcome, which has no say; an empty response, which has an outcome; equal ones."""
    assert (process_implicit(batch([[5.0]], [1])).advantages == 0).all()
    with_it = process_implicit(batch([[2.0], [4.0], [99.0]], [1, 0, NAN]))
    assert (with_it.advantages[:2] == process_implicit(batch([[2.0], [4.0]], [1, 0])).advantages).all()
    assert not with_it.mask[2].any()
    empty = process_implicit(batch([[2.0], []], [1, 0]))
    assert empty.advantages.tolist() == [[1.0], [0.0]]
    assert (process_implicit(batch([[0.0], [0.0]], [0.99] * 2)).advantages == 0).all()
    nothing = process_implicit(batch([[0.3, 0.3], [0.3], [0.3]], [0.99] * 3)).advantages
    table(nothing, [[0.0, 0.0]] * 3)


def test_an_unmeasured_ratio_adds_nothing():
    """Means 4 (of one token) and 2: above the other +-2 beta, nothing at the token without a ratio."""
    credit = process_implicit(batch([[NAN, 4.0], [2.0, 2.0]], [1, 1]), beta=1.0, baseline="paper")
    table(credit.advantages, [[2.0, 2.0], [-4.0, -2.0]])
    assert credit.notes["unmeasured_tokens"] == 1


def plain(r: Rollouts, gamma: float, outcome_gamma: float, baseline: str, rescale: bool) -> list[list[float]]:
    out = loops.blank(r)
    every = [e for e in loops.episodes(r) if not math.isnan(e.outcome)]
    ratios = [[float(r.signals["log_ratio"].values[a]) for a in e.actions] for e in every]
    if rescale:
        sums = [abs(sum(x[t:])) for x in ratios for t in range(len(x))]
        gains = [[v / (max(sums) + 1e-6) for v in x] for x in ratios]
    else:
        gains = [[0.05 * v for v in x] for x in ratios]
    means = [loops.mean(x) for x in gains]
    for i, e in enumerate(every):
        mates = [k for k, x in enumerate(every) if x.group == e.group]
        spoken = [k for k in mates if gains[k]]
        others = [every[k].outcome for k in mates if k != i]
        o = e.outcome - loops.mean(others) if others else 0.0
        above = [0.0] * len(gains[i])
        if len(spoken) > 1:
            n, total = len(spoken), sum(means[k] for k in spoken)
            code = [v * n / (n - 1) - total / (n - 1) for v in gains[i]]
            above = code if baseline == "code" else [v - (total - means[i]) / (n - 1) for v in gains[i]]
        to_come = loops.discounted(above, gamma)
        last = len(e.actions) - 1
        loops.put(out, e.actions, [g + o * outcome_gamma ** (last - t) for t, g in enumerate(to_come)])
    return out


@pytest.mark.parametrize("rescale", [None, "batch_max"])
@pytest.mark.parametrize("baseline", ["code", "paper"])
@given(seed=st.integers(0, 2**32 - 1), gamma=st.sampled_from([1.0, 0.9]), outcome_gamma=st.sampled_from([1.0, 0.5]))
@settings(max_examples=25, deadline=None)
def test_against_plain_loops(rescale, baseline, seed, gamma, outcome_gamma):
    r = random_batch(seed)
    how = {"gamma": gamma, "outcome_gamma": outcome_gamma, "baseline": baseline, "rescale": rescale}
    want = loops.table_of(plain(r, gamma, outcome_gamma, baseline, rescale is not None), r)
    torch.testing.assert_close(process_implicit(r, **how).advantages, want, rtol=1e-9, atol=1e-9)


def test_messages():
    r = batch([[0.5]], [1])
    with pytest.raises(ValueError, match=r"process_implicit needs signals\['outcome'\] with one number per token"):
        process_implicit(r, ratio="outcome")
    with pytest.raises(
        ValueError, match=r"process_implicit needs signals\['log_ratio'\] with one value per trajectory"
    ):
        process_implicit(r, reward="log_ratio")
