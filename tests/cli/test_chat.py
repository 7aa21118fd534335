"""`apportion chat`: asking what was trained, in a real process where the terminal matters."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from apportion.credit import grpo
from apportion.record import Run
from apportion.tasks import arithmetic
from apportion.train import Config, run
from conftest import byte_tokenizer

HOSTILE = "\x1b[2J"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
CHAT = [sys.executable, "-m", "apportion.cli.main", "chat"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A run of two steps of LoRA, with best, model, adapter and checkpoint."""
    return run(
        Config(
            model=tiny_model,
            task=arithmetic(terms=2, train=32, test=8),
            credit=grpo(),
            out=str(tmp_path_factory.mktemp("chat") / "run"),
            steps=2,
            prompts_per_step=2,
            group_size=2,
            max_new_tokens=8,
            eval_size=4,
            warmup=1,
            lora_rank=2,
            keep_best=True,
            precision="float32",
            progress=False,
        )
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    """A model that writes ESC [ 2 J again and again: its states say which of these came last, its output what follows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("hostile"), byte_tokenizer()
    tokenizer.chat_template = None
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, eos_token_id=256, **shape)
    )
    letters = tokenizer(HOSTILE)["input_ids"]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 4] = 1.0
        for place, letter in enumerate(letters):
            model.model.embed_tokens.weight[letter] = torch.eye(8)[place]
            model.lm_head.weight[letters[(place + 1) % 4], place] = 1.0
        model.lm_head.weight[letters[0], 4] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def told(apportion, *argv: object) -> dict:
    answer = apportion("chat", *argv, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


# ---- in a process of its own ------------------------------------------------------------------------------------------


def test_one_question_to_a_run_is_asked_as_in_training(trained):
    done = subprocess.run(
        [*CHAT, str(trained), "--prompt", "3+4=?", "--temperature", "0"],
        capture_output=True,
        env=ENVIRONMENT,
        check=True,
    )
    assert done.stderr.decode() == (
        f"{trained}/best: each question by itself, in the form of the task's prompts; temperature 0, at most 8 tokens.\n"
    )
    assert len(done.stdout.decode()) > 1


def test_questions_from_a_pipe_give_a_line_of_json_each(trained):
    done = subprocess.run(
        [*CHAT, str(trained), "--json"],
        input=b"3+4=?\n\n\xff\n5+1=?\n",
        capture_output=True,
        env=ENVIRONMENT,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["prompt"] for a in answers] == ["3+4=?\n", "5+1=?\n"]
    assert done.stderr == b"apportion: this question is not UTF-8. Write another.\n"


def test_on_a_terminal_answers_are_escaped_and_ctrl_d_ends(hostile):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*CHAT, hostile, "--max-new-tokens", "8", "--temperature", "0"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**ENVIRONMENT, "TERM": "dumb"},
    )
    os.close(theirs)
    screen = read_until(ours, "> ")
    assert "text is continued as it stands" in screen
    os.write(ours, b"hello\n")
    screen = read_until(ours, "> ")
    assert r"\x1b[2J\x1b[2J" in screen
    assert HOSTILE not in screen
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(ours)


def read_until(terminal: int, end: str) -> str:
    """What the terminal shows until it ends so."""
    text, limit = "", time.monotonic() + 120
    while not text.endswith(end):
        assert time.monotonic() < limit, text
        if select.select([terminal], [], [], 1.0)[0]:
            text += os.read(terminal, 4096).decode()
    return text


# ---- which weights ----------------------------------------------------------------------------------------------------


def test_every_kind_of_weights_answers_and_says_which(trained, apportion, tiny_model):
    from apportion.tasks import Problem
    from apportion.train import CausalPolicy
    from apportion.train.policy import Request
    from apportion.train.sampler import Sampling

    policy = CausalPolicy.load(str(trained / "adapter"), precision="float32")
    request = Request(Problem(id="p", question="3+4=?", prompt="3+4=?\n", answer="7"), 1)
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    expected = policy.sample([request], sampling, generator=torch.Generator()).meta["text"][0]
    for kind in ("model", "checkpoint"):
        answer = told(apportion, trained, "--prompt", "3+4=?", "--temperature", "0", "--weights", kind)
        assert answer["response"] == expected
        assert answer["weights"].startswith(f"{trained}/{kind}")
        assert answer["form"] == "task"
    assert told(apportion, trained, "--prompt", "3+4=?")["weights"] == f"{trained}/best"
    assert told(apportion, trained / "adapter", "--prompt", "x", "--max-new-tokens", "2")["form"] == "chat"


def test_a_run_that_has_only_a_checkpoint_is_asked_from_it(trained, apportion, tmp_path):
    for name in ("run.json", "metrics.jsonl", "rollouts", "checkpoints"):
        (tmp_path / name).symlink_to(trained / name)
    answer = told(apportion, tmp_path, "--prompt", "3+4=?")
    assert re.fullmatch(r".*/checkpoints/done-000003.pt", answer["weights"])
    (tmp_path / "checkpoints").unlink()
    refused = apportion("chat", tmp_path, "--prompt", "3+4=?")
    assert (refused.code, refused.out) == (2, "")
    assert "has neither best, nor model, nor a checkpoint (yet)" in refused.err


# ---- how it is asked --------------------------------------------------------------------------------------------------


def test_the_form_is_that_of_the_task_of_the_template_or_none(trained, apportion, tiny_model, hostile):
    few = ("--prompt", "3+4=?", "--max-new-tokens", "2")
    as_chat = "<|im_start|>user\n3+4=?<|im_end|>\n<|im_start|>assistant\n"
    cases = [
        ((trained,), "task", "3+4=?\n"),
        ((trained, "--form", "chat"), "chat", as_chat),
        ((trained, "--form", "raw"), "raw", "3+4=?"),
        ((tiny_model,), "chat", as_chat),
        ((tiny_model, "--task", "arithmetic(terms=2, train=8, test=2)"), "task", "3+4=?\n"),
        ((hostile,), "raw", "3+4=?"),
    ]
    for argv, form, prompt in cases:
        answer = told(apportion, *argv, *few)
        assert (answer["form"], answer["prompt"]) == (form, prompt)


def test_a_task_of_messages_is_asked_in_its_template_and_instruction(trained, apportion, tmp_path):
    """The form is read off the recorded tokens, so nothing of the task is imported."""
    from apportion import Rollouts
    from apportion.record import RunWriter

    config = Run(trained).info["config"]
    writer = RunWriter.create(tmp_path / "run", {"credit": "grpo()", "config": {**config, "stop": ["!"]}, "seed": 0})
    pieces = [["<user>", "How much is ", q, "? Think.", "<model>", "7"] for q in ("3+4", "1+6")]
    meta = {"pieces": pieces, "question": ["3+4", "1+6"], "prompt_id": ["a", "b"]}
    mask = [[False] * 5 + [True]] * 2
    writer.append(1, Rollouts.from_lists([[1] * 6] * 2, [0, 1], outcome=[1.0, 0.0], action_mask=mask, meta=meta))
    (tmp_path / "run" / "model").symlink_to(trained / "model")
    answer = told(apportion, tmp_path / "run", "--prompt", "2+2")
    assert answer["prompt"] == "<user>How much is 2+2? Think.<model>"


def test_a_conversation_remembers_and_forgets_the_oldest_when_the_context_is_full(apportion, tiny_model, monkeypatch):
    lines = iter(["one", "two", "x" * 60])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    told = apportion("chat", tiny_model, "--max-new-tokens", "2", "--json")
    prompts = [json.loads(line)["prompt"] for line in told.out.splitlines()]
    assert "one" in prompts[1]
    assert "two" in prompts[1]
    assert "one" not in prompts[2]  # the context has 128 tokens, a byte each
    assert "x" * 60 in prompts[2]


def test_the_answer_follows_temperature_top_p_seed_and_limit(apportion, tiny_model):
    def answer(*options: object) -> dict:
        return told(apportion, tiny_model, "--prompt", "hello", "--max-new-tokens", "12", *options)

    greedy = answer("--temperature", "0")["response"]
    assert answer("--temperature", "0", "--seed", "1")["response"] == greedy
    assert answer("--top-p", "1e-6", "--seed", "2")["response"] == greedy
    assert answer("--temperature", "1e-4")["response"] == greedy
    assert answer("--seed", "3") == answer("--seed", "3") != answer("--seed", "4")
    assert answer()["truncated"]
    assert answer()["tokens"] == 12


def test_a_stop_text_of_the_run_ends_an_answer(trained, apportion, tmp_path, hostile):
    from apportion import Rollouts
    from apportion.record import RunWriter

    config = {**Run(trained).info["config"], "stop": ["J"], "max_new_tokens": 20}
    writer = RunWriter.create(tmp_path / "run", {"credit": "grpo()", "config": config, "seed": 0})
    meta = {"pieces": [["q", "a"]], "question": ["q"]}
    writer.append(1, Rollouts.from_lists([[1, 2]], [0], outcome=[1.0], action_mask=[[False, True]], meta=meta))
    (tmp_path / "run" / "model").symlink_to(hostile)
    answer = told(apportion, tmp_path / "run", "--prompt", "q", "--temperature", "0")
    assert (answer["response"], answer["truncated"]) == (HOSTILE, False)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["{model}", "--prompt", "x", "--form", "task"], "--form task: nothing tells the form of the prompts"),
        (["{model}", "--prompt", "x", "--weights", "best"], "--weights best belongs to a run, but"),
        (["{hostile}", "--prompt", "x", "--form", "chat"], "--form chat: the tokenizer has no chat template."),
        (["{model}", "--prompt", "x", "--temperature", "-1"], "--temperature must be at least 0; got -1. 0 is greedy."),
        (["{model}", "--prompt", "x", "--top-p", "0"], "--top-p is a probability above 0 and at most 1; got 0."),
        (["{model}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1; got 0."),
        (["{model}", "--prompt", "x" * 200], "this prompt has 219 tokens, but the model reads 1 to 127."),
        (["/nowhere", "--prompt", "x"], "model '/nowhere' is neither a folder, nor a hub name"),
    ],
)
def test_a_mistake_is_one_line(apportion, tiny_model, hostile, argv, line):
    refused = apportion("chat", *(x.format(model=tiny_model, hostile=hostile) for x in argv))
    assert (refused.code, refused.out) == (2, "")
    assert f"apportion: {line}" in refused.err
    assert "Traceback" not in refused.err
