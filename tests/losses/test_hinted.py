import math
from dataclasses import replace

import pytest
import torch

from apportion import Credit, Rollouts, grpo
from apportion.losses import HintedPolicyGradient, Outputs, PolicyGradient, add_losses, totals_of
from apportion.record import Run, RunWriter, read_jsonl, write_jsonl

F64 = torch.float64
NAN = float("nan")


def t(rows):
    return torch.tensor(rows, dtype=F64)


# One on-policy group and one hinted group of four, two tokens each.
ON_OLD = [[-1.0, -0.5], [-0.7, -0.7], [-0.2, -1.0], [-0.9, -0.4]]
ON_NEW = [[-0.7, -0.5], [-0.9, -0.6], [-0.2, -1.0], [-1.2, -0.4]]
HINTED_OLD = [[-0.3, -0.2], [-0.5, -0.6], [-0.1, -0.4], [-0.8, -0.3]]
UNHINTED_NEW = [[-1.5, -0.3], [-0.9, -0.6], [-2.0, -0.5], [-1.0, -0.9]]
NEW = t(ON_NEW + UNHINTED_NEW)
OFF = torch.tensor([False] * 4 + [True] * 4)


def batch():
    rollouts = Rollouts.from_lists(
        [[1, 2]] * 8,
        [0] * 4 + [1] * 4,
        outcome=[1, 0, 0, 1, 1, 0, 1, 1],
        logprobs=ON_OLD + HINTED_OLD,
        old_logprobs=ON_OLD + UNHINTED_NEW,
        meta={"prompt": ["easy"] * 4 + ["hard"] * 4, "behaviour_prompt": ["easy"] * 4 + ["hard, with a hint"] * 4},
        dtype=F64,
    )
    return rollouts.replace(off_policy=OFF)


def run(term, rollouts, credit, new=NEW):
    return term(Outputs(new), rollouts, credit, totals_of(rollouts, credit))


# ---- worked numbers -------------------------------------------------------------------------------------------------------


def test_worked_groups():
    rollouts = batch()
    credit = grpo(rollouts)
    adv = [0.866024, -0.866024, -0.866024, 0.866024, 0.499999, -1.499997, 0.499999, 0.499999]
    torch.testing.assert_close(credit.advantages[:, 0], t(adv), rtol=0, atol=5.1e-7)
    loss, metrics = run(HintedPolicyGradient(), rollouts, credit)
    assert metrics["hinted/gamma"] == pytest.approx(0.933386, abs=5.1e-7)
    assert loss.item() == metrics["policy/loss"] == pytest.approx(0.017882, abs=5.1e-7)
    shaped = [[0.243965, 0.492235], [0.417982, 0.517227], [0.138112, 0.492235], [0.467281, 0.370269]]
    assert metrics["hinted/shaped"] == pytest.approx(sum(map(sum, shaped)) / 16, abs=1e-6)
    assert metrics["hinted/tokens"] == 0.5


def test_each_shaped_ratio():
    """One hinted token at a time, advantage -1: its loss is its shaped ratio, over the tokens of the step."""
    rollouts = batch()
    shaped = [[0.243965, 0.492235], [0.417982, 0.517227], [0.138112, 0.492235], [0.467281, 0.370269]]
    for i in range(4):
        for k in range(2):
            adv = torch.zeros(8, 2, dtype=F64)
            adv[4 + i, k] = -1.0
            loss, _ = run(HintedPolicyGradient(), rollouts, Credit(adv, rollouts.action_mask))
            assert loss.item() * 16 == pytest.approx(shaped[i][k], abs=5.1e-7)


# ---- laws -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "group_mean_token_mean"])
def test_without_hinted_rows_it_is_the_policy_gradient(aggregation):
    for off in (None, torch.zeros(8, dtype=torch.bool)):
        rollouts = batch().replace(off_policy=off)
        credit = grpo(rollouts)
        for shaping, g in (("percentile", 0.9), ("constant", 0.1), ("power", 0.5)):
            term = HintedPolicyGradient(shaping=shaping, g=g, aggregation=aggregation)
            plain = PolicyGradient(clip_low=0.2, clip_high=0.2, aggregation=aggregation)
            loss, metrics = run(term, rollouts, credit)
            want, wanted = run(plain, rollouts, credit)
            assert loss == want
            assert wanted.items() <= metrics.items()


def test_gradient_flows_through_the_numerator_only():
    """dl/d new = -A f' rho with f' = g / (rho + g)^2, although g itself is a ratio of this step."""
    rollouts, credit = batch(), grpo(batch())
    new = NEW.clone().requires_grad_()
    loss, metrics = run(HintedPolicyGradient(), rollouts, credit, new)
    loss.backward()
    rho, g = (t(UNHINTED_NEW) - t(HINTED_OLD)).exp(), metrics["hinted/gamma"]
    want = -credit.advantages[4:] * g / (rho + g) ** 2 * rho / 16
    torch.testing.assert_close(new.grad[4:], want)


def test_unlikely_tokens_get_the_largest_relative_push():
    slope = [g / (rho + g) ** 2 for g in (0.1, 1.0) for rho in (1e-3, 0.1, 1.0)]
    assert slope[:3] == sorted(slope[:3], reverse=True)
    assert slope[3:] == sorted(slope[3:], reverse=True)


@pytest.mark.parametrize(("gap", "shaped"), [(0.0, 1 / 1.1), (-50.0, math.exp(-50) / 0.1), (1e4, 1.0), (-1e4, 0.0)])
def test_constant_and_its_ends(gap, shaped):
    """Never clipped, between 0 and 1 however far the two prompts are apart."""
    rollouts = Rollouts.from_lists([[1]], [0], logprobs=[[-1.0]], dtype=F64).replace(off_policy=torch.tensor([True]))
    credit = Credit(t([[-1.0]]), rollouts.action_mask)
    new = t([[-1.0 + gap]]).requires_grad_()
    loss, _ = run(HintedPolicyGradient(shaping="constant", g=0.1), rollouts, credit, new)
    loss.backward()
    assert loss.item() == pytest.approx(shaped, rel=1e-6)
    assert new.grad.isfinite().all()


def test_power():
    rollouts = Rollouts.from_lists([[1]], [0], logprobs=[[-1.0]], dtype=F64).replace(off_policy=torch.tensor([True]))
    loss, metrics = run(
        HintedPolicyGradient(shaping="power", g=0.5), rollouts, Credit(t([[-2.0]]), rollouts.action_mask), t([[-3.0]])
    )
    assert loss.item() == pytest.approx(2 * math.exp(-2 * 0.5))
    assert "hinted/gamma" not in metrics


def test_the_quantile_sees_counted_hinted_tokens_only():
    """Padding, on-policy rows and uncounted tokens hold enormous or undefined ratios; g is that of the rest, or 1e-4."""
    rollouts = batch()
    credit = grpo(rollouts)
    junk = NEW.clone()
    junk[:4] = 50.0
    mask = rollouts.action_mask.clone()
    mask[:4] = mask[7, 1] = False
    junk[7, 1] = NAN
    rho = sorted((t(UNHINTED_NEW) - t(HINTED_OLD)).exp().flatten().tolist()[:7])
    _, metrics = run(HintedPolicyGradient(), rollouts, credit.narrowed(mask), junk)
    assert metrics["hinted/gamma"] == pytest.approx(rho[5] + 0.4 * (rho[6] - rho[5]))
    _, metrics = run(HintedPolicyGradient(), rollouts, credit, NEW - 40 * OFF[:, None])
    assert metrics["hinted/gamma"] == 1e-4


def test_rows_that_may_be_skipped():
    """A hinted row without advantage still has a say in the quantile; it has none in a constant."""
    rollouts = batch()
    credit = Credit(torch.zeros(8, 2, dtype=F64), rollouts.action_mask)
    assert HintedPolicyGradient().flat_rows(rollouts, credit).tolist() == (~OFF).tolist()
    assert HintedPolicyGradient(shaping="constant").flat_rows(rollouts, credit).all()
    assert (HintedPolicyGradient().scope, HintedPolicyGradient(shaping="power").scope) == ("batch", "row")
    adv = torch.where(torch.arange(8)[:, None] % 2 == 0, credit.advantages, 1.0)
    credit = replace(credit, advantages=adv)
    live = (~HintedPolicyGradient().flat_rows(rollouts, credit)).nonzero()[:, 0]
    whole, _ = run(HintedPolicyGradient(), rollouts, credit)
    part = HintedPolicyGradient()(
        Outputs(NEW[live]), rollouts.select(live), credit.select(live), totals_of(rollouts, credit).take(live)
    )
    torch.testing.assert_close(part[0], whole)


def test_micro_batches_add_up_for_a_constant():
    rollouts, term = batch(), HintedPolicyGradient(shaping="constant", g=0.1)
    credit = grpo(rollouts)
    totals = totals_of(rollouts, credit)
    whole, metrics = term(Outputs(NEW), rollouts, credit, totals)
    total, summed = 0.0, {}
    for rows in torch.tensor([[0, 5, 7], [1, 2, 3]]), torch.tensor([[4, 6]]):
        for cut in rows:
            loss, found = term(Outputs(NEW[cut]), rollouts.select(cut), credit.select(cut), totals.take(cut))
            total += loss.item()
            summed = {k: summed.get(k, 0.0) + v for k, v in found.items()}
    assert total == pytest.approx(whole.item())
    assert summed == pytest.approx(metrics)


def test_nothing_counted_and_a_place_in_a_sum():
    rollouts = batch()
    nothing = grpo(rollouts).narrowed(torch.zeros(8, 2, dtype=torch.bool))
    assert run(HintedPolicyGradient(), rollouts, nothing)[0] == 0
    assert add_losses(HintedPolicyGradient()).scope == "batch"
    assert eval(repr(HintedPolicyGradient(g=0.5))) == HintedPolicyGradient(g=0.5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: HintedPolicyGradient(g=1.0), "g must be between 0 and 1 for shaping='percentile'; got 1.0"),
        (lambda: HintedPolicyGradient(shaping="constant", g=0.0), "g must be above 0 for shaping='constant'; got 0.0"),
        (lambda: HintedPolicyGradient(clip_low=-1.0), "clip_low must be at least 0"),
        (lambda: run(HintedPolicyGradient(), batch().replace(logprobs=None), grpo(batch())), "needs rollouts.logprobs"),
    ],
)
def test_what_a_wrong_setting_is_answered_with(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# ---- records ----------------------------------------------------------------------------------------------------------------


def test_a_stored_rollout_keeps_both_prompts_and_its_own_log_probabilities(tmp_path):
    rollouts, credit = batch(), grpo(batch())
    want, _ = run(HintedPolicyGradient(), rollouts, credit)
    RunWriter.create(tmp_path / "run", {}).append(0, rollouts, credit)
    write_jsonl(tmp_path / "log.jsonl", rollouts)
    for again in (Run(tmp_path / "run").rollouts(0), read_jsonl(tmp_path / "log.jsonl")):
        assert again.meta["behaviour_prompt"][4:] == ["hard, with a hint"] * 4
        assert again.meta["prompt"][4:] == ["hard"] * 4
        assert torch.equal(again.off_policy, OFF)
        torch.testing.assert_close(again.logprobs.double(), rollouts.logprobs)
        assert run(HintedPolicyGradient(), again, grpo(again))[0].item() == pytest.approx(want.item(), abs=1e-7)


# ---- a toy task ----------------------------------------------------------------------------------------------------------------


def learnt(how: str, steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Chance of the right one of 40 answers, without a hint, to hard and to easy prompts after training with Adam.

    `how`: "plain" GRPO; "guide", all-wrong prompts are tried again with a hint; "forced", the same with rho = 1.
    """
    make = torch.Generator().manual_seed(seed)
    table = torch.zeros(6, 40)
    table[:, 0] = torch.tensor([-4.0, -4.0, -4.0, 3.0, 3.0, 3.0])  # three prompts of chance .0005, three of .34
    table.requires_grad_()
    hint = torch.zeros(40).index_fill(0, torch.tensor([0]), 7.7)  # lifts .0005 to .5
    adam = torch.optim.Adam([table], lr=0.3)
    for _ in range(steps):
        before = table.detach().log_softmax(1)
        answers = torch.multinomial(before.exp(), 8, replacement=True, generator=make)
        hinted = (answers != 0).all(1) & (how != "plain")
        helped = (before + hinted[:, None] * hint).log_softmax(1)
        answers = torch.where(
            hinted[:, None], torch.multinomial(helped.exp(), 8, replacement=True, generator=make), answers
        )
        new = table.log_softmax(1).gather(1, answers).view(-1, 1)
        behaviour = new.detach() if how == "forced" else helped.gather(1, answers).view(-1, 1)
        groups = torch.arange(6).repeat_interleave(8)
        rollouts = Rollouts.from_lists([[0]] * 48, groups.tolist(), outcome=(answers == 0).float().flatten().tolist())
        rollouts = rollouts.replace(off_policy=hinted[groups], logprobs=behaviour)
        adam.zero_grad()
        run(HintedPolicyGradient(), rollouts, grpo(rollouts), new)[0].backward()
        adam.step()
    right = table.detach().softmax(1)[:, 0]
    return float(right[:3].mean()), float(right[3:].mean())


def test_hints_teach_what_sampling_alone_never_finds():
    """Mean of right[:3]: GRPO stays near 0, Guide does not. With rho forced to 1 it rises here as well."""
    plain, guide, forced = learnt("plain"), learnt("guide"), learnt("forced")
    assert plain[0] < 0.01
    assert min(guide[0], forced[0]) > 0.5
    assert min(plain[1], guide[1], forced[1]) > 0.8
