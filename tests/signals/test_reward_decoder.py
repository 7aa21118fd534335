import itertools
import math

import pytest
import torch

from apportion import Rollouts, Signal, Spans, lare
from apportion.signals import LinearDecoder, MLPDecoder, draw_steps, rd_loss, rrd_loss

F64 = torch.float64
NAN = float("nan")
FACTORS = [[[1, 0], [0, 1], [1, 1]], [[2, 0], [0, 0]], [[0, 1], [0, 1], [1, 0], [0, 0]]]
RETURNS = [3.0, 2.0, 4.5]
EPISODES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])


def t(values):
    return torch.tensor(values, dtype=F64)


def close(got, want):
    torch.testing.assert_close(got, t(want), rtol=0, atol=5.1e-7)


def episodes_of(factors=FACTORS, returns=RETURNS, dtype=F64) -> Rollouts:
    """One token a step."""
    flat = [list(map(float, x)) for episode in factors for x in episode]
    width = len(flat[0])
    return Rollouts.from_lists(
        [[1] * max(len(e), 1) for e in factors],
        [0] * len(factors),
        outcome=returns,
        steps=[[(k, k + 1) for k in range(len(e))] for e in factors],
        signals={"factors": Signal(torch.tensor(flat, dtype=dtype).reshape(-1, width), "step", ("factors",))},
        dtype=dtype,
    )


# ---- losses: worked numbers ------------------------------------------------------------------------------------------------


def test_worked_linear_decoder():
    decoder, r = LinearDecoder(), episodes_of()
    metrics = decoder.update(r)
    close(decoder.weights, [0.903846, 1.028846])
    assert metrics["decoder/loss"] == pytest.approx(0.080128, abs=5.1e-7)
    close(
        decoder.measure(r)["decoded"].values,
        [0.903846, 1.028846, 1.932692, 1.807692, 0.0, 1.028846, 1.028846, 0.903846, 0.0],
    )


def test_worked_losses_of_fixed_weights():
    g = t([1, 2, 3, 2, 0, 2, 2, 1, 0])
    torch.testing.assert_close(episodes_of().signals["factors"].values @ t([1.0, 2.0]), g)
    assert rd_loss(g, EPISODES, t(RETURNS)).item() == pytest.approx(0.338542, abs=5.1e-7)
    drawn, of = g[[0, 2, 3, 4, 5, 7, 8]], torch.tensor([0, 0, 1, 1, 2, 2, 2])
    lengths = torch.tensor([3, 2, 4])
    assert rrd_loss(drawn, of, lengths, t(RETURNS)).item() == pytest.approx(0.338542, abs=5.1e-7)
    assert rrd_loss(drawn, of, lengths, t(RETURNS), unbiased=True).item() == pytest.approx(0.199653, abs=5.1e-7)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_over_all_draws_the_unbiased_loss_is_the_loss_of_whole_episodes(k):
    g, lengths = t([1.0, -2.0, 0.5, 3.0]), torch.tensor([4])
    zeros = torch.zeros(k, dtype=torch.int64)
    each = [rrd_loss(g[list(c)], zeros, lengths, t([2.0]), unbiased=True) for c in itertools.combinations(range(4), k)]
    want = rd_loss(g, torch.zeros(4, dtype=torch.int64), t([2.0]))
    torch.testing.assert_close(torch.stack(each).mean(), want)
    biased = [rrd_loss(g[list(c)], zeros, lengths, t([2.0])) for c in itertools.combinations(range(4), k)]
    assert torch.stack(biased).mean() > want - 1e-12


def test_more_draws_than_steps_subtract_nothing():
    g = t([1.0, 3.0, 1.0])
    args = (g, torch.zeros(3, dtype=torch.int64), torch.tensor([2]), t([4.0]))
    assert rrd_loss(*args, unbiased=True) == rrd_loss(*args)
    one = (t([1.0]), torch.tensor([0]), torch.tensor([2]), t([4.0]))
    assert rrd_loss(*one, unbiased=True) == rrd_loss(*one) == 1.0


def test_episodes_that_teach_nothing():
    g, of = t([1.0, 9.0, 9.0]), torch.tensor([0, 1, -1])
    assert rd_loss(g, of, t([3.0, NAN, 5.0])) == 4.0  # the second has no return, the third no steps
    assert rrd_loss(g, of, torch.tensor([1, 1, 0]), t([3.0, NAN, 5.0]), unbiased=True) == 4.0
    assert rd_loss(t([]), torch.tensor([], dtype=torch.int64), t([1.0])) == 0
    broken = t([1.0, 1.0, NAN]).requires_grad_()
    assert rd_loss(broken, torch.tensor([0, 0, 0]), t([3.0])).isnan()  # a decoder that diverged is not hidden


def test_gradients_reach_the_rewards():
    g = t([1.0, 2.0, 5.0]).requires_grad_()
    rd_loss(g, torch.tensor([0, 0, 1]), t([4.0, NAN])).backward()
    torch.testing.assert_close(g.grad, t([-0.5, -0.5, 0.0]))  # 2 (3 - 4) / 2^2
    g.grad = None
    rrd_loss(g, torch.tensor([0, 0, 1]), torch.tensor([3, 1]), t([4.0, NAN]), unbiased=True).backward()
    assert g.grad.isfinite().all()
    assert g.grad[2] == 0


# ---- draws -----------------------------------------------------------------------------------------------------------------


def test_draws_stay_in_their_episode_and_repeat_only_where_they_must():
    of = torch.tensor([2, 0, 2, -1, 0, 2, 4])
    make = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = draw_steps(of, 5, 2, make)
        assert of[drawn].tolist() == [0, 0, 2, 2, 4, 4]
        assert sorted(drawn[:2].tolist()) == [1, 4]
        assert len(set(drawn[2:4].tolist())) == 2
        assert drawn[4:].tolist() == [6, 6]


def test_draws_are_even_and_follow_the_seed():
    of = torch.zeros(4, dtype=torch.int64)
    make = torch.Generator().manual_seed(1)
    drawn = torch.stack([draw_steps(of, 1, 2, make) for _ in range(2000)])
    share = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.02)
    first, again = (draw_steps(of, 1, 3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)


# ---- linear ----------------------------------------------------------------------------------------------------------------


def synthetic(seed, weights, episodes=12, dtype=F64):
    """Episodes whose return is exactly linear in the factors."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (episodes,), generator=make).tolist()
    factors = [torch.randn(n, len(weights), generator=make, dtype=F64) for n in lengths]
    returns = [float((x @ weights).sum()) for x in factors]
    return episodes_of([x.tolist() for x in factors], returns, dtype), torch.cat(factors) @ weights


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_reward_is_recovered_from_returns_alone(seed):
    weights = t([0.5, -2.0, 1.0, 3.0])
    r, truth = synthetic(seed, weights)
    decoder = LinearDecoder()
    assert decoder.update(r)["decoder/loss"] < 1e-12
    torch.testing.assert_close(decoder.measure(r)["decoded"].values, truth, rtol=0, atol=1e-6)


def test_few_factors_need_fewer_episodes_than_raw_observations():
    """4 episodes determine 3 factors, not the 20 raw numbers of which these are the first."""
    make = torch.Generator().manual_seed(0)
    weights = t([1.0, -1.0, 0.5])
    raw = [torch.randn(5, 20, generator=make, dtype=F64) for _ in range(4)]
    returns = [float((x[:, :3] @ weights).sum()) for x in raw]
    truth = torch.cat(raw)[:, :3] @ weights
    errors = []
    for columns in (3, 20):
        r = episodes_of([x[:, :columns].tolist() for x in raw], returns)
        decoder = LinearDecoder()
        decoder.update(r)
        errors.append(float((decoder.measure(r)["decoded"].values - truth).abs().max()))
    assert errors[0] < 1e-6 < 0.1 < errors[1]


def test_learning_bit_by_bit_is_learning_at_once():
    first, _ = synthetic(0, t([1.0, 2.0]), episodes=3)
    second, _ = synthetic(1, t([-1.0, 0.5]), episodes=3)
    apart, together = LinearDecoder(), LinearDecoder()
    apart.update(first)
    apart.update(second)
    flat = [s.signals["factors"].values.tolist() for s in (first, second)]
    lists = []
    for r, x in zip((first, second), flat, strict=True):
        sizes = torch.bincount(r.spans["step"].row).tolist()
        lists += [x[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(len(sizes))]
    returns = first.signals["outcome"].values.tolist() + second.signals["outcome"].values.tolist()
    together.update(episodes_of(lists, returns))
    torch.testing.assert_close(apart.weights, together.weights)


def test_rank_deficient_factors_get_the_shortest_weights():
    """Two equal columns share the weight 2; a third never varies from 0."""
    factors = [[[1.0, 1.0, 0.0]], [[2.0, 2.0, 0.0], [1.0, 1.0, 0.0]]]
    decoder = LinearDecoder()
    decoder.update(episodes_of(factors, [2.0, 6.0]))
    close(decoder.weights, [1.0, 1.0, 0.0])
    decoder = LinearDecoder()  # equal returns still teach, through the lengths
    decoder.update(episodes_of([[[1.0]], [[1.0], [0.0]]], [3.0, 3.0]))
    close(decoder.weights, [3.0])


def test_what_was_not_measured():
    """An episode with a NaN factor teaches nothing; the step has no reward; before the first update none has."""
    factors = [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]], [[NAN, 0.0], [5.0, 5.0]]]
    r = episodes_of(factors, [3.0, 1.0, 100.0])
    decoder = LinearDecoder()
    assert decoder.measure(r)["decoded"].values.isnan().all()
    assert decoder.update(r)["decoder/episodes"] == 2
    got = decoder.measure(r)["decoded"].values
    torch.testing.assert_close(got, t([1.0, 2.0, 1.0, NAN, 15.0]), equal_nan=True)
    assert lare()(r.with_signals(**decoder.measure(r))).advantages.isfinite().all()


@pytest.mark.parametrize("decoder", [LinearDecoder(), MLPDecoder(width=8)])
def test_a_batch_that_teaches_nothing_leaves_rewards_unmeasured(decoder):
    r = episodes_of([[[1.0]], [[NAN]]], [NAN, 1.0])
    assert decoder.update(r) == {"decoder/loss": 0.0, "decoder/episodes": 0.0}
    assert decoder.measure(r)["decoded"].values.isnan().all()


def test_decoded_credit_of_the_worked_episodes():
    decoder, r = LinearDecoder(), episodes_of()
    decoder.update(r)
    r = r.with_signals(**decoder.measure(r))
    close(lare()(r).advantages[1], [1.807692, 0.0, 0.0, 0.0])
    close(lare(form="centred")(r).advantages[0], [-0.096154, 0.028846, 0.932692, 0.0])


# ---- network -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 3])
def test_a_network_learns_a_reward_that_is_no_sum_of_factors(samples):
    """Reward |x|: steps are ranked rightly from returns of whole episodes."""
    make = torch.Generator().manual_seed(0)
    factors = [torch.randn(4, 1, generator=make) for _ in range(64)]
    r = episodes_of([x.tolist() for x in factors], [float(x.abs().sum()) for x in factors], torch.float32)
    decoder = MLPDecoder(width=32, samples=samples, unbiased=True, rate=1e-2, steps=200)
    first = MLPDecoder(width=32, samples=samples).update(r)["decoder/loss"]
    decoder.update(r)
    got, truth = decoder.measure(r)["decoded"].values, torch.cat(factors)[:, 0].abs()
    assert float(torch.corrcoef(torch.stack([got, truth]))[0, 1]) > 0.95
    assert float(((got - truth) ** 2).mean()) < first


def test_networks_follow_their_seed_and_go_on_from_their_state():
    r, _ = synthetic(0, t([1.0, 2.0]), dtype=torch.float32)
    one, same, other = (
        MLPDecoder(width=8, samples=2),
        MLPDecoder(width=8, samples=2),
        MLPDecoder(width=8, samples=2, seed=1),
    )
    for decoder in (one, same, other):
        decoder.update(r)
    values = [d.measure(r)["decoded"].values for d in (one, same, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    restored = MLPDecoder(width=8, samples=2)
    restored.load_state_dict(one.state_dict())
    one.update(r)
    restored.update(r)
    assert torch.equal(one.measure(r)["decoded"].values, restored.measure(r)["decoded"].values)
    fresh = MLPDecoder(width=8, samples=2)
    fresh.load_state_dict(MLPDecoder(width=8, samples=2).state_dict())
    assert fresh.measure(r)["decoded"].values.isnan().all()


def test_making_a_network_leaves_the_global_randomness_alone():
    r, _ = synthetic(0, t([1.0, 2.0]), dtype=torch.float32)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    MLPDecoder(width=8).update(r)
    assert torch.equal(torch.rand(2), want)


def test_linear_state_round_trip():
    r, _ = synthetic(0, t([1.0, 2.0]))
    decoder, again = LinearDecoder(), LinearDecoder()
    decoder.update(r)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again.weights, decoder.weights)
    assert again.requires == ("spans.step", "signals.factors")
    assert again.provides == ("signals.decoded",)


def test_wrong_factors_and_settings():
    r = episodes_of().with_spans(half=Spans.from_lists([[], [], []]))
    for decoder in (LinearDecoder(spans="half"), MLPDecoder(factors="outcome")):
        with pytest.raises(ValueError, match=r"the decoder needs signals\['\w+'\] with shape \[S, factors\]"):
            decoder.measure(r)
    with pytest.raises(ValueError, match="layers, steps and samples of at least 1; got 0, 1, 64"):
        MLPDecoder(layers=0)
    assert math.isnan(float(LinearDecoder().measure(episodes_of())["decoded"].values[0]))
