"""A critic of its own model and an online reward model: their numbers by hand, and what must not change them."""

import io
import math
from dataclasses import replace

import pytest
import torch

from apportion import Rollouts, Signal, Spans
from apportion.losses import ValueLoss, implicit_prm_loss
from apportion.train import CausalPolicy, ModelLogRatio, NotFinite
from apportion.train.critic import Critic, explained
from apportion.train.online_prm import OnlinePRM
from apportion.types import Credit
from conftest import build_tiny_model

SIZES = (4, 1, 3)
OUTCOMES = [1.0, 0, 0, 1, 1, 0, 1, 1]


def answers(policy, task, outcomes=OUTCOMES) -> Rollouts:
    """Eight random responses of 3 to 7 letters in three groups."""
    rng = torch.Generator().manual_seed(0)
    tokens, masks, groups = [], [], []
    for g, (problem, size) in enumerate(zip(task.train, SIZES, strict=False)):
        for _ in range(size):
            prompt = policy.prompt_ids(problem)
            length = int(torch.randint(3, 8, (1,), generator=rng))
            tokens.append(prompt + torch.randint(0, 256, (length,), generator=rng).tolist())
            masks.append([False] * len(prompt) + [True] * length)
            groups.append(g)
    rollouts = Rollouts.from_lists(tokens, groups, action_mask=masks, outcome=outcomes)
    with torch.no_grad():
        return rollouts.replace(logprobs=policy.outputs(rollouts, rollouts.action_mask).logprobs)


def returned(rollouts, returns=None) -> Credit:
    """Credit whose returns are the outcome at every token, or the given ones of each row."""
    values = rollouts.signals["outcome"].values if returns is None else torch.tensor(returns)
    spread = torch.where(rollouts.action_mask, values[:, None], 0.0)
    return Credit(torch.zeros_like(spread), rollouts.action_mask, returns=spread)


def attached(measure, policy):
    measure.attach(policy)
    return measure


def states_before(model, rollouts) -> list[torch.Tensor]:
    """For each row the last hidden states from which its actions were chosen, one plain pass each."""
    out = []
    for b in range(rollouts.batch):
        ids = rollouts.tokens[b : b + 1, : int(rollouts.lengths[b])]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        out.append(states[rollouts.action_mask[b].nonzero()[:, 0] - 1])
    return out


def weights(measure) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in measure.trained.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> str:
    return str(build_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1))


MAKERS = [lambda **how: Critic(lr=1e-2, **how), lambda **how: OnlinePRM(lr=1e-2, **how)]
both = pytest.mark.parametrize("make", MAKERS, ids=["critic", "prm"])


def taught(measure, rollouts):
    """The rollouts with what it measured, after one update."""
    for name, found in measure.measure(rollouts).items():
        rollouts = (
            rollouts.with_signals(**{name: found}) if isinstance(found, Signal) else replace(rollouts, **{name: found})
        )
    measure.update(rollouts, returned(rollouts))
    return rollouts


# ---- both ------------------------------------------------------------------------------------------------------------------


@both
def test_two_updates_are_one_then_a_checkpoint_then_another(make, tiny_model, policy, task):
    rollouts = answers(policy, task)
    whole, first, second = (attached(make(model=tiny_model), policy) for _ in range(3))
    taught(whole, rollouts)
    middle = weights(whole)
    taught(whole, rollouts)
    taught(first, rollouts)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert same(weights(second), middle)
    taught(first, rollouts)  # must not reach into what was loaded from its state
    taught(second, rollouts)
    assert same(weights(second), weights(whole))
    assert not same(weights(whole), middle)
    assert second.updates == 2


@both
def test_before_it_is_needed_its_state_is_empty_and_can_be_loaded(make, policy):
    state = through_a_file(attached(make(), policy).state_dict())
    assert state == {"updates": 0, "weights": None, "optimizer": None}
    measure = attached(make(), policy)
    measure.load_state_dict(state)
    assert measure.state_dict() == state


@both
def test_a_copy_is_of_the_policy_when_first_needed_and_leaves_it_alone(make, policy, task):
    measure = attached(make(), policy)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.01)  # the warm-up
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    rollouts = answers(policy, task)
    measure.measure(rollouts)
    assert all(torch.equal(p, before[k]) for k, p in measure.trained.items() if k in before)
    taught(taught_twice := measure, rollouts)
    taught(taught_twice, rollouts)
    assert same({k: p.detach() for k, p in policy.trainable().items()}, before)
    assert any(not torch.equal(p, before[k]) for k, p in measure.trained.items() if k in before)


@both
def test_of_an_adapter_only_the_adapter_is_copied(make, tiny_model, task):
    policy = CausalPolicy.load(tiny_model, precision="float32", lora_rank=2)
    measure = attached(make(), policy)
    own = dict(policy.model.named_parameters())
    for name, p in measure.second.model.named_parameters():
        assert (p is own[name]) == (not p.requires_grad)
    assert all("lora" in name or name.startswith("value_head") for name in measure.trained)
    base = {name: p.detach().clone() for name, p in own.items()}
    rollouts = answers(policy, task)
    taught(measure, rollouts)
    taught(measure, rollouts)
    assert all(torch.equal(p, base[name]) for name, p in own.items())


@both
def test_micro_batches_do_not_change_the_gradient(make, tiny_model, policy, task):
    rollouts = answers(policy, task)
    found = []
    for micro in (1, 40, 10_000):
        measure = attached(make(model=tiny_model, micro_tokens=micro, grad_clip=1e9), policy)
        if isinstance(measure, Critic):
            torch.nn.init.ones_(measure.second.value_head.weight)  # else the body gets no gradient
        before = weights(measure)
        measure._optimizer = torch.optim.SGD(measure.trained.values(), lr=1.0)
        taught(measure, rollouts)
        found.append(torch.cat([(before[k] - p.detach()).flatten() for k, p in measure.trained.items()]))
    assert found[2].abs().max() > 1e-4
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-6)


@both
def test_other_tokens_are_refused(make, policy, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small, renamed = tmp_path / "small", build_tiny_model(tmp_path / "renamed")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes)).save_pretrained(small)
    policy.tokenizer.save_pretrained(small)
    with pytest.raises(ValueError, match=r"small'.* knows 64 tokens, but the policy has 258\. Give a model with"):
        attached(make(model=str(small)), policy)
    file = renamed / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|other|>"))
    (renamed / "tokenizer_config.json").write_text(
        (renamed / "tokenizer_config.json").read_text().replace("<|im_start|>", "<|other|>")
    )
    assert AutoTokenizer.from_pretrained(renamed).convert_tokens_to_ids("<|other|>") == 257
    with pytest.raises(ValueError, match=r"token 257 is '<\|im_start\|>' for the policy, but not for .*renamed'"):
        attached(make(model=str(renamed)), policy)


@both
def test_without_a_policy_it_says_so(make, policy, task):
    with pytest.raises(ValueError, match=r"is not attached to a policy\. Call attach\(policy\); the trainer does"):
        make().measure(answers(policy, task))


def test_they_print_as_what_made_them():
    assert repr(Critic(model="m", lr=1e-5)) == "Critic(model='m')"
    assert repr(OnlinePRM(beta=0.1, model="m")) == "OnlinePRM(model='m', beta=0.1)"
    assert "loss=ValueLoss(coef=2.0" in repr(Critic(loss=ValueLoss(coef=2.0)))


# ---- the critic ------------------------------------------------------------------------------------------------------------


def test_a_value_is_the_head_on_the_state_before_the_action(tiny_model, policy, task):
    rollouts = answers(policy, task)
    critic = attached(Critic(model=tiny_model, micro_tokens=60), policy)
    assert (critic.measure(rollouts)["values"] == 0).all()
    head = critic.second.value_head
    torch.nn.init.normal_(head.weight)
    torch.nn.init.constant_(head.bias, 0.5)
    values = critic.measure(rollouts)["values"]
    assert (values[~rollouts.action_mask] == 0).all()
    for b, states in enumerate(states_before(critic.second.model, rollouts)):
        want = states @ head.weight.detach()[0] + 0.5
        torch.testing.assert_close(values[b, rollouts.action_mask[b]], want, rtol=1e-4, atol=1e-4)


def with_holes(rollouts) -> Rollouts:
    """As in a conversation: what stands between was read, not written."""
    mask = rollouts.action_mask.clone()
    first = mask.int().argmax(1)
    mask[torch.arange(len(mask)), first + 1] = False
    return rollouts.replace(action_mask=mask, logprobs=torch.where(mask, rollouts.logprobs, 0.0))


@pytest.mark.parametrize("lora", [0, 2])
def test_of_several_turns_only_what_was_written_is_valued_scored_and_learnt(tiny_model, task, lora):
    policy = CausalPolicy.load(tiny_model, precision="float32", lora_rank=lora)
    rollouts = with_holes(answers(policy, task))
    critic, prm = (
        attached(Critic(micro_tokens=40, lr=1e-2), policy),
        attached(OnlinePRM(micro_tokens=40, lr=1e-2), policy),
    )
    taught(critic, rollouts)  # its head was 0
    values = critic.measure(rollouts)["values"]
    assert (values[~rollouts.action_mask] == 0).all()
    head = critic.second.value_head
    for b, states in enumerate(states_before(critic.second.model, rollouts)):
        want = states @ head.weight.detach()[0] + head.bias.item()
        torch.testing.assert_close(values[b, rollouts.action_mask[b]], want, rtol=1e-4, atol=1e-4)
    taught(prm, rollouts)
    ratio = prm.measure(rollouts)["log_ratio"].values
    assert torch.equal(ratio.isnan(), ~rollouts.action_mask)
    every = answers(policy, task)
    same_tokens = prm.measure(every)["log_ratio"].values
    torch.testing.assert_close(ratio[rollouts.action_mask], same_tokens[rollouts.action_mask], rtol=1e-3, atol=1e-4)


def test_the_first_update_by_hand(tiny_model, policy, task):
    """V = 0, so the error is R and the gradient of w and b is -coef mean(R h) and -coef mean(R); AdamW moves by lr."""
    rollouts = answers(policy, task)
    critic = attached(Critic(model=tiny_model, lr=1e-3, loss=ValueLoss(coef=0.1, clip=None)), policy)
    rollouts = rollouts.replace(**critic.measure(rollouts))
    credit = returned(rollouts)
    before = weights(critic)
    states = torch.cat(states_before(critic.second.model, rollouts))
    returns = credit.returns[rollouts.action_mask]
    slope = torch.cat([-0.1 * (returns[:, None] * states).mean(0), -0.1 * returns.mean()[None]])
    metrics = critic.update(rollouts, credit)
    assert metrics["value/error"] == pytest.approx(returns.square().mean().item())
    assert metrics["value/loss"] == pytest.approx(0.05 * returns.square().mean().item())
    assert metrics["value/grad_norm"] == pytest.approx(slope.norm().item(), rel=1e-4)
    assert metrics.keys() == {"value/error", "value/loss", "value/clipped", "value/grad_norm"}
    after = weights(critic)
    assert after["value_head.bias"].item() == pytest.approx(1e-3, rel=1e-4)
    torch.testing.assert_close(after["value_head.weight"][0], -1e-3 * slope[:-1].sign(), rtol=1e-2, atol=1e-6)
    assert all(torch.equal(after[k], before[k]) for k in after if not k.startswith("value_head"))  # w was 0


def test_values_move_as_far_as_the_clip_lets_them(tiny_model, policy, task):
    rollouts = answers(policy, task, [1.0] * 8)
    top = {}
    for clip in (0.2, None):
        critic = attached(Critic(model=tiny_model, lr=3e-4, epochs=100, loss=ValueLoss(coef=1.0, clip=clip)), policy)
        rollouts = rollouts.replace(**critic.measure(rollouts))
        metrics = critic.update(rollouts, returned(rollouts))
        top[clip] = critic.measure(rollouts)["values"][rollouts.action_mask].mean().item()
        assert (metrics["value/clipped"] > 0) == (clip is not None)
    assert 0.2 < top[0.2] < 0.4
    assert top[None] > 0.9


def test_epochs_and_parts_are_updates_in_an_order_of_the_seed(tiny_model, policy, task):
    rollouts = answers(policy, task)

    def steps(**how):
        critic = attached(Critic(model=tiny_model, lr=1e-3, **how), policy)
        taught(critic, rollouts)
        assert critic.updates == 1
        made = {int(s["step"]) for s in critic.state_dict()["optimizer"]["state"].values()}
        return made, weights(critic)

    one, six, again, other = (
        steps(),
        steps(epochs=2, parts=3),
        steps(epochs=2, parts=3),
        steps(epochs=2, parts=3, seed=1),
    )
    assert one[0] == {1}
    assert six[0] == {6}
    assert same(six[1], again[1])
    assert not same(six[1], other[1])


def test_no_logits_are_formed_and_an_output_layer_of_its_own_is_not_trained(tmp_path, policy, task, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path / "untied")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    rollouts = answers(policy, task)
    critic = attached(Critic(model=str(folder)), policy)
    monkeypatch.setattr("apportion.train.policy._scores", None)
    taught(critic, rollouts)
    named = dict(critic.second.model.named_parameters())
    assert named["lm_head.weight"] is not named["model.embed_tokens.weight"]
    assert critic.trained.keys() == (named.keys() - {"lm_head.weight"}) | {"value_head.weight", "value_head.bias"}


def test_returns_that_are_not_finite_stop_it_before_its_weights_change_and_name_the_rows(tiny_model, policy, task):
    rollouts = answers(policy, task)
    critic = attached(Critic(model=tiny_model, parts=2), policy)
    rollouts = rollouts.replace(**critic.measure(rollouts))
    before = weights(critic)
    with pytest.raises(NotFinite, match=r"in Critic\(.* the loss is .* and its gradient norm") as caught:
        critic.update(rollouts, returned(rollouts, [0.0, 0, 0, 0, math.inf, 0, 0, 0]))
    assert caught.value.rows == [4]
    names = [k for k in before if not k.startswith("value_head")]
    assert all(torch.equal(before[k], critic.trained[k]) for k in names)


def test_how_much_is_explained():
    rollouts = Rollouts.from_lists([[5, 6, 7], [8]], [0, 0], values=[[0.0, 1.0, 2.0], [9.0]])
    returns = torch.tensor([[1.0, 3.0, 2.0], [99.0, 0, 0]])
    mask = torch.tensor([[True, True, True], [False, False, False]])
    credit = Credit(torch.zeros(2, 3), mask, returns=returns)
    # R - V = 1, 2, 0: variance 2/3, as that of R
    assert explained(rollouts, credit)["value/explained"] == pytest.approx(0.0)
    assert explained(rollouts.replace(values=returns + 5), credit) == {"value/explained": 1.0}
    assert explained(rollouts, replace(credit, returns=torch.ones(2, 3))) == {}
    assert explained(rollouts, replace(credit, returns=None)) == {}
    assert explained(rollouts, credit.narrowed(torch.zeros_like(mask))) == {}


# ---- the reward model ------------------------------------------------------------------------------------------------------

WORKED = Rollouts.from_lists(
    [[1, 2, 3], [1, 2, 3, 4, 5]],
    [0, 0],
    outcome=[1.0, 0.0],
    spans={"turn": Spans.from_lists([[(0, 2), (2, 3)], [(0, 2), (2, 3), (3, 5)]])},
    signals={"log_ratio": Signal(torch.tensor([[0.4, 0.4, 0.2, 0, 0], [-0.4, -0.4, 0.1, -0.4, -0.2]]), "token")},
)


@pytest.mark.parametrize(
    ("how", "gap", "per_token"),
    [
        ({}, 0.115, (0.05, 0.05)),  # sums .05 and -.065
        ({"beta": 0.1}, 0.23, (0.1, 0.1)),
        ({"mean_over": "turn"}, 0.025 + 0.065 / 3, (0.025, 0.05 / 3)),
    ],
)
def test_worked_pair(how, gap, per_token):
    """-ln sigmoid(gap); its slope in every ln pi of the better response is -sigmoid(-gap) times beta (over the turns)."""
    slopes, metrics = OnlinePRM(**how)._slopes(WORKED)
    assert metrics == {"prm/loss": pytest.approx(math.log1p(math.exp(-gap))), "prm/pairs": 1.0, "prm/ranked": 1.0}
    share = 1 / (1 + math.exp(gap))
    want = torch.tensor([[-share * per_token[0]] * 3 + [0.0] * 2, [share * per_token[1]] * 5])
    torch.testing.assert_close(slopes, want)


def test_success_and_margin_choose_the_pairs():
    for how, pairs in (({"success": 1.0}, 0), ({"success": 0.5}, 1), ({"margin": 1.0}, 0), ({"margin": 0.9}, 1)):
        assert OnlinePRM(**how)._slopes(WORKED)[1]["prm/pairs"] == pairs


def test_it_measures_what_the_model_log_ratio_measures(other_model, task, tiny_model):
    policy = CausalPolicy.load(tiny_model, precision="float32", temperature=0.7)
    rollouts = answers(policy, task)
    rollouts = rollouts.replace(ref_logprobs=rollouts.logprobs - 1)
    for against in ("logprobs", "ref_logprobs"):
        prm = attached(OnlinePRM(model=other_model, against=against), policy)
        want = attached(ModelLogRatio(other_model, against=against), policy).measure(rollouts)["log_ratio"].values
        torch.testing.assert_close(prm.measure(rollouts)["log_ratio"].values, want, equal_nan=True)
        assert set(prm.requires) == {"tokens", against} | ({"old_logprobs"} if against == "logprobs" else set())
    assert OnlinePRM(mean_over="turn").requires == ("tokens", "logprobs", "old_logprobs", "spans.turn")


def test_a_copy_of_the_acting_policy_ranks_nothing_and_its_loss_is_ln_2(policy, task):
    prm = attached(OnlinePRM(), policy)
    rollouts = answers(policy, task).with_signals()
    rollouts = rollouts.with_signals(**prm.measure(rollouts))
    assert rollouts.signals["log_ratio"].values[rollouts.action_mask].abs().max() < 1e-5
    metrics = prm.update(rollouts)
    assert metrics["prm/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["prm/pairs"] == 2 * 2 + 0 + 2 * 1


def test_the_gradient_is_that_of_the_loss_in_one_graph(other_model, policy, task):
    rollouts = answers(policy, task)
    prm = attached(OnlinePRM(model=other_model, grad_clip=1e9, micro_tokens=40), policy)
    logprobs = prm.second.outputs(rollouts, rollouts.action_mask).logprobs
    loss, _ = implicit_prm_loss(
        logprobs,
        rollouts.logprobs,
        rollouts.action_mask,
        rollouts.trajectory_ids,
        rollouts.trajectory_groups,
        rollouts.signals["outcome"].values,
    )
    want = torch.autograd.grad(loss, list(prm.trained.values()))
    before = weights(prm)
    prm._optimizer = torch.optim.SGD(prm.trained.values(), lr=1.0)
    metrics = prm.update(rollouts.with_signals(**prm.measure(rollouts)))
    assert metrics["prm/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["prm/grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in want]).norm().item(), rel=1e-4)
    for (name, p), g in zip(prm.trained.items(), want, strict=True):
        torch.testing.assert_close(before[name] - p.detach(), g, rtol=1e-3, atol=1e-6)


def test_updates_raise_the_better_responses(policy, task):
    prm = attached(OnlinePRM(lr=1e-3), policy)
    rollouts = answers(policy, task)
    losses = []
    for _ in range(20):
        rollouts = rollouts.with_signals(**prm.measure(rollouts))
        metrics = prm.update(rollouts)
        losses.append(metrics["prm/loss"])
    assert losses[-1] < 0.8 * losses[0]
    assert metrics["prm/ranked"] == 1.0


@pytest.mark.parametrize("outcomes", [[1.0] * 8, [float("nan")] * 8])
def test_without_a_pair_nothing_is_learnt(policy, task, outcomes):
    prm = attached(OnlinePRM(lr=1e-2), policy)
    rollouts = answers(policy, task)
    taught(prm, rollouts)  # AdamW has averages now
    before = weights(prm)
    rollouts = rollouts.with_signals(outcome=Signal(torch.tensor(outcomes), "trajectory"), **prm.measure(rollouts))
    assert prm.update(rollouts) == {"prm/loss": 0.0, "prm/pairs": 0.0, "prm/ranked": 0.0, "prm/grad_norm": 0.0}
    assert same(weights(prm), before)


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match=r"against must be 'logprobs' or 'ref_logprobs'; got 'values'"):
        OnlinePRM(against="values")
    with pytest.raises(ValueError, match=r"makes one update a step; got epochs=2 and parts=1"):
        OnlinePRM(epochs=2)
