import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, amplify_by_attention, attention_rhythm, chain, gae, grpo, signed_outcome
from reference.batches import random_batch
from reference.loops import blank, episodes, put, table_of

NAN = float("nan")
WAAD = [3, 1, 0.5, 2.5, 0.8, 0.6, 0.7, 2, 0.9, 0.4]
FAI = [0.01, 0.09, 0.02, 0.03, 0.08, 0.02, 0.07, 0.01, 0.06, 0.05]


def one(dtype=torch.float64, outcome=1.0, waad=WAAD, fai=FAI) -> Rollouts:
    return Rollouts.from_lists(
        [[1] * len(waad)],
        [0],
        outcome=[outcome],
        signals={
            "waad": Signal(torch.tensor([waad], dtype=dtype), "token"),
            "fai": Signal(torch.tensor([fai], dtype=dtype), "token"),
        },
        dtype=dtype,
    )


def gamma(r: Rollouts, **how) -> list[float]:
    """The factors, as the advantages where each was 1."""
    return chain(signed_outcome(), amplify_by_attention(**{"min_length": 1, **how}))(r).advantages[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_example(dtype):
    """delta = 2, .5, 2, 1.7, .2, .1, 1.3, 1.1, .5, 0; medians .85 and .8; anchors 4 and 6 are dominated, by 2 and 3."""
    want = [1, 1.5, 1.25, 1.25, 1.25, 1, 1.25, 1, 1.5, 1]
    assert gamma(one(dtype)) == want
    assert gamma(one(dtype), mode="local") == [1.5 if t in (0, 2, 3, 6) else 1 for t in range(10)]
    assert gamma(one(dtype), mode="global") == [1.5 if t in (1, 4, 6, 8) else 1 for t in range(10)]


def test_thresholds_may_be_given():
    """With the medians of the example given, the same; with a WAAD that none is below, no anchor is dominated."""
    assert gamma(one(), tau_waad=0.85, tau_delta=0.8) == gamma(one())
    assert gamma(one(), tau_waad=0.0) == gamma(one(), mode="global")
    assert gamma(one(), tau_delta=5.0) == gamma(one(), mode="global")
    assert gamma(one(), tau_waad=9.0, tau_delta=0.0, alpha=1.0, k=1)[8] == 1.0


def test_bonuses_on_one_token_add_up():
    """Both tokens are anchors and the second is dominated by the first: 1.5 + 0.25 and 1.25."""
    r = one(waad=[9.0, 1.0], fai=[1.0, 2.0])
    assert gamma(r, q=1.0, alpha=0.5) == [1.75, 1.25]


def test_amp_of_one_is_the_identity():
    r = random_batch(5)
    for mode in ("local", "global", "coupled"):
        method = attention_rhythm(mode=mode, amp=1.0, min_length=1)
        assert torch.equal(method(r).advantages, grpo()(r).advantages)


def test_blame_and_zero_stay():
    assert gamma(one(outcome=0.0)) == [-1.0] * 10
    zero = chain(signed_outcome(low=0.0), amplify_by_attention(min_length=1))(one(outcome=0.0))
    assert (zero.advantages == 0).all()


def test_ties_go_to_the_earlier_token_and_to_the_later_delta():
    flat = one(waad=[1.0] * 5, fai=[0.5] * 5)
    assert gamma(flat, mode="global") == [1.5, 1.5, 1, 1, 1]
    assert gamma(flat, mode="local") == [1.5, 1.5, 1, 1, 1]
    # delta = 2, 2, 0, 0: of the two equal ones before the anchor the later gets the share
    r = one(waad=[4.0, 2.0, 0.0, 0.0], fai=[0, 0, 1, 0])
    assert gamma(r, q=0.25, k=3) == [1, 1.25, 1.25, 1]
    assert gamma(r, q=0.25, k=1) == [1, 1.25, 1.25, 1]


def test_a_short_response_keeps_its_credit():
    """The default looks 50 tokens ahead; one token would always be selected, as 0.4 of it is rounded up."""
    assert gamma(one(), min_length=50) == [1.0] * 10
    assert gamma(one(), min_length=11) == [1.0] * 10
    assert gamma(one(), min_length=10) == gamma(one())
    assert gamma(one(waad=[1.0], fai=[0.0]), mode="local") == [1.5]
    assert attention_rhythm()(one()).notes["amplified_tokens"] == 0


def test_an_unmeasured_token_is_left_out():
    """As if the token were not there; its own credit stays."""
    waad, fai = [*WAAD[:5], NAN, *WAAD[5:]], [*FAI[:5], 0.9, *FAI[5:]]
    got = gamma(one(waad=waad, fai=fai))
    assert got[5] == 1
    assert got[:5] + got[6:] == gamma(one())
    credit = chain(signed_outcome(), amplify_by_attention(min_length=1))(one(waad=waad, fai=fai))
    assert credit.notes["unmeasured_attention"] == 1


def test_only_what_the_mode_needs_is_required():
    assert amplify_by_attention(mode="local", waad="mine").requires == ("signals.mine",)
    assert amplify_by_attention(mode="global").requires == ("signals.fai",)
    assert attention_rhythm().requires == ("signals.outcome", "signals.waad", "signals.fai")


def test_rows_of_a_trajectory_are_one_response():
    """Cut after four tokens, the rows in the wrong order: the same factors."""
    r = Rollouts.from_lists(
        [[1] * 6, [1] * 4],
        [0, 0],
        trajectories=["a", "a"],
        row_index=[1, 0],
        outcome=[1.0],
        signals={
            "waad": Signal(torch.tensor([WAAD[4:], [*WAAD[:4], 7, 7]]), "token"),
            "fai": Signal(torch.tensor([FAI[4:], [*FAI[:4], 7, 7]]), "token"),
        },
    )
    second, first = chain(signed_outcome(), amplify_by_attention(min_length=1))(r).advantages.tolist()
    assert first[:4] + second == gamma(one())


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"q": 0.0}, "needs 0 < q <= 1"),
        ({"amp": 0.5}, "needs amp of at least 1; got 0.5. To weaken credit use scale_by_sign"),
        ({"k": 0}, "needs k of at least 1 token"),
        ({"alpha": 1.5}, "needs 0 <= alpha <= 1"),
        ({"waad": "outcome"}, "with one number per token; got unit 'trajectory'"),
    ],
)
def test_messages(how, text):
    with pytest.raises(ValueError, match=text):
        gamma(one(), **how)


def slow(r: Rollouts, base: torch.Tensor, mode: str, q: float, k: int, alpha: float, amp: float) -> list[list[float]]:
    out = blank(r)
    for e in episodes(r):
        n = len(e.actions)
        w = [float(r.signals["waad"].values[a]) for a in e.actions]
        f = [float(r.signals["fai"].values[a]) for a in e.actions]
        delta = [abs(w[t] - w[t + 1]) if t + 1 < n else 0.0 for t in range(n)]

        def top(x, n=n):
            return sorted(range(n), key=lambda i: (-x[i], i))[: math.ceil(q * n - 1e-9)]

        g = [1.0] * n
        if mode != "coupled":
            for t in top(delta if mode == "local" else f):
                g[t] = amp
        elif n:
            far, jump = statistics.median(w), statistics.median(delta)
            introduced = set()
            for t in top(f):
                before = range(max(0, t - k), t)
                best = max((delta[s] for s in before), default=-1.0)
                if before and w[t] <= far and best >= jump:
                    g[t] += (1 - alpha) * (amp - 1)
                    introduced.add(max(s for s in before if delta[s] == best))
                else:
                    g[t] += amp - 1
            for s in introduced:
                g[s] += alpha * (amp - 1)
        assert all(1 <= x <= 1 + (amp - 1) * (1 + alpha) + 1e-12 for x in g)
        credit = [float(base[a]) for a in e.actions]
        put(out, e.actions, [a * x if a > 0 else a for a, x in zip(credit, g, strict=True)])
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(["local", "global", "coupled"]),
    q=st.sampled_from([0.1, 0.4, 0.5, 1.0]),
    k=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    coarse=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_agrees_with_the_loop(seed, mode, q, k, alpha, coarse):
    r = random_batch(seed)
    if coarse:  # many ties
        rounded = {n: Signal((r.signals[n].values * s).round(), "token") for n, s in (("waad", 0.3), ("fai", 30))}
        r = r.with_signals(**rounded)
    base = gae()
    method = chain(base, amplify_by_attention(mode=mode, q=q, k=k, alpha=alpha, amp=1.7, min_length=1))
    want = table_of(slow(r, base(r).advantages, mode, q, k, alpha, 1.7), r)
    torch.testing.assert_close(method(r).advantages, want, rtol=1e-12, atol=1e-12)
