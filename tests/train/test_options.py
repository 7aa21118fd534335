"""Every option of a run does what its line says: its effect on a tiny model, not only that it is accepted.

`shows(...)` names the options that a test is about; the last test refuses an option that no test shows.
"""

import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from apportion import Credit, chain, gae, grpo
from apportion.credit import gdpo, group_relative, nsr, oprl, whiten, without_truncated
from apportion.record import Run
from apportion.signals import fixed_ngrams
from apportion.tasks import Environment, Reply, from_data
from apportion.train import CausalPolicy, OnlinePRM, SpansFrom, run
from apportion.train.checks import check, without_effect
from apportion.train.config import Options
from apportion.train.kl import reference_kl, steered
from apportion.train.rewards import Reward

SHOWN: dict[str, str] = {}

ELSEWHERE = {
    "activation_checkpointing": "test_out.py::test_recomputed_activations_give_the_same_gradient_and_keep_fewer_bytes",
    "seed": "test_loop.py::test_equal_seeds_give_equal_numbers_and_other_seeds_others",
    "unmeasured": "test_loop.py::test_a_nan_reward_can_be_left_out",
    "track": "test_loop.py::test_tensorboard_gets_the_metrics",
    "micro_tokens": "test_learner.py::test_cutting_and_skipping_change_only_the_time",
    "share_prompt": "test_learner.py::test_sharing_a_prompt_changes_neither_numbers_nor_gradients",
    "skip_flat": "test_learner.py::test_cutting_and_skipping_change_only_the_time",
    "sample_rows": "test_sampler.py::test_how_rows_are_batched_does_not_change_them",
}


def shows(*options: str):
    def keep(test):
        SHOWN.update(dict.fromkeys(options, test.__name__))
        return test

    return keep


@pytest.fixture
def trained(config, digits, tmp_path):
    """A finished run of one step without evaluation; any option can be changed."""
    count = iter(range(100))
    base = {"task": digits, "steps": 1, "eval_every": 0, "max_new_tokens": 12, "lr_ramp": 1, "lr": 1e-3}

    def make(**options) -> Run:
        return Run(run(config(**{**base, "out": str(tmp_path / f"run-{next(count)}"), **options})))

    return make


def checkpoint(run: Run) -> dict:
    (path,) = (run.path / "checkpoints").glob("*.pt")
    return torch.load(path, weights_only=True)


def weights(run: Run) -> torch.Tensor:
    """All trained weights but the value head's, as one vector."""
    state = checkpoint(run)["weights"]
    return torch.cat([p.flatten() for name, p in state.items() if not name.startswith("value_head")])


def head(run: Run) -> torch.Tensor:
    state = checkpoint(run)["weights"]
    return torch.cat([p.flatten() for name, p in state.items() if name.startswith("value_head")])


@pytest.fixture
def start(tiny_model) -> torch.Tensor:
    """The weights before training."""
    policy = CausalPolicy.load(tiny_model, precision="float32")
    return torch.cat([p.detach().flatten() for p in policy.trainable().values()])


def last(run: Run, kind: str = "train") -> dict:
    return run.metrics(kind)[-1]


def texts(run: Run, step: int = 1) -> list[list[str]]:
    rollouts = run.rollouts(step)
    out = [[] for _ in range(rollouts.num_groups)]
    for group, text in zip(rollouts.group_ids.tolist(), rollouts.meta["text"], strict=True):
        out[group].append(text)
    return out


class Flat:
    """Gives every response the same reward."""

    name, splitter, judge = "flat", None, None

    def __init__(self, task, reward=1.0):
        self.train, self.test, self.reward = task.train, task.test, reward

    def __repr__(self):
        return f"flat({self.reward})"

    def verify(self, problem, text):
        return self.reward


# ---- how much ---------------------------------------------------------------------------------------------------------


@shows("model", "out", "steps", "prompts_per_step", "group_size")
def test_a_run_has_so_many_steps_groups_and_responses(trained, tiny_model, tmp_path):
    run = trained(steps=3, prompts_per_step=5, group_size=2)
    assert run.path.parent == tmp_path
    assert run.info["config"]["model"] == tiny_model
    assert run.steps() == [1, 2, 3]
    assert [torch.bincount(run.rollouts(s).group_ids).tolist() for s in run.steps()] == [[2] * 5] * 3


def test_groups_may_differ_in_size(trained, digits):
    sizes = {p.id: 2 + i % 3 for i, p in enumerate(digits.train)}
    run = trained(group_sizes=lambda problem: sizes[problem.id], group_size=1)
    assert "group_size has no effect in this run: group_sizes decides." in run.info["notes"]
    rollouts = run.rollouts(1)
    counts = torch.bincount(rollouts.group_ids).tolist()
    first = [rollouts.meta["prompt_id"][rollouts.group_ids.tolist().index(g)] for g in range(rollouts.num_groups)]
    assert counts == [sizes[i] for i in first]
    assert len(set(counts)) > 1


class HalfDead:
    """Every second problem pays nothing; the others pay responses with an even number of characters."""

    name, splitter, judge = "half dead", None, None

    def __init__(self, task):
        self.train, self.test = task.train, task.test
        self.dead = {p.id for p in task.train[::2]}

    def __repr__(self):
        return "half dead"

    def verify(self, problem, text):
        return 0.0 if problem.id in self.dead else float(len(text) % 2)


@shows("refill")
def test_dead_groups_are_replaced_by_new_prompts_as_often_as_is_allowed(trained, task):
    kept = trained(task=HalfDead(task), prompts_per_step=8, group_size=8)
    filled = trained(task=HalfDead(task), prompts_per_step=8, group_size=8, refill=1)
    full = trained(task=HalfDead(task), prompts_per_step=8, group_size=8, refill=5, steps=2)
    dead = [last(r)["dead_groups"] for r in (kept, filled, full)]
    assert dead[0] > dead[1] > dead[2] == 0
    assert last(kept)["refilled"] == 0 < last(filled)["refilled"]
    for done in (kept, filled, full):
        rollouts = done.rollouts(1)
        assert torch.bincount(rollouts.group_ids).tolist() == [8] * 8
        assert len(set(rollouts.meta["prompt_id"])) == 8
    assert not set(full.rollouts(1).meta["prompt_id"]) & set(full.rollouts(2).meta["prompt_id"])
    assert last(kept)["tokens"] == int(kept.rollouts(1).action_mask.sum())
    assert last(filled)["tokens"] > int(filled.rollouts(1).action_mask.sum())  # what was thrown away was sampled too


# ---- sampling ---------------------------------------------------------------------------------------------------------


@shows("max_new_tokens", "min_new_tokens")
def test_responses_keep_to_the_shortest_and_the_longest_length(trained):
    lengths = [r.rollouts(1).action_mask.sum(1) for r in (trained(max_new_tokens=9), trained(min_new_tokens=12))]
    assert lengths[0].max() == 9
    assert lengths[1].tolist() == [12] * 16


@shows("temperature", "top_p", "top_k")
@pytest.mark.parametrize("option", [{"temperature": 1e-4}, {"top_p": 1e-6}, {"top_k": 1}])
def test_where_one_token_is_left_to_choose_a_group_is_one_text(trained, option):
    assert all(len(set(group)) == 1 for group in texts(trained(**option)))
    assert all(len(set(group)) > 1 for group in texts(trained()))


@shows("stop")
def test_a_response_ends_with_the_text_that_stops_it(trained):
    marks = tuple("abcdefgh123456")
    free, stopped = (trained(stop=stop, max_new_tokens=24) for stop in ((), marks))
    for text, cut in zip(
        [x for group in texts(stopped) for x in group], stopped.rollouts(1).truncated.tolist(), strict=True
    ):
        assert not any(mark in text[:-1] for mark in marks)
        assert not (cut and text.endswith(marks))
    assert last(stopped)["length"] < last(free)["length"]


class Talking(Flat):
    """Answers every turn, after a while."""

    def __init__(self, task, seconds=0.0):
        super().__init__(task)
        self.seconds = seconds

    def environment(self, problem):
        seconds = self.seconds

        class Slow(Environment):
            def reply(self, text):
                time.sleep(seconds)
                return Reply("?")

        return Slow()


@shows("max_turns")
def test_a_conversation_has_at_most_so_many_turns(trained, task):
    run = trained(task=Talking(task), max_turns=3, max_new_tokens=4, stop=tuple(map(chr, range(32, 100))))
    turns = torch.bincount(run.rollouts(1).spans["turn"].row)
    assert turns.max() == 3


@shows("tool_seconds")
def test_an_answer_is_waited_for_no_longer_than_this(trained, task):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"turn 1"):
        trained(task=Talking(task, 20.0), tool_seconds=0.2, stop=tuple(map(chr, range(32, 100))))
    assert time.monotonic() - begun < 15


# ---- rewards ----------------------------------------------------------------------------------------------------------


def half(problem, text):
    return 0.5


@shows("task_weight")
def test_the_outcome_is_the_weighted_sum_of_the_verifier_and_the_rewards(trained):
    run = trained(task_weight=2.0, rewards=(Reward(half, weight=3.0),), truncated_reward=None)
    signals = run.rollouts(1).signals
    assert signals["half"].values.tolist() == [0.5] * 16
    assert torch.equal(signals["outcome"].values, 2.0 * signals["verifier"].values + 1.5)
    assert last(run)["reward/half"] == 0.5
    assert last(run)["reward/verifier"] == pytest.approx((last(run)["reward"] - 1.5) / 2)
    alone = trained(task_weight=0.0, rewards=(Reward(half),), truncated_reward=None)
    assert alone.rollouts(1).signals["outcome"].values.tolist() == [0.5] * 16


def sleeper(problem, text):
    time.sleep(20)
    return 1.0


@shows("reward_seconds")
def test_a_reward_that_hangs_ends_the_run_after_its_limit(trained):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"step 1 stopped: .*sleeper"):
        trained(rewards=(Reward(sleeper),), reward_seconds=0.2, truncated_reward=None)
    assert time.monotonic() - begun < 15


@shows("truncated_reward")
def test_a_response_that_was_cut_gets_the_outcome_for_it(trained):
    rollouts = trained(truncated_reward=-2.0).rollouts(1)
    outcome = rollouts.signals["outcome"].values
    assert rollouts.truncated.any()
    assert outcome[rollouts.truncated].tolist() == [-2.0] * int(rollouts.truncated.sum())
    assert (outcome[~rollouts.truncated] >= 0).all()


@shows("mask_truncated")
def test_a_response_that_was_cut_can_be_left_out_of_the_loss_but_not_of_the_baseline(trained):
    run = trained(mask_truncated=True, max_new_tokens=60, group_size=8)
    rollouts, credit = run.rollouts(1), run.credit(1)
    assert rollouts.truncated.any()
    assert not rollouts.truncated.all()
    assert torch.equal(credit.mask, rollouts.action_mask & ~rollouts.truncated[:, None])
    whole = grpo()(rollouts).advantages
    assert torch.equal(credit.advantages[~rollouts.truncated], whole[~rollouts.truncated])
    assert run.info["credit"] == repr(chain(grpo(), without_truncated()))


# ---- updates ----------------------------------------------------------------------------------------------------------


@shows("inner_epochs", "mini_batches")
@pytest.mark.parametrize(("epochs", "parts"), [(1, 1), (3, 1), (1, 2), (2, 4)])
def test_a_step_makes_an_update_for_each_part_of_each_epoch(trained, epochs, parts):
    run = trained(inner_epochs=epochs, mini_batches=parts)
    state = checkpoint(run)["optimizer"]["state"][0]
    assert int(state["step"]) == epochs * parts
    shift = last(run)["policy/ratio_shift"]
    assert (
        (shift > 1e-4) if epochs * parts > 1 else shift == 0
    )  # the first update moves the policy away from what acted
    assert (run.rollouts(1).old_logprobs is not None) == (epochs * parts > 1)


@shows("lr", "lr_ramp", "lr_schedule", "lr_final")
def test_the_rate_climbs_and_falls_as_it_is_told(trained, start):
    moved = (weights(trained(lr=1e-3)) - start).abs().max()
    assert moved == pytest.approx(1e-3, rel=0.05)  # the first step of AdamW moves a weight by its rate
    flat = trained(lr=1e-3, lr_ramp=4, steps=5)
    assert [m["lr"] for m in flat.metrics("train")] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    falling = trained(lr=1e-3, lr_ramp=1, lr_schedule="linear", lr_final=0.2, steps=5)
    assert [m["lr"] for m in falling.metrics("train")] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


@shows("weight_decay")
def test_weight_decay_shrinks_the_weights_even_without_a_gradient(trained, task, start):
    run = trained(task=Flat(task), truncated_reward=None, lr=1e-2, weight_decay=0.5)
    torch.testing.assert_close(weights(run), start * (1 - 1e-2 * 0.5), rtol=1e-5, atol=1e-8)


@shows("grad_clip")
def test_the_gradient_is_cut_to_its_largest_norm(trained):
    run = trained(grad_clip=1e-3)
    moments = [s["exp_avg"].flatten() for s in checkpoint(run)["optimizer"]["state"].values()]
    assert last(run)["grad_norm"] > 1e-2
    assert float(torch.cat(moments).norm()) == pytest.approx(
        0.1 * 1e-3, rel=1e-3
    )  # (1 - beta1) of the clipped gradient


FAR = {"inner_epochs": 4, "lr": 2e-2, "max_new_tokens": 12}  # updates that leave the clip range


@shows("clip_low", "clip_high")
def test_the_clip_holds_the_policy_near_the_one_that_acted(trained):
    free, tight = trained(**FAR, clip_low=None, clip_high=None), trained(**FAR, clip_low=0.0, clip_high=0.0)
    assert last(free)["policy/clip_low"] == last(free)["policy/clip_high"] == 0
    assert last(tight)["policy/clip_low"] > 0
    assert last(tight)["policy/clip_high"] > 0
    assert last(tight)["policy/ratio_shift"] < last(free)["policy/ratio_shift"]


@shows("objective", "dual_clip", "ratio", "aggregation")
@pytest.mark.parametrize(
    "option",
    [{"objective": "cispo"}, {"dual_clip": 1.01}, {"ratio": "sequence"}, {"aggregation": "sequence_mean_token_mean"}],
    ids=str,
)
def test_forms_of_the_loss_lead_elsewhere_from_the_same_rollouts(trained, option):
    plain, other = trained(**FAR), trained(**FAR, **option)
    assert torch.equal(plain.rollouts(1).tokens, other.rollouts(1).tokens)
    assert not torch.allclose(weights(plain), weights(other), atol=1e-5)


@shows("ratio")
def test_a_ratio_may_cover_each_span_of_a_set(trained):
    measures = (SpansFrom("macro", fixed_ngrams(5)),)
    token, macro = (trained(**FAR, ratio=ratio, measures=measures) for ratio in ("token", "macro"))
    assert not torch.allclose(weights(token), weights(macro), atol=1e-5)
    assert last(macro)["policy/ratio_shift"] > last(token)["policy/ratio_shift"]  # products leave the range sooner


@shows("correction", "correction_cap")
def test_a_sampler_that_computes_otherwise_is_corrected_for(trained):
    def both(**options):
        return [trained(precision=p, **options) for p in ("float32", "bfloat16")]

    plain, corrected = both(), both(correction="token_truncate")
    torch.testing.assert_close(weights(plain[0]), weights(corrected[0]), rtol=0, atol=1e-4)
    assert not torch.allclose(weights(plain[1]), weights(corrected[1]), rtol=0, atol=1e-5)
    masked = trained(precision="bfloat16", correction="token_mask", correction_cap=1.0)
    assert last(masked)["policy/corrected"] > 0.2  # about half of the weights lie above 1
    assert last(corrected[1])["policy/corrected"] < last(masked)["policy/corrected"]


@shows("kl_coef", "kl_estimator")
def test_a_kl_penalty_pulls_towards_the_reference(trained, start):
    free, held, absolute = (
        trained(steps=4, lr=5e-3, kl_coef=c, kl_estimator=e) for c, e in ((0.0, "k3"), (30.0, "k3"), (30.0, "abs"))
    )
    gone = [float((weights(r) - start).norm()) for r in (free, held)]
    assert gone[1] < gone[0]
    assert "kl/reference" in last(held)
    assert last(held)["kl/reference"] != last(absolute)["kl/reference"]
    assert free.rollouts(1).ref_logprobs is None


@shows("kl_weighed")
def test_a_weighed_penalty_counts_as_the_policy_now_writes_it(trained):
    plain, weighed = (trained(**FAR, steps=2, kl_coef=5.0, kl_weighed=w) for w in (False, True))
    assert torch.equal(plain.rollouts(1).tokens, weighed.rollouts(1).tokens)
    assert not torch.allclose(weights(plain), weights(weighed), atol=1e-5)


@shows("kl_in")
def test_a_kl_penalty_in_the_reward_is_taken_off_the_outcome(trained):
    run = trained(steps=2, lr=1e-2, kl_coef=0.5, kl_in="reward")
    rollouts = run.rollouts(2)
    gap = torch.where(rollouts.action_mask, rollouts.logprobs - rollouts.ref_logprobs, 0.0).sum(1)
    assert gap.abs().max() > 0.01
    want = rollouts.signals["score"].values - 0.5 * gap
    torch.testing.assert_close(rollouts.signals["outcome"].values, want, rtol=1e-5, atol=1e-5)
    assert "kl/reference" not in last(run)
    assert last(run)["reward"] == pytest.approx(float(rollouts.signals["score"].values.mean()))


@pytest.mark.parametrize(
    "options",
    [
        {"kl_in": "reward", "credit": group_relative.trl()},
        {"kl_in": "credit", "credit": chain(gae(kl_coef="kl_coef"), whiten()), "critic": "head"},
        {"credit": chain(gae(kl_coef=0.5), whiten()), "critic": "head", "kl_coef": 0.0},
        {"credit": oprl(), "measures": (OnlinePRM(), SpansFrom("turn", fixed_ngrams(4))), "kl_coef": 0.0},
    ],
    ids=["reward", "credit", "gae", "oprl"],
)
def test_where_nothing_was_learnt_a_bfloat16_sampler_makes_no_distance(trained, task, options):
    """The policy is the reference and all rewards are 0. Divided by its spread, the sampler's rounding would be an update."""
    settings = {
        "task": Flat(task, 0.0),
        "truncated_reward": None,
        "precision": "bfloat16",
        "kl_coef": 0.05,
        "value_coef": 0.0,
    }
    assert last(trained(**{**settings, **options}))["grad_norm"] < 1e-6


@shows("kl_target", "kl_horizon")
@pytest.mark.parametrize("where", ["loss", "reward"])
def test_the_weight_of_the_penalty_follows_its_target(trained, where):
    run = trained(steps=3, lr=1e-2, kl_coef=0.5, kl_in=where, kl_target=0.1, kl_horizon=100)
    coefs = [m["kl/coef"] for m in run.metrics("train")]
    for step in (1, 2):
        kl = reference_kl(run.rollouts(step))
        assert coefs[step] == steered(coefs[step - 1], kl, target=0.1, horizon=100, count=16)
    assert coefs[0] == 0.5
    assert coefs[1] == pytest.approx(0.5 * (1 - 0.2 * 0.16))  # no distance yet: a fifth, times 16 of 100 responses


def test_a_method_with_a_penalty_of_its_own_reads_the_steered_weight(trained):
    run = trained(credit=gae(kl_coef="kl_coef"), critic="head", steps=2, kl_coef=0.5, kl_in="credit", kl_target=0.1)
    assert "kl/loss" not in last(run)
    assert run.rollouts(2).signals["kl_coef"].values.tolist() == pytest.approx([last(run)["kl/coef"]])
    assert "score" not in run.rollouts(2).signals


@shows("entropy_coef")
def test_an_entropy_bonus_spreads_the_policy_and_a_negative_one_sharpens_it(trained, task):
    def entropy(coef):
        run = trained(task=Flat(task), truncated_reward=None, entropy_coef=coef, steps=4, lr=1e-2)
        return last(run)["entropy/mean"]

    assert entropy(1.0) > entropy(-1.0)


# ---- critic -----------------------------------------------------------------------------------------------------------

PPO = {"credit": gae(), "critic": "head"}


@shows("critic", "critic_lr")
def test_a_critic_supplies_the_values_and_learns(trained):
    run = trained(**PPO, steps=2, critic_lr=0.01)
    assert not run.rollouts(1).values.any()  # it starts at 0
    assert run.rollouts(2).values.abs().max() > 0
    first = trained(**PPO, critic_lr=0.01)
    assert float(head(first).abs().max()) == pytest.approx(0.01, rel=0.05)


@shows("critic", "critic_model")
def test_a_critic_may_be_a_model_of_its_own(trained, other_model):
    copy, other = (trained(credit=gae(), critic="model", critic_model=m, steps=2) for m in ("", other_model))
    assert torch.equal(copy.rollouts(1).tokens, other.rollouts(1).tokens)
    assert not copy.rollouts(1).values.any()
    assert copy.rollouts(2).values.abs().max() > 0
    assert not torch.equal(copy.rollouts(2).values, other.rollouts(2).values)
    assert "value_head.weight" not in checkpoint(copy)["weights"]  # the policy has none


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    from conftest import build_tiny_model

    return str(build_tiny_model(tmp_path_factory.mktemp("models") / "other", hidden=16, seed=5))


@shows("critic_warmup")
@pytest.mark.parametrize("critic", ["head", "model"])
def test_the_critic_learns_alone_at_first(trained, critic):
    options = {"credit": gae(), "critic": critic, "critic_warmup": 2, "lr_ramp": 2, "kl_coef": 0.1, "kl_target": 1.0}
    waiting, after = trained(**options, steps=3), trained(**options, steps=4)
    for done in (waiting, after):
        assert done.rollouts(3).values.abs().max() > 0
        assert ["policy/loss" in m for m in done.metrics("train")][:3] == [False, False, True]
    assert torch.equal(*(r.rollouts(3).logprobs for r in (waiting, after)))
    assert [m["lr"] for m in after.metrics("train")] == [0.0, 0.0, 5e-4, 1e-3]  # the policy's ramp begins with it
    coefs = [m["kl/coef"] for m in after.metrics("train")]
    assert coefs[0] == coefs[1] == coefs[2] > coefs[3]  # a policy that waits steers nothing
    policy = CausalPolicy.load(waiting.info["config"]["model"], precision="float32")
    for step, same in ((3, True), (4, False)):  # what acted at step 3 is still the first policy
        rollouts = after.rollouts(step)
        with torch.no_grad():
            found = policy.outputs(rollouts, rollouts.action_mask).logprobs
        assert torch.allclose(found, rollouts.logprobs, atol=1e-4) is same


@shows("value_coef", "value_clip")
def test_the_value_loss_has_its_weight_and_its_bound(trained):
    small, large = (trained(**PPO, value_coef=c) for c in (0.1, 0.2))
    assert last(large)["value/loss"] == pytest.approx(2 * last(small)["value/loss"])
    far = {**PPO, "inner_epochs": 3, "critic_lr": 0.05}
    assert last(trained(**far, value_clip=0.001))["value/clipped"] > 0
    assert last(trained(**far, value_clip=None))["value/clipped"] == 0


# ---- adapter and warm-up ----------------------------------------------------------------------------------------------


@shows("lora_rank", "lora_alpha")
def test_an_adapter_of_this_rank_and_scale_is_trained_alone(trained):
    small, large = (trained(lora_rank=2, lora_alpha=a, steps=2) for a in (2, 8))
    shapes = {tuple(p.shape) for name, p in checkpoint(small)["weights"].items() if "lora_A" in name}
    assert {rank for rank, _ in shapes} == {2}
    assert all("lora_" in name for name in checkpoint(small)["weights"])
    assert not torch.equal(small.rollouts(2).logprobs, large.rollouts(2).logprobs)


@shows("warmup", "warmup_lr", "warmup_batch")
def test_the_warm_up_teaches_worked_solutions(trained, task):
    def losses(**options):
        run = trained(task=task, steps=0, max_new_tokens=24, **options)
        return [m["loss"] for m in run.metrics("warmup")]

    slow, fast = (losses(warmup=6, warmup_lr=rate) for rate in (1e-5, 1e-2))
    assert len(slow) == 6
    assert slow[0] == fast[0]
    assert fast[-1] < slow[-1] - 0.1
    assert losses(warmup=1, warmup_batch=2)[0] != slow[0]


# ---- evaluation and stopping ------------------------------------------------------------------------------------------


@shows("eval_every", "eval_size", "eval_temperature", "eval_samples", "eval_greedy")
def test_evaluations_are_made_as_often_and_as_large_as_asked(trained):
    run = trained(steps=4, eval_every=2, eval_size=6, eval_samples=4, eval_greedy=True)
    lines = run.metrics("eval")
    assert [m["step"] for m in lines] == [0, 2, 4]
    assert all(m["n"] == 6 and len(m["correct"]) == 6 for m in lines)
    assert {"pass@2", "pass@4", "greedy"} <= lines[0].keys()
    greedy = trained(eval_every=1, eval_size=6, eval_temperature=0.0).metrics("eval")[0]
    assert greedy["accuracy"] == lines[0]["greedy"]


@shows("keep_best", "patience")
def test_the_best_model_is_kept_and_a_run_that_finds_no_better_ends(trained, task, start):
    class Falling(Flat):
        """Evaluations get worse every time; training groups are mixed."""

        def verify(self, problem, text):
            if problem in self.train:
                return float(len(text) % 2)
            self.reward *= 0.99
            return self.reward

    options = {"truncated_reward": None, "eval_every": 1, "eval_size": 4, "patience": 2}
    run = trained(task=Falling(task), keep_best=True, steps=9, **options)
    assert run.steps() == [1, 2]
    assert "patience" in last(run, "stop")["reason"]
    best = CausalPolicy.load(str(run.path / "best"), precision="float32")
    kept = torch.cat([p.detach().flatten() for p in best.trainable().values()])
    assert torch.equal(kept, start)  # the best was the first
    assert not torch.equal(kept, weights(run))


@shows("collapse_reward", "collapse_entropy", "collapse_length")
@pytest.mark.parametrize("option", ["collapse_reward", "collapse_entropy", "collapse_length"])
def test_a_collapse_ends_the_run_with_its_reason(trained, task, option):
    class Fading(Flat):
        calls = 0

        def verify(self, problem, text):
            self.calls += 1
            return 1.0 if self.calls <= 16 * 5 else 0.0

    class Short(Flat):
        """Pays short responses."""

        def verify(self, problem, text):
            return -float(len(text))

    made, more = {
        "collapse_reward": (Fading(task), {}),
        "collapse_entropy": (Flat(task), {"entropy_coef": -1.0, "lr": 3e-2}),
        "collapse_length": (Short(task), {"lr": 1e-2, "max_new_tokens": 40, "group_size": 8}),
    }[option]
    more |= {"eval_every": 100, "eval_size": 2, option: 0.8}
    run = trained(task=made, truncated_reward=None, steps=60, save_every=0, **more)
    assert 5 < len(run.steps()) < 60
    assert [m["step"] for m in run.metrics("eval")] == [0, len(run.steps())]  # before, and after the last step
    assert option in last(run, "stop")["reason"]


# ---- what is kept, and the machine ------------------------------------------------------------------------------------


@shows("save_every", "save_model")
def test_checkpoints_and_the_model_are_written_when_asked(trained):
    none, both = trained(save_every=0), trained(save_every=2, save_model=True, steps=3)
    assert not list(none.path.glob("checkpoints/*.pt"))
    assert not (none.path / "model").exists()
    assert checkpoint(both)["step"] == 3
    assert (both.path / "model" / "config.json").is_file()
    assert (both.path / "model" / "README.md").is_file()


@shows("threads")
def test_the_processor_threads_are_those_asked_for(trained):
    before = torch.get_num_threads()
    try:
        trained(threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@shows("precision")
def test_bfloat16_rounds_what_the_sampler_records(trained):
    exact, rounded = (trained(precision=p, max_new_tokens=1).rollouts(1) for p in ("float32", "bfloat16"))
    gap = (exact.logprobs - rounded.logprobs)[exact.tokens == rounded.tokens].abs()
    assert 1e-4 < float(gap.max()) < 0.2


@shows("progress")
def test_progress_prints_a_line_per_step(trained, capsys):
    trained(progress=True)
    assert "step    1/1  reward" in capsys.readouterr().err
    trained(progress=False)
    assert not capsys.readouterr().err


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mini_batches": 5, "prompts_per_step": 4},
            r"mini_batches is 5, but a step has 4 groups \(prompts_per_step\)",
        ),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens is 9, but max_new_tokens allows 8"),
        ({"refill": 1, "group_size": 1}, r"needs at least 2 per prompt, but group_size is 1"),
        ({"refill": 1, "group_size": 1, "credit": nsr()}, r"refill is 1, but with group_size 1 every group has equal"),
        ({"group_sizes": lambda problem: 1}, r"needs at least 2 per prompt, but group_sizes gives at most 1"),
        ({"group_sizes": lambda problem: 0}, r"group_sizes gives problem arithmetic-\w+ 0 responses"),
        ({"group_sizes": lambda problem: 4.0}, r"group_sizes gives problem arithmetic-\w+ 4.0 responses"),
        ({"lr_schedule": "cosin"}, r"lr_schedule must be one of constant, linear, cosine; got 'cosin'"),
        ({"kl_coef": 0.1, "kl_in": "rewards"}, r"kl_in must be one of loss, reward, credit; got 'rewards'"),
        (
            {"ratio": "turn"},
            r"ratio='turn' needs spans.turn, which nothing in this run supplies. Use a task that answers",
        ),
        (
            {"kl_coef": 0.1, "kl_in": "reward", "credit": gdpo(rewards=("half",)), "rewards": (Reward(half),)},
            r"kl_in is 'reward', but .*does not read the outcome, so the KL penalty would do nothing",
        ),
        ({"task_weight": 0.0}, r"task_weight is 0 and no rewards are given"),
        (
            {"task": from_data([{"prompt": f"{i} and {i}?"} for i in range(40)], answer=None, verify=None)},
            r"task_weight is 1, but the task verifies nothing",
        ),
        ({"kl_target": 0.1}, r"kl_target is 0.1, but kl_coef is 0"),
        (
            {"kl_coef": 0.1, "kl_in": "reward", "credit": gae(kl_coef=0.1), "critic": "head"},
            r"kl_in is 'reward', but gae\(kl_coef=0.1\) takes the KL penalty off the reward by itself",
        ),
        ({"kl_coef": 0.1, "kl_in": "credit"}, r"kl_in is 'credit', but .* does not read the weight of the KL penalty"),
        (
            {"kl_coef": 0.1, "credit": gae(kl_coef="kl_coef"), "critic": "head"},
            r"kl_in is 'loss', but gae\(kl_coef='kl_coef'\) reads the weight of the KL penalty",
        ),
        ({"critic_model": "x"}, r"critic_model is 'x', but critic is 'none'"),
        ({"credit": gae(), "critic": "head", "critic_warmup": 2}, r"critic_warmup is 2 and steps is 2"),
        ({"patience": 1, "eval_every": 0}, r"patience needs evaluations, but eval_every is 0"),
        ({"keep_best": True, "eval_every": 0}, r"keep_best needs evaluations, but eval_every is 0"),
        ({"eval_samples": 2, "eval_temperature": 0.0}, r"eval_samples is 2, but eval_temperature is 0"),
        ({"objective": "cispo", "dual_clip": 3.0}, r"dual_clip.*cispo|cispo.*dual_clip"),
        ({"temperature": 0.0}, r"temperature must be above 0; got 0"),
        ({"collapse_reward": 1.0}, r"collapse_reward is a share below 1; got 1"),
        ({"top_p": 1.5}, r"top_p is a probability and at most 1; got 1.5"),
        ({"inner_epochs": 0}, r"inner_epochs must be at least 1; got 0"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_options_that_contradict_each_other_are_refused_with_both_names(config, digits, options, message):
    settings = config(**{"task": digits, **options})
    with pytest.raises(ValueError, match=message):
        run(settings)
    assert not settings.folder.exists()


def test_an_option_without_effect_is_reported(trained, capsys):
    run = trained(progress=True, clip_low=0.1, kl_estimator="k1", critic_lr=0.1, eval_size=3, lora_alpha=8)
    said = capsys.readouterr().err
    for name in ("clip_low", "kl_estimator", "critic_lr", "eval_size", "lora_alpha"):
        assert f"{name} has no effect in this run: " in said
        assert any(note.startswith(f"{name} has no effect") for note in run.info["notes"])
    assert not trained(eval_every=1).info["notes"]
    (note,) = trained(**PPO, value_clip=None, eval_every=1).info["notes"]
    assert note.startswith("value_clip has no effect in this run: one update per step")


@pytest.mark.parametrize(
    ("where", "settings"), [("sample", "sample_rows (now 64), max_new_tokens"), ("outputs", "micro_tokens (now 1024)")]
)
def test_when_memory_runs_out_the_message_says_what_to_lower(trained, monkeypatch, where, settings):
    def full(*args, **options):
        return torch.empty(1 << 60)  # an exabyte

    monkeypatch.setattr(CausalPolicy, where, full)
    with pytest.raises(ValueError, match=r"memory ran out: .* Lower ") as error:
        trained()
    assert settings in str(error.value)


def test_a_method_that_does_not_say_what_it_reads_may_be_paid_the_penalty(config, digits):
    settings = config(task=digits, credit=lambda rollouts: None, mask_truncated=True, kl_coef=0.1, kl_in="reward")
    check(settings)
    assert "truncated_reward" not in without_effect(replace(settings, truncated_reward=-1.0))


def test_every_option_is_shown_by_a_test():
    here = Path(__file__).parent
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"def {name}(" in (here / file).read_text(), place
    assert {f.name for f in fields(Options)} == SHOWN.keys() | ELSEWHERE.keys()


class Even:
    requires = ("signals.outcome",)

    def __call__(self, rollouts):
        return Credit(torch.where(rollouts.action_mask, 1.0, 0.0), rollouts.action_mask)


def even(rollouts):
    return Even()(rollouts)


@pytest.mark.parametrize("own", [Even(), even], ids=["class", "function"])
def test_credit_of_ones_own_runs_with_what_other_options_do_to_credit(trained, own):
    run = trained(credit=own)
    assert run.credit(1).advantages.max() == 1
    assert run.info["credit"].endswith(f":{getattr(own, '__name__', 'Even')}")  # as the command line names it
    masked = trained(credit=own, mask_truncated=True)
    truncated = masked.rollouts(1).truncated
    assert torch.equal(masked.credit(1).mask, masked.rollouts(1).action_mask & ~truncated[:, None])


def test_what_was_told_reads_the_same_in_every_process(config):
    settings = config(group_sizes=even, measures=(Holds(even),), splitter=Even())
    printed = settings.printable()
    module = even.__module__
    assert [printed[k] for k in ("group_sizes", "measures", "splitter")] == [
        f"{module}:even",
        "(Holds(<function even>),)",
        f"{module}:Even",
    ]


class Holds:
    def __init__(self, function):
        self.function = function

    def __repr__(self):
        return f"Holds({self.function!r})"
