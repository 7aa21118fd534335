import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Credit, Rollouts
from apportion.losses import (
    EntropyBonus,
    KLToReference,
    Outputs,
    PolicyGradient,
    Totals,
    ValueLoss,
    add_losses,
    aggregate,
    totals_of,
)

F64 = torch.float64
NAN = float("nan")
MODES = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "group_mean_token_mean",
    "token_sum_norm",
)


def t(rows):
    return torch.tensor(rows, dtype=F64)


def rollouts_of(lengths, groups=None, **fields):
    rows = [[0] * n for n in lengths]
    made = Rollouts.from_lists(rows, groups or [0] * len(rows), dtype=F64)
    return made.replace(**fields)


def credit_of(rollouts, advantages, mask=None, returns=None):
    mask = rollouts.action_mask if mask is None else torch.tensor(mask)
    return Credit(torch.where(mask, advantages, 0.0), mask, returns=returns)


def run(term, outputs, rollouts, credit):
    return term(outputs, rollouts, credit, totals_of(rollouts, credit))


# ---- worked by hand -----------------------------------------------------------------------------------------------------


def test_clipped_loss_of_unpacking_dpo_ppo():
    # ratios exp(.1), exp(-.3), 1, exp(.1) = 1.105171 .740818 1 1.105171; clip .8 .. 1.2 touches only the second, whose
    # advantage is positive, so the unclipped, worse value stands:
    # (-.881106*1.105171 - .741356*.740818 + .388249 + 1.234212*1.105171) / 4 = .229284 / 4
    rollouts = rollouts_of([4], old_logprobs=t([[-0.5, -1.0, -0.2, -0.8]]))
    credit = credit_of(rollouts, t([[0.881106, 0.741356, -0.388249, -1.234212]]))
    loss, metrics = run(PolicyGradient(clip_high=0.2), Outputs(t([[-0.4, -1.3, -0.2, -0.7]])), rollouts, credit)
    assert loss.item() == pytest.approx(0.057321, abs=1e-6)
    assert metrics["policy/clip_low"] == metrics["policy/clip_high"] == 0
    assert metrics["policy/ratio_shift"] == pytest.approx((0.105171 + 0.259182 + 0 + 0.105171) / 4, abs=1e-6)


def test_bounded_value_loss_by_hand():
    # V_old .4 .5 .9 1.2, V .7 .6 .9 1.5, bound .2: near .6 .6 .9 1.4
    # worst errors: (.6-1.403889)^2 = .646238, (.6-1.456725)^2 = .733978, (.9-1.4755)^2 = .331200, (1.4-1.49)^2 = .0081
    # mean .429879; times 1/2 times .1
    rollouts = rollouts_of([4], values=t([[0.4, 0.5, 0.9, 1.2]]))
    credit = credit_of(rollouts, t([[0.0] * 4]), returns=t([[1.403889, 1.456725, 1.4755, 1.49]]))
    values = t([[0.7, 0.6, 0.9, 1.5]]).requires_grad_()
    loss, metrics = run(ValueLoss(), Outputs(torch.zeros(1, 4), values=values), rollouts, credit)
    loss.backward()
    assert loss.item() == pytest.approx(0.0214940, abs=1e-6)
    assert metrics["value/clipped"] == 0.5  # the first and the last
    # d/dV = coef * (V - R) / 4 where the bound does not act, else 0
    assert torch.allclose(values.grad, t([[0, 0.1 * (0.6 - 1.456725) / 4, 0.1 * (0.9 - 1.4755) / 4, 0]]))


def test_reft_losses_are_means_of_row_means():
    # first response of ReFT's worked example beside a second of one token with advantage 1, value .5, return 1
    # policy at ratio 1: (-mean(-.172787, -.229250, -.515) - 1) / 2 = (.305679 - 1) / 2
    # value, no move yet: 1/2 * 5 * ((.172787^2 + .229250^2 + .515^2) / 3 + .25) / 2 = 2.5 * (.115878 + .25) / 2
    rollouts = rollouts_of([3, 1], values=t([[0.3, 0.35, 0.6], [0.5, 0, 0]]))
    advantages = t([[-0.172787, -0.229250, -0.515], [1, 0, 0]])
    credit = credit_of(rollouts, advantages, returns=t([[0.127213, 0.120750, 0.085], [1, 0, 0]]))
    outputs = Outputs(t([[-0.4, -0.9, -0.3], [-1, 0, 0]]), values=rollouts.values)
    rows = "sequence_mean_token_mean"
    policy, metrics = run(PolicyGradient(clip_high=0.2, aggregation=rows), outputs, rollouts, credit)
    value, _ = run(ValueLoss(coef=5.0, aggregation=rows), outputs, rollouts, credit)
    assert policy.item() == pytest.approx((0.305679 - 1) / 2, abs=1e-6)
    assert value.item() == pytest.approx(2.5 * (0.115878 + 0.25) / 2, abs=2e-6)
    assert metrics["policy/ratio_shift"] == 0  # no old log-probabilities: on-policy, every ratio is 1


@pytest.mark.parametrize(
    ("right", "wrong", "kept", "expected"),
    [
        (0.1, -1.0, (True, True), 0.633333),
        (1.0, 0.0, (True, False), -1.0),
        (1.0, 0.0, (True, True), -0.333333),
        (0.0, -1.0, (False, True), 1.0),
        (0.0, -1.0, (True, True), 0.666667),
    ],
)
def test_nsr_losses_and_both_normalisers(right, wrong, kept, expected):
    rollouts = rollouts_of([2, 3, 1])
    rows = torch.tensor([right, wrong, wrong], dtype=F64)[:, None].expand(3, 3)
    keep = torch.tensor([kept[0], kept[1], kept[1]])[:, None] & rollouts.action_mask
    loss, _ = run(
        PolicyGradient(), Outputs(-torch.ones(3, 3, dtype=F64)), rollouts, credit_of(rollouts, rows, keep.tolist())
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("advantage", "ascent"), [(-1.0, [-0.4, 0.3, 0.1]), (1.0, [0.4, -0.3, -0.1])])
def test_direction_on_the_logits_of_one_sampled_token(advantage, ascent):
    logits = t([0.6, 0.3, 0.1]).log().requires_grad_()
    rollouts = rollouts_of([1])
    loss, _ = run(
        PolicyGradient(), Outputs(logits.log_softmax(0)[:1].view(1, 1)), rollouts, credit_of(rollouts, t([[advantage]]))
    )
    loss.backward()
    assert torch.allclose(-logits.grad, t(ascent))


def test_sequence_ratio_is_the_geometric_mean():
    # log-ratios .3 and -.1: mean .1, ratio 1.105171 at both tokens; advantages 1 and -2: (-1 + 2) * 1.105171 / 2
    rollouts = rollouts_of([2], old_logprobs=t([[-1.0, -1.0]]))
    new = t([[-0.7, -1.1]]).requires_grad_()
    loss, _ = run(PolicyGradient(ratio="sequence"), Outputs(new), rollouts, credit_of(rollouts, t([[1.0, -2.0]])))
    loss.backward()
    assert loss.item() == pytest.approx(0.552585, abs=1e-6)
    assert torch.allclose(new.grad, t([[0.276293, 0.276293]]), atol=1e-6)  # each moves the mean by 1/2


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    # ratio e^2 = 7.389: -A rho = 7.389 is cut to 3; the token no longer moves
    rollouts = rollouts_of([1], old_logprobs=t([[-3.0]]))
    new = t([[-1.0]]).requires_grad_()
    credit = credit_of(rollouts, t([[-1.0]]))
    assert run(PolicyGradient(), Outputs(new), rollouts, credit)[0].item() == pytest.approx(math.exp(2))
    loss, _ = run(PolicyGradient(dual_clip=3.0), Outputs(new), rollouts, credit)
    loss.backward()
    assert loss.item() == 3
    assert new.grad.item() == 0


def test_kl_estimators_by_hand():
    # ref - new = ln 2 and 0: k3 = 2 - ln 2 - 1 = .306853 and 0; k1 = -ln 2 and 0
    rollouts = rollouts_of([2], ref_logprobs=t([[math.log(0.5), -1.0]]))
    new = t([[math.log(0.25), -1.0]]).requires_grad_()
    credit = credit_of(rollouts, t([[0.0, 0.0]]))
    loss, metrics = run(KLToReference(coef=0.1), Outputs(new), rollouts, credit)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * 0.306853 / 2, abs=1e-7)
    assert metrics["kl/reference"] == pytest.approx(0.306853 / 2, abs=1e-6)
    assert torch.allclose(new.grad, t([[0.1 * (1 - 2) / 2, 0]]))  # 1 - exp(ref - new)
    k1, _ = run(KLToReference(coef=0.1, estimator="k1"), Outputs(new), rollouts, credit)
    assert k1.item() == pytest.approx(-0.1 * 0.693147 / 2, abs=1e-7)


def test_entropy_bonus_rewards_entropy():
    rollouts = rollouts_of([2])
    loss, metrics = run(
        EntropyBonus(coef=0.01),
        Outputs(t([[0, 0]]), entropies=t([[1.0, 3.0]])),
        rollouts,
        credit_of(rollouts, t([[0, 0]])),
    )
    assert loss.item() == pytest.approx(-0.02)
    assert metrics["entropy/mean"] == 2


# ---- clipping and the old policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [
        (0.5, 1.0, False),
        (0.5, -1.0, True),
        (-0.5, 1.0, True),
        (-0.5, -1.0, False),
        (0.25, 1.0, False),
        (0.24, 1.0, True),
    ],
)
def test_gradient_is_zero_exactly_where_the_clip_is_active(log_ratio, advantage, moves):
    # bounds .8 and 1.28: ln .8 = -.223, ln 1.28 = .247
    rollouts = rollouts_of([1], old_logprobs=t([[-1.0]]))
    new = t([[-1.0 + log_ratio]]).requires_grad_()
    loss, metrics = run(PolicyGradient(), Outputs(new), rollouts, credit_of(rollouts, t([[advantage]])))
    loss.backward()
    expected = -advantage * math.exp(log_ratio) if moves else 0.0
    assert new.grad.item() == pytest.approx(expected)
    assert metrics["policy/clip_low"] + metrics["policy/clip_high"] == (0 if moves else 1)


def test_no_bounds_at_all():
    rollouts = rollouts_of([1], old_logprobs=t([[-3.0]]))
    free = PolicyGradient(clip_low=None, clip_high=None)
    loss, _ = run(free, Outputs(t([[-1.0]])), rollouts, credit_of(rollouts, t([[1.0]])))
    assert loss.item() == pytest.approx(-math.exp(2))


def test_on_policy_ratio_is_one_with_gradient():
    rollouts = rollouts_of([2], logprobs=t([[-9.0, -9.0]]))  # the sampler's, not used: old is the learner's own
    new = t([[-1.0, -2.0]]).requires_grad_()
    loss, _ = run(PolicyGradient(), Outputs(new), rollouts, credit_of(rollouts, t([[1.0, -3.0]])))
    loss.backward()
    assert loss.item() == 1.0
    assert new.grad.tolist() == [[-0.5, 1.5]]


def test_off_policy_rows_are_compared_with_the_behaviour():
    rollouts = rollouts_of([1, 1], logprobs=t([[-1.1], [-1.1]]), off_policy=torch.tensor([True, False]))
    loss, _ = run(PolicyGradient(), Outputs(t([[-1.0], [-1.0]])), rollouts, credit_of(rollouts, t([[1.0], [1.0]])))
    assert loss.item() == pytest.approx(-(math.exp(0.1) + 1) / 2)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_huge_ratios_leave_the_gradient_finite(advantage, ratio):
    rollouts = Rollouts.from_lists([[1]], [0], old_logprobs=[[-2000.0]])
    new = torch.tensor([[-1.0]], requires_grad=True)
    loss, _ = run(PolicyGradient(ratio=ratio), Outputs(new), rollouts, credit_of(rollouts, torch.tensor([[advantage]])))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(new.grad).all()


# ---- against the plain double loop ------------------------------------------------------------------------------------


def loop(values, mask, groups, mode, horizon):
    """The table of `aggregate`, one token at a time."""
    rows = [[v for v, m in zip(vs, ms, strict=True) if m] for vs, ms in zip(values, mask, strict=True)]
    counted = [row for row in rows if row]
    if not counted:
        return 0.0
    if mode == "token_mean":
        flat = [v for row in rows for v in row]
        return sum(flat) / len(flat)
    if mode == "sequence_mean_token_mean":
        return sum(sum(row) / len(row) for row in counted) / len(counted)
    if mode == "sequence_mean_token_sum":
        return sum(sum(row) for row in counted) / len(counted)
    if mode == "token_sum_norm":
        return sum(sum(row) for row in rows) / (len(rows) * horizon)
    pools = {}
    for row, group in zip(rows, groups, strict=True):
        pools.setdefault(group, []).extend(row)
    means = [sum(pool) / len(pool) for pool in pools.values() if pool]
    return sum(means) / len(means)


def random_step(seed, rows=6, width=5):
    g = torch.Generator().manual_seed(seed)
    lengths = [width, *torch.randint(0, width + 1, (rows - 1,), generator=g).tolist()]
    groups = [0, 0, 1, 1, 1, 2]
    noise = [torch.randn(rows, width, generator=g, dtype=F64) for _ in range(6)]
    made = rollouts_of(
        lengths, groups, old_logprobs=noise[0] - 2, ref_logprobs=noise[0] - 2 + 0.3 * noise[1], values=noise[2]
    )
    mask = made.action_mask & (torch.rand(rows, width, generator=g) < 0.8)
    credit = credit_of(made, noise[3], mask.tolist(), returns=noise[4])
    outputs = Outputs(made.old_logprobs + 0.3 * noise[5], values=noise[2] + 0.4 * noise[1], entropies=noise[4].abs())
    return made, credit, outputs


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_aggregations_match_the_loop(mode, seed):
    rollouts, credit, outputs = random_step(seed)
    got = aggregate(outputs.logprobs, credit.mask, totals_of(rollouts, credit), mode, 7)
    want = loop(outputs.logprobs.tolist(), credit.mask.tolist(), rollouts.group_ids.tolist(), mode, 7)
    assert got.item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_every_term_matches_the_loop(mode, seed):
    rollouts, credit, outputs = random_step(seed)
    table = {
        name: x.tolist() for name, x in (("new", outputs.logprobs), ("v", outputs.values), ("h", outputs.entropies))
    }
    old, ref = rollouts.old_logprobs.tolist(), rollouts.ref_logprobs.tolist()
    adv, ret, v_old = credit.advantages.tolist(), credit.returns.tolist(), rollouts.values.tolist()

    def policy(b, i):
        rho = math.exp(table["new"][b][i] - old[b][i])
        return max(-adv[b][i] * rho, -adv[b][i] * min(max(rho, 0.8), 1.28))

    def kl(b, i):
        d = ref[b][i] - table["new"][b][i]
        return 0.2 * (math.exp(d) - d - 1)

    def value(b, i):
        v, o, r = table["v"][b][i], v_old[b][i], ret[b][i]
        return 0.25 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2)

    same = {"aggregation": mode, "horizon": 7}
    pairs = [
        (PolicyGradient(**same), policy),
        (KLToReference(coef=0.2, **same), kl),
        (ValueLoss(coef=0.5, **same), value),
        (EntropyBonus(coef=0.3, **same), lambda b, i: -0.3 * table["h"][b][i]),
    ]
    rows, width = credit.mask.shape
    wanted = 0.0
    for term, per_token in pairs:
        tokens = [[per_token(b, i) for i in range(width)] for b in range(rows)]
        want = loop(tokens, credit.mask.tolist(), rollouts.group_ids.tolist(), mode, 7)
        assert run(term, outputs, rollouts, credit)[0].item() == pytest.approx(want, rel=1e-11, abs=1e-12)
        wanted += want
    total, metrics = run(add_losses(*[term for term, _ in pairs]), outputs, rollouts, credit)
    assert total.item() == pytest.approx(wanted, rel=1e-11, abs=1e-12)
    assert metrics["loss"] == total.item()


def test_aggregations_agree_with_the_formulas_of_trl():
    # as TRL states them for its loss types, on a batch where every row has a token
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(3, 4, generator=g, dtype=F64), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    rollouts = rollouts_of([2, 4, 1])
    totals = totals_of(rollouts, credit_of(rollouts, x))
    trl = {
        "sequence_mean_token_mean": ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(),  # grpo
        "token_sum_norm": (x * mask).sum() / (x.size(0) * 9),  # dr_grpo
        "token_mean": (x * mask).sum() / mask.sum(),  # dapo, one process
        "sequence_mean_token_sum": (x * mask).sum(1).mean(),  # luspo
    }
    for mode, want in trl.items():
        assert torch.allclose(aggregate(x, mask.bool(), totals, mode, 9), want, rtol=1e-14)


# ---- laws ---------------------------------------------------------------------------------------------------------------


def cut(rollouts, credit, outputs, rows):
    """The rows of a step as a micro-batch of its own; ids dense again."""
    index = torch.tensor(rows)

    def dense(ids):
        return torch.unique(ids[index], return_inverse=True)[1]

    fields = {
        name: getattr(rollouts, name)[index] for name in ("old_logprobs", "ref_logprobs", "values", "action_mask")
    }
    part = Rollouts(
        lengths=rollouts.lengths[index],
        group_ids=dense(rollouts.group_ids),
        trajectory_ids=dense(rollouts.trajectory_ids),
        row_index=rollouts.row_index[index],
        covers="row",
        **fields,
    )
    piece = Credit(credit.advantages[index], credit.mask[index], returns=credit.returns[index])
    return part, piece, Outputs(outputs.logprobs[index], outputs.values[index], outputs.entropies[index])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[4], [2, 0], [5, 1, 3]]])
def test_micro_batches_add_up_to_the_step(mode, ratio, parts):
    rollouts, credit, outputs = random_step(3)
    same = {"aggregation": mode, "horizon": 7}
    loss = add_losses(
        PolicyGradient(ratio=ratio, dual_clip=2.0, **same),
        KLToReference(coef=0.2, **same),
        ValueLoss(coef=0.5, **same),
        EntropyBonus(coef=0.3, **same),
    )
    leaves = [x.clone().requires_grad_() for x in (outputs.logprobs, outputs.values, outputs.entropies)]
    totals = totals_of(rollouts, credit)
    whole, metrics = loss(Outputs(*leaves), rollouts, credit, totals)
    grads = torch.autograd.grad(whole, leaves)

    summed, added, pieces = [torch.zeros_like(x) for x in leaves], {}, 0.0
    for rows in parts:
        value, seen = loss(*reorder(cut(rollouts, credit, Outputs(*leaves), rows)), totals.take(torch.tensor(rows)))
        pieces += value.item()
        summed = [a + b for a, b in zip(summed, torch.autograd.grad(value, leaves), strict=True)]
        added = {k: added.get(k, 0.0) + v for k, v in seen.items()}
    assert pieces == pytest.approx(whole.item(), rel=1e-13)
    assert added == pytest.approx(metrics, rel=1e-12, abs=1e-15)
    for a, b in zip(summed, grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-16)


def reorder(triple):
    rollouts, credit, outputs = triple
    return outputs, rollouts, credit


def test_flat_rows_have_no_gradient_and_skipping_them_changes_nothing():
    rollouts, credit, outputs = random_step(5)
    advantages = credit.advantages.clone()
    advantages[[1, 4]] = 0
    credit = dataclasses.replace(credit, advantages=advantages)
    term = PolicyGradient()
    flat = term.flat_rows(rollouts, credit)
    new = outputs.logprobs.clone().requires_grad_()
    totals = totals_of(rollouts, credit)
    whole, metrics = term(Outputs(new), rollouts, credit, totals)
    whole.backward()
    assert flat[[1, 4]].all()
    assert not new.grad[flat].any()
    kept = (~flat).nonzero()[:, 0].tolist()
    part = cut(rollouts, credit, outputs, kept)
    loss, seen = term(*reorder(part), totals)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-13)
    assert seen["policy/clip_high"] == metrics["policy/clip_high"]


def test_a_row_is_skipped_only_if_every_term_is_flat():
    rollouts = rollouts_of([2, 2, 2])
    credit = credit_of(rollouts, t([[0, 0], [1, 0], [0, 0]]), mask=[[True, True], [True, True], [False, False]])
    policy = PolicyGradient()
    assert policy.flat_rows(rollouts, credit).tolist() == [True, False, True]
    for other in (KLToReference(coef=0.1), ValueLoss(), EntropyBonus(coef=0.1)):
        assert add_losses(policy, other).flat_rows(rollouts, credit).tolist() == [False, False, True]
    for weightless in (KLToReference(coef=0.0), ValueLoss(coef=0.0), EntropyBonus(coef=0.0)):
        assert add_losses(policy, weightless).flat_rows(rollouts, credit).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_what_stands_outside_the_mask_never_reaches_a_weight(bad):
    rollouts, credit, outputs = random_step(7)
    outside = ~credit.mask
    dirty = rollouts.replace(
        **{n: getattr(rollouts, n).masked_fill(outside, bad) for n in ("old_logprobs", "ref_logprobs", "values")}
    )
    soiled = dataclasses.replace(credit, returns=credit.returns.masked_fill(outside, bad))
    leaves = [
        x.masked_fill(outside, bad).requires_grad_() for x in (outputs.logprobs, outputs.values, outputs.entropies)
    ]
    for ratio in ("token", "sequence"):
        loss = add_losses(PolicyGradient(ratio=ratio), KLToReference(coef=0.1), ValueLoss(), EntropyBonus(coef=0.1))
        want, metrics = run(loss, outputs, rollouts, credit)
        got, seen = run(loss, Outputs(*leaves), dirty, soiled)
        assert got.item() == want.item()
        assert seen == metrics
        for grad in torch.autograd.grad(got, leaves):
            assert torch.isfinite(grad).all()
            assert not grad[outside].any()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_counted_is_zero(mode):
    rollouts = rollouts_of([2, 0])
    credit = credit_of(rollouts, t([[0, 0], [0, 0]]), mask=[[False, False]] * 2, returns=t([[0, 0], [0, 0]]))
    outputs = Outputs(t([[-1, -1], [0, 0]]).requires_grad_())
    loss, metrics = run(PolicyGradient(aggregation=mode, horizon=4), outputs, rollouts, credit)
    loss.backward()
    assert loss.item() == 0
    assert set(metrics.values()) == {0.0}


def test_float32_stays_float32():
    rollouts = Rollouts.from_lists([[1, 2]], [0])
    credit = credit_of(rollouts, torch.tensor([[1.0, -1.0]]))
    loss, _ = run(PolicyGradient(), Outputs(torch.tensor([[-1.0, -2.0]])), rollouts, credit)
    assert loss.dtype == torch.float32


# ---- names and messages -----------------------------------------------------------------------------------------------


def test_repr_is_the_expression_that_made_it():
    loss = add_losses(PolicyGradient(clip_high=None), KLToReference(coef=0.01), ValueLoss(), EntropyBonus(coef=0.1))
    names = {c.__name__: c for c in (PolicyGradient, KLToReference, ValueLoss, EntropyBonus)}
    assert eval(repr(loss), {"add_losses": add_losses, **names}) == loss


def test_a_sum_needs_what_its_terms_need():
    loss = add_losses(PolicyGradient(), KLToReference(coef=0.1), ValueLoss(), EntropyBonus(coef=0.1))
    assert loss.needs == ("entropies", "values")
    assert loss.requires == ("credit.returns", "ref_logprobs", "values")
    assert loss.scope == "row"
    assert ValueLoss(clip=None).requires == ("credit.returns",)


@pytest.mark.parametrize(
    ("term", "text"),
    [
        (KLToReference(coef=0.1), "KLToReference needs rollouts.ref_logprobs, which this batch lacks"),
        (EntropyBonus(coef=0.1), "EntropyBonus needs outputs.entropies"),
        (ValueLoss(), "ValueLoss needs outputs.values"),
    ],
)
def test_missing_fields(term, text):
    rollouts = rollouts_of([2])
    with pytest.raises(ValueError, match=text):
        run(term, Outputs(t([[0, 0]])), rollouts, credit_of(rollouts, t([[0, 0]])))


def test_missing_returns_old_values_and_behaviour():
    rollouts = rollouts_of([1])
    outputs = Outputs(t([[0]]), values=t([[0]]))
    with pytest.raises(ValueError, match=r"ValueLoss needs credit\.returns.*gae"):
        run(ValueLoss(), outputs, rollouts, credit_of(rollouts, t([[0]])))
    with pytest.raises(ValueError, match=r"needs rollouts\.values to bound the update"):
        run(ValueLoss(), outputs, rollouts, credit_of(rollouts, t([[0]]), returns=t([[0]])))
    apart = rollouts.replace(off_policy=torch.tensor([True]))
    with pytest.raises(ValueError, match=r"off-policy rows need rollouts\.logprobs"):
        run(PolicyGradient(), outputs, apart, credit_of(rollouts, t([[0]])))


def test_group_mean_wants_the_totals_of_its_rows():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    totals = Totals(tokens=4, rows=2, counted_rows=2, counted_groups=1, group_tokens=torch.tensor([4, 4]))
    with pytest.raises(ValueError, match=r"totals have 2 rows, the micro-batch has 1. Pass totals.take\(rows\)"):
        aggregate(x, mask, totals, "group_mean_token_mean")
    aggregate(x, mask, totals, "token_mean")  # the others need counts only
