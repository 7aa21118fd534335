"""Conversations: the exact layout of a row, what the learner makes of it, who waits for whom, and what goes wrong."""

import math
import time
from itertools import pairwise
from threading import Event, Lock
from types import SimpleNamespace

import pytest
import torch

from apportion.credit import gigpo
from apportion.record import Run
from apportion.tasks import BasicTask, Environment, Problem, Reply, calculator
from apportion.train import CausalPolicy, Request, Sampling, run
from apportion.train.sampler import Sampled
from apportion.train.turns import EnvironmentFailed, converse, demonstrated, supplied
from conftest import byte_tokenizer

RAW = Problem("raw", "3+4=?", "3+4=?\n", "7")
CHAT = Problem("chat", "3+4=?", [{"role": "user", "content": "3+4=?"}], "7")
LETTERS = [b for b in range(256) if b % 5 == 0]
"""Token ids that end a turn in tests with the random model: a fifth of all."""


class Counting(Environment):
    """Says "ok 1", "ok 2", ... and ends after so many turns; the reward of a turn is its number."""

    state = "begin"

    def __init__(self, problem, turns=3):
        self.turns, self.count, self.closed = turns, 0, 0

    def reply(self, text):
        self.count += 1
        self.state = f"after {self.count}"
        return Reply(f"ok {self.count}\n" if self.count < self.turns else None, reward=float(self.count))

    def close(self):
        self.closed += 1


def talk(policy, requests, environment=Counting, *, seed=0, **options):
    settings = {"max_turns": 8, "tool_seconds": 20.0, "statistics": (), "on_rows": None}
    settings |= {k: options.pop(k) for k in list(options) if k in settings}
    sampling = Sampling(**{"max_new_tokens": 10, **options})
    generator = torch.Generator().manual_seed(seed)
    return converse(policy, requests, sampling, environment=environment, generator=generator, **settings)


def scripted(policy, *scripts):
    """The policy writes these texts, one list for every row; "$" stands for the end token, "#" for a cut."""
    left = {}

    def ids(text):
        found = policy.tokenizer(text.rstrip("$#"), add_special_tokens=False)["input_ids"]
        return [*found, policy.end_ids[0]] if text.endswith("$") else list(found)

    def continued(begun, sizes, sampling, uniform, statistics, limits):
        live = [n for n in range(len(scripts)) if left.get(n, len(scripts[n])) > 0]
        for size in sizes:
            group = []
            for _ in range(size):
                n = live.pop(0)
                text = scripts[n][len(scripts[n]) - left.setdefault(n, len(scripts[n]))]
                left[n] -= 1
                tokens = ids(text)
                group.append(Sampled(tokens, [-1.0 - n] * len(tokens), text.endswith("#")))
            yield group

    policy.continued = continued
    return policy


# ---- rows -------------------------------------------------------------------------------------------------------------


def test_the_layout_of_a_raw_row(policy):
    asked = []

    class Noted(Counting):
        def reply(self, text):
            asked.append(text)
            return super().reply(text)

    rollouts = talk(scripted(policy, ["ab", "cd$", "e$"]), [Request(RAW, 1)], Noted)
    want = "3+4=?\n" + "ab" + "ok 1\n" + "cd<|im_end|>" + "ok 2\n" + "e<|im_end|>"
    (row,) = rollouts.tokens.tolist()
    assert row == policy.tokenizer(want)["input_ids"]
    own = [False] * 6 + [True] * 2 + [False] * 5 + [True] * 3 + [False] * 5 + [True] * 2
    assert rollouts.action_mask.tolist() == [own]
    assert rollouts.logprobs.tolist() == [[-1.0 if x else 0.0 for x in own]]
    turns = rollouts.spans["turn"]
    assert turns.to_lists(1) == [[(6, 8), (13, 16), (21, 23)]]
    assert turns.index.tolist() == [0, 1, 2]
    assert rollouts.signals["turn_reward"].values.tolist() == [1, 2, 3]
    assert rollouts.signals["environment"].values.tolist() == [6]
    assert rollouts.truncated.tolist() == [False]
    assert asked == ["ab", "cd", "e"]
    assert rollouts.meta["text"] == ["ab\ncd\ne"]
    assert rollouts.meta["transcript"] == [want[6:]]
    assert rollouts.meta["pieces"] == [[*"3+4=?\nabok 1\ncd", "<|im_end|>", *"ok 2\ne", "<|im_end|>"]]


def test_a_chat_row_is_what_the_template_makes_of_the_conversation(policy):
    (row,) = talk(scripted(policy, ["ab$", "cd$", "e$"]), [Request(CHAT, 1)]).tokens.tolist()
    said = [
        *CHAT.prompt,
        *({"role": r, "content": c} for r, c in zip(("assistant", "user"), ("ab", "ok 1\n"), strict=True)),
    ]
    said += [{"role": "assistant", "content": "cd"}, {"role": "user", "content": "ok 2\n"}]
    said += [{"role": "assistant", "content": "e"}]
    whole = policy.tokenizer.apply_chat_template(said, tokenize=False)
    assert policy.tokenizer.decode(row) + "\n" == whole


def test_where_a_stop_text_ended_the_turn_the_template_closes_it(policy):
    rollouts = talk(scripted(policy, ["ab", "e$"]), [Request(CHAT, 1)], lambda p: Counting(p, 2))
    assert rollouts.meta["transcript"] == [
        "ab<|im_end|>\n<|im_start|>user\nok 1\n<|im_end|>\n<|im_start|>assistant\ne<|im_end|>"
    ]
    assert int(rollouts.action_mask.sum()) == 4  # a, b, e and the end token of the policy


def test_the_role_of_a_reply(policy):
    text = policy.reply_ids(CHAT, [policy.end_ids[0]], Reply("84", role="tool"))
    assert policy.tokenizer.decode(text) == "\n<|im_start|>tool\n84<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_drops_the_assistant_is_refused(policy):
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out what the assistant said"):
        policy.reply_ids(CHAT, [1], Reply("84"))


def test_a_reply_is_tokenised_as_in_its_place_not_as_the_start_of_a_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(["▁", *"abcdefgh", "\n"])}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer("ab")["input_ids"][0] == 0  # this tokenizer writes a space before a text
    policy = SimpleNamespace(tokenizer=tokenizer, end_ids=[tokenizer.eos_token_id])
    for turn in ([1, tokenizer.eos_token_id], [1, 2]):
        assert CausalPolicy.reply_ids(policy, RAW, turn, Reply("ab")) == [1, 2]


def test_turns_that_were_cut_are_not_answered(policy):
    class Game(Counting):
        cut_reward = -1.0

    rollouts = talk(scripted(policy, ["ab", "cd#"], ["a#"]), [Request(RAW, 2)], Game)
    assert rollouts.truncated.tolist() == [True, True]
    assert rollouts.signals["turn_reward"].values.tolist() == [1, -1, -1]
    assert rollouts.meta["transcript"] == ["abok 1\ncd", "a"]
    unpaid = talk(scripted(policy, ["ab", "cd#"], ["a#"]), [Request(RAW, 2)]).signals
    assert unpaid["environment"].values.nan_to_num(-9).tolist() == [1, -9]


def test_after_the_last_turn_the_rollout_is_truncated_but_paid(policy):
    rollouts = talk(scripted(policy, ["a", "b", "c"], ["a", "b", "c"]), [Request(RAW, 2)], max_turns=2)
    assert rollouts.truncated.tolist() == [True, True]
    assert rollouts.signals["turn_reward"].values.tolist() == [1, 2, 1, 2]
    assert rollouts.meta["transcript"] == ["aok 1\nb"] * 2
    ended = talk(scripted(policy, ["a", "b"]), [Request(RAW, 1)], lambda p: Counting(p, 2), max_turns=2)
    assert ended.truncated.tolist() == [False]


def test_rows_that_end_drop_out_and_the_bar_hears_of_each(policy):
    length = iter([1, 3, 2])
    seen = []
    rollouts = talk(
        scripted(policy, ["a"], ["b", "c", "d"], ["e", "f"]),
        [Request(RAW, 1), Request(CHAT, 2)],
        lambda p: Counting(p, next(length)),
        on_rows=seen.append,
    )
    assert seen == [1, 1, 1]
    assert [len(x) for x in rollouts.spans["turn"].to_lists(3)] == [1, 3, 2]
    assert rollouts.group_ids.tolist() == [0, 1, 1]
    assert rollouts.meta["prompt_id"] == ["raw", "chat", "chat"]


def test_no_rollouts(policy):
    rollouts = talk(policy, [])
    assert (rollouts.batch, len(rollouts.spans["turn"])) == (0, 0)


def test_one_turn_of_one_rollout_that_the_limit_ends(policy):
    rollouts = talk(scripted(policy, ["ab"]), [Request(RAW, 1)], max_turns=1)
    assert rollouts.spans["turn"].to_lists(1) == [[(6, 8)]]
    assert rollouts.truncated.tolist() == [True]
    assert rollouts.signals["turn_reward"].values.tolist() == [1]
    assert rollouts.tokens.tolist() == [policy.tokenizer("3+4=?\nab")["input_ids"]]  # the answer is not read


def test_prompts_of_different_lengths_and_a_row_that_ends_at_once(policy):
    """Beside a long prompt and a short one a row has the same tokens, and their log-probabilities are the learner's."""
    policy.end_ids += LETTERS
    made = []
    for prompt in ("3+4=?\n" * 9, "3"):
        other = Problem("other", prompt, prompt, "7")
        turns = iter([1, 4, 4])
        made.append(talk(policy, [Request(RAW, 2), Request(other, 1)], lambda p, turns=turns: Counting(p, next(turns))))
        assert len(made[-1].spans["turn"].to_lists(3)[0]) == 1
        found = policy.outputs(made[-1], made[-1].action_mask).logprobs
        torch.testing.assert_close(found, made[-1].logprobs, rtol=1e-4, atol=1e-4)
    assert made[0].meta["transcript"][:2] == made[1].meta["transcript"][:2]


def test_an_environment_reads_what_was_written_letter_by_letter(policy):
    heard = []

    class Noted(Counting):
        def reply(self, text):
            heard.append(text)
            return super().reply(text)

    tidy = "a , b . do n't \0 \N{GRINNING FACE}"
    policy.tokenizer.clean_up_tokenization_spaces = True
    policy.tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    rollouts = talk(scripted(policy, [tidy, "c"]), [Request(RAW, 1)], lambda p: Noted(p, 2))
    assert heard == [tidy, "c"]
    assert rollouts.meta["text"] == [f"{tidy}\nc"]
    assert rollouts.meta["transcript"] == [f"{tidy}ok 1\nc"]


# ---- the random model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("problem", [RAW, CHAT], ids=["raw", "chat"])
def test_logprobs_are_those_the_learner_computes_over_the_whole_row(tiny_model, problem, temperature):
    policy = CausalPolicy.load(tiny_model, precision="float32", temperature=temperature)
    policy.end_ids += LETTERS
    requests = [Request(problem, 5), Request(RAW, 3)]
    rollouts = talk(policy, requests, temperature=temperature, statistics=("entropy",))
    counts = [len(x) for x in rollouts.spans["turn"].to_lists(8)]
    assert len(set(counts)) > 1
    found = policy.outputs(rollouts, rollouts.action_mask).logprobs
    torch.testing.assert_close(found, rollouts.logprobs, rtol=1e-4, atol=1e-4)
    entropy = rollouts.signals["entropy"].values
    assert torch.equal(entropy.isnan(), ~rollouts.action_mask)
    again = policy.statistics(rollouts, rollouts.action_mask, ("entropy",))[..., 0]
    torch.testing.assert_close(entropy, again, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_equal_seeds_give_equal_rollouts_and_the_first_turn_is_that_of_one_turn(policy):
    policy.end_ids += LETTERS
    requests = [Request(RAW, 4), Request(CHAT, 2)]
    a, b, c = (talk(policy, requests, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.logprobs, b.logprobs)
    assert a.meta["transcript"] != c.meta["transcript"]
    plain = policy.sample(requests, Sampling(max_new_tokens=10), generator=torch.Generator().manual_seed(0))
    once = talk(policy, requests, lambda p: Counting(p, 1))
    assert torch.equal(plain.tokens, once.tokens)
    assert torch.equal(plain.logprobs, once.logprobs)
    assert torch.equal(plain.truncated, once.truncated)
    assert plain.meta["text"] == once.meta["text"]


def test_a_rows_random_numbers_do_not_depend_on_when_others_end(policy):
    policy.end_ids += LETTERS
    lengths = iter([1, 1, 1, 3, 3, 3, 3, 3])
    short_neighbours = talk(policy, [Request(RAW, 4)], lambda p: Counting(p, next(lengths)))
    long_neighbours = talk(policy, [Request(RAW, 4)], lambda p: Counting(p, next(lengths)))
    assert short_neighbours.meta["transcript"][3] == long_neighbours.meta["transcript"][3]


def test_a_row_stops_at_the_end_of_the_context(policy):
    policy.end_ids += LETTERS
    policy.context = 30
    rollouts = talk(policy, [Request(RAW, 12)], lambda p: Counting(p, 99))
    assert int(rollouts.lengths.max()) <= 30
    assert rollouts.truncated.all()
    ends = rollouts.spans["turn"].to_lists(12)
    assert any(row[-1][1] == 30 for row in ends)  # a turn that the context cut
    assert all(row[-1][1] == n for row, n in zip(ends, rollouts.lengths.tolist(), strict=True))  # no reply dangles
    with pytest.raises(ValueError, match="problem raw needs 6 prompt tokens"):
        talk(policy, [Request(RAW, 1)], max_new_tokens=25)


def test_the_environments_stop_texts_end_turns(policy):
    class Strict(Counting):
        stop = tuple("etaoinshr 0123456789")

    rollouts = talk(policy, [Request(RAW, 12)], Strict, max_new_tokens=20)
    pieces = rollouts.meta["pieces"]
    turns = [(b, span) for b, row in enumerate(rollouts.spans["turn"].to_lists(12)) for span in row]
    stopped = [pieces[b][stop - 1] in Strict.stop for b, (_, stop) in turns]
    assert any(stopped)
    assert all(not set(pieces[b][start : stop - 1]) & set(Strict.stop) for b, (start, stop) in turns)


# ---- states and credit ------------------------------------------------------------------------------------------------


def test_gigpo_compares_turns_that_began_in_the_same_room(policy):
    class House(Environment):
        """Two rooms; "d" goes through the door, anything else stays; the way out of the garden is worth 1."""

        def __init__(self, problem):
            self.state = "hall"

        def reply(self, text):
            if text != "d":
                return Reply(f"You stay in the {self.state}.\n", reward=0.0)
            if self.state == "garden":
                return Reply(reward=1.0)
            self.state = "garden"
            return Reply("You are in the garden.\n", reward=0.0)

    rollouts = talk(scripted(policy, ["d", "d"], ["x", "d", "x", "x"]), [Request(RAW, 2)], House, max_turns=4)
    assert rollouts.spans["turn"].state.tolist() == [0, 1, 0, 0, 1, 1]
    assert rollouts.signals["environment"].values.tolist() == [1, 0]
    credit = gigpo(scale=None, gamma=1.0)(rollouts)
    first = [float(credit.advantages[b, a]) for b, row in enumerate(rollouts.spans["turn"].to_lists(2)) for a, _ in row]
    # totals 1 and 0: +-1/2. From the hall on: 1, 0, 0, mean 1/3. From the garden on: 1, 0, 0.
    assert first == pytest.approx([1 / 2 + 2 / 3] * 2 + [-1 / 2 - 1 / 3] * 4)


def test_what_a_tasks_rollouts_have_besides():
    problems = calculator(train=1, test=1).train

    def task(environment):
        return BasicTask("t", problems, [], lambda p, t: 0.0, environment=environment)

    assert supplied(task(None)) == set()
    assert supplied(calculator(train=1, test=1)) == {"spans.turn", "signals.turn_reward", "signals.environment"}
    assert "spans.turn.state" in supplied(task(Counting))


def test_a_game_without_a_verifier_is_trained_and_evaluated_by_what_it_pays(config, task):
    class Dice(Environment):
        """Pays for the length of each turn, and asks for two."""

        cut_reward = -1.0
        stop = tuple(map(chr, range(32, 80)))

        def __init__(self, problem):
            self.left = 2

        def reply(self, text):
            self.left -= 1
            return Reply("?" if self.left else None, reward=float(len(text)))

    class Game:
        name, train, test, environment = "dice", task.train, task.test, Dice

        def verify(self, problem, text):
            return math.nan

    folder = run(config(task=Game(), steps=1, max_new_tokens=8, eval_every=1))
    made = Run(folder).rollouts(1)
    paid = made.signals["environment"].values
    assert torch.equal(made.signals["outcome"].values, paid)
    assert not paid.isnan().any()
    assert paid.max() > 1 > 0 > paid.min()
    before, after = Run(folder).metrics("eval")
    assert before["unmeasured"] == after["unmeasured"] == 0
    assert len(set(before["correct"])) > 2


# ---- waiting ----------------------------------------------------------------------------------------------------------


def test_slow_answers_are_waited_for_together(policy):
    class Slow(Counting):
        def reply(self, text):
            time.sleep(0.2)
            return super().reply(text)

    start = time.perf_counter()
    talk(scripted(policy, *[["a", "b"]] * 12), [Request(RAW, 12)], lambda p: Slow(p, 2))
    assert 0.4 <= time.perf_counter() - start < 1.2  # one after the other it would be 4.8


def test_the_first_are_answered_while_others_still_write(policy):
    answered, lock = Event(), Lock()
    order = []

    class Noted(Counting):
        def reply(self, text):
            with lock:
                order.append(f"answered {text}")
            answered.set()
            return super().reply(text)

    def continued(begun, sizes, *_):
        yield [Sampled([65], [0.0], False)]
        assert answered.wait(10)
        order.append("second batch")
        yield [Sampled([66], [0.0], False)]

    policy.continued = continued
    talk(policy, [Request(RAW, 1), Request(CHAT, 1)], lambda p: Noted(p, 1))
    assert order[:2] == ["answered " + policy.tokenizer.decode([65]), "second batch"]


# ---- what goes wrong --------------------------------------------------------------------------------------------------


class Faulty(Counting):
    def __init__(self, problem, fault):
        super().__init__(problem)
        self.fault = fault

    def reply(self, text):
        if self.count == 1:
            return self.fault()
        return super().reply(text)


def hang():
    time.sleep(3)


def broken():
    raise KeyError("sword")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (broken, r"rollout 1 \(problem raw\), asked to answer turn 2, 'dd', raised KeyError: 'sword' \(.*\)\. Re"),
        (
            hang,
            r"rollout 1 \(problem raw\), asked to answer turn 2, 'dd', took longer than 0\.3 s\. .* raise tool_seconds",
        ),
        (lambda: "go on", r"turn 2, 'dd', raised TypeError: reply\(\) must give a Reply; got str"),
        (lambda: Reply(7), r"turn 2, 'dd', raised TypeError: the text of a Reply must be text or None; got int"),
        (lambda: Reply("a", reward=-math.inf), r"turn 2, 'dd', raised ValueError: the reward of a Reply"),
    ],
    ids=["raises", "hangs", "no-reply", "no-text", "infinite"],
)
def test_an_environment_that_fails_names_rollout_problem_and_turn(policy, fault, message):
    made = []

    def make(problem):
        made.append(Faulty(problem, fault) if len(made) == 1 else Counting(problem))
        return made[-1]

    with pytest.raises(EnvironmentFailed, match=message):
        talk(scripted(policy, ["a", "b", "c"], ["cc", "dd", "e"]), [Request(RAW, 2)], make, tool_seconds=0.3)
    time.sleep(0.1)
    assert [x.closed for x in made] == [1, 1]


def test_an_environment_that_cannot_be_made_or_closed(policy):
    def make(problem):
        raise OSError("no display")

    with pytest.raises(
        EnvironmentFailed, match=r"making the environment of rollout 0 \(problem raw\) raised OSError: no d"
    ):
        talk(policy, [Request(RAW, 2)], make)

    class Open(Counting):
        def close(self):
            raise OSError("still busy")

    with pytest.raises(EnvironmentFailed, match=r"closing the environment of rollout 0 .* OSError: still busy"):
        talk(scripted(policy, ["a"]), [Request(RAW, 1)], lambda p: Open(p, 1))

    class Nameless(Counting):
        state = ["a list"]  # noqa: RUF012

    with pytest.raises(EnvironmentFailed, match=r"making .* TypeError: unhashable type: 'list'"):
        talk(policy, [Request(RAW, 1)], Nameless)


# ---- the calculator ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums():
    return calculator(terms=3, digits=1, operators="+", train=40, test=8)


def test_worked_solutions_are_played_with_the_environment(policy, sums):
    problem = sums.train[0]
    a, b, c = problem.question.removesuffix("=?").split("+")
    rollouts = demonstrated(
        policy, [problem], environment=sums.environment, max_new_tokens=20, max_turns=8, tool_seconds=5.0
    )
    one, two = int(a) + int(b), int(problem.answer)
    assert rollouts.meta["transcript"] == [
        f"<tool>{a}+{b}</tool><result>{one}</result>\n<tool>{one}+{c}</tool><result>{two}</result>\n{two}<|im_end|>"
    ]
    written = [p for p, own in zip(rollouts.meta["pieces"][0], rollouts.action_mask[0], strict=True) if own]
    assert "".join(written) == f"<tool>{a}+{b}</tool><tool>{one}+{c}</tool>{two}<|im_end|>"
    assert sums.verify(problem, rollouts.meta["text"][0]) == 1


def test_worked_solutions_that_do_not_fit_are_refused(policy, sums):
    def play(problem, environment=sums.environment, **options):
        settings = {"max_new_tokens": 20, "max_turns": 8, "tool_seconds": 5.0, **options}
        return demonstrated(policy, [problem], environment=environment, **settings)

    with pytest.raises(ValueError, match=r"a turn of the worked solution .* tokens, but a turn may have 5"):
        play(sums.train[0], max_new_tokens=5)
    with pytest.raises(
        ValueError, match="does not end with the worked solution, which has 3 turns: it was over after 2"
    ):
        play(sums.train[0], max_turns=2)
    with pytest.raises(ValueError, match="which has 1 turns: it was over after 2, or wanted more"):
        play(Problem("p", "q", "q", "1", "1"), Counting)
    with pytest.raises(ValueError, match="problem raw has none"):
        play(RAW)


def test_a_tiny_model_learns_to_call(tiny_model, sums):
    """Supervised on the played solutions it calls the calculator, waits for the result and repeats it."""
    from apportion.train.warmup import warmup_step

    policy = CausalPolicy.load(tiny_model, precision="float32")
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    settings = {"environment": sums.environment, "max_turns": 8, "tool_seconds": 5.0}
    rows = demonstrated(policy, sums.train[:16], max_new_tokens=20, **settings)
    losses = [warmup_step(policy, parameters, optimizer, rows, grad_clip=1.0) for _ in range(40)]
    assert losses[-1] < 0.7 < losses[0]
    requests = [Request(p, 1) for p in sums.train[:8]]
    rollouts = converse(
        policy, requests, Sampling(max_new_tokens=20, temperature=0.0), generator=torch.Generator(), **settings
    )
    assert sum("<result>" in text and "error" not in text for text in rollouts.meta["transcript"]) >= 4
    assert not any("<result>" in text for text in rollouts.meta["text"])  # what the tool said is not the policy's


def test_turns_do_not_overlap_and_cover_the_actions(policy):
    policy.end_ids += LETTERS
    rollouts = talk(policy, [Request(RAW, 6)])
    for b, row in enumerate(rollouts.spans["turn"].to_lists(6)):
        assert all(stop < start for (_, stop), (start, _) in pairwise(row))
        covered = torch.zeros(rollouts.width, dtype=torch.bool)
        for start, stop in row:
            covered[start:stop] = True
        assert torch.equal(covered, rollouts.action_mask[b])


def test_the_tokenizer_of_these_tests_writes_one_token_a_byte():
    assert len(byte_tokenizer()("ok 1\n")["input_ids"]) == 5
