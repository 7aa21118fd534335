"""The model card says what the run did, and nothing in the run can break it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from apportion import Rollouts
from apportion.record import RunWriter
from apportion.train import run
from apportion.train.card import model_card, write_card
from apportion.train.prompting import Form, form_of

HOSTILE = "---\nlicense: mit\n---\n# `mine` ``two`` | cell | <script>alert(1)</script>\u202e\x1b[31m ```"


def header(text: str) -> dict:
    """As the hub reads it; refuses what is not YAML."""
    return ModelCard(text).data.to_dict()


def made(folder: Path, model: str, lines: list[dict], **config: object) -> Path:
    """A run with these options and metrics."""
    known = {"model": model, "task": "arithmetic()", "precision": "float32", "threads": 1, "max_new_tokens": 32}
    info = {"credit": "grpo()", "config": {**known, **config}, "seed": 3, "command": "apportion train --x"}
    writer = RunWriter.create(folder, info)
    for line in lines:
        writer.metrics(**line)
    (folder / "model").mkdir()
    return folder


def evaluation(step: int, correct: list[float], **more: object) -> dict:
    accuracy = sum(correct) / len(correct)
    return {
        "step": step,
        "kind": "eval",
        "tokens": 1000 * step,
        "accuracy": accuracy,
        "n": len(correct),
        "correct": correct,
        **more,
    }


def test_a_run_writes_a_card_with_its_own_numbers(config, digits):
    folder = run(config(task=digits, save_model=True, lora_rank=2, keep_best=True, lr=0.123))
    text = (folder / "model" / "README.md").read_text()
    assert header(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["apportion", "reinforcement-learning"],
    }
    evaluations = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines() if '"eval"' in x]
    for m in evaluations:
        low, high = m["intervals"]["accuracy"]
        assert f"| {m['step']} | {m['tokens']:,} | {m['accuracy']:.3f} [{low:.3f}, {high:.3f}] |" in text
    assert "| `lr` | `0.123` |" in text
    assert "| `lora_rank` | `2` |" in text
    assert "`grad_clip`" not in text  # at its default
    assert "trained by reinforcement learning on `digit`" in text
    assert "torch " in text
    write_card(folder, folder / "adapter")
    adapter = (folder / "adapter" / "README.md").read_text()
    assert header(adapter)["library_name"] == "peft"
    assert "lora" in header(adapter)["tags"]


def test_the_example_on_the_card_runs(config, digits, capsys, monkeypatch):
    folder = run(
        config(task=digits, save_model=True, steps=1, max_new_tokens=5, min_new_tokens=2, top_p=0.5, stop=("zz",))
    )
    text = (folder / "model" / "README.md").read_text()
    monkeypatch.chdir(folder / "model")
    code = text.partition("```python\n")[2].partition("\n```")[0]
    assert "=?\\n'" in code  # a prompt of the task
    sampled = "max_new_tokens=5, do_sample=True, temperature=1.0, top_k=0, top_p=0.5, min_new_tokens=2"
    assert f"generate(**ids, {sampled}, stop_strings=['zz'], tokenizer=tokenizer)" in code
    exec(code, {})
    assert capsys.readouterr().out


def test_the_numbers_of_the_card_are_worked_by_hand(tmp_path):
    lines = [
        {"step": 1, "kind": "warmup", "loss": 1.0},
        *(
            {"step": s, "kind": "train", "tokens": 100 * s, "reward": s / 10, "seconds_sample": 6.0}
            for s in range(1, 11)
        ),
        evaluation(0, [0.0] * 10),
        evaluation(10, [1.0] * 5 + [0.0] * 5, greedy=0.25),
    ]
    text = model_card(made(tmp_path / "run", "/gone", lines), tmp_path / "run" / "model")
    # Five of ten problems turned right. A mean of ten draws of which half are 1 lies within 0.5 -+ 0.3 95 times in 100:
    # the binomial of 10 and 1/2 has P(X <= 1) = 0.011 and P(X <= 2) = 0.055, so its 2.5 % point is 2 of 10.
    assert "changed by +0.500 [+0.200, +0.800], paired by problem" in text
    assert "| 10 | 10,000 | 0.500 | 0.250 |" in text
    assert "mean reward of the first 5 steps 0.300, of the last 5 0.800" in text
    assert "10 steps, 1,000 sampled tokens, 1.0 minutes" in text
    assert "1 supervised step on worked solutions before" in text


def test_many_evaluations_are_thinned_and_the_best_is_named(tmp_path):
    lines = [evaluation(s, [float(s == 7), 0.0]) for s in range(40)]
    folder = made(tmp_path / "run", "/gone", lines)
    (folder / "best").mkdir()
    text = model_card(folder, folder / "best")
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert (len(rows), rows[0][:4], rows[-1][:5]) == (12, "| 0 ", "| 39 ")
    assert "These weights are those of step 7, the best of 40 evaluations" in text
    assert "These weights are those of the last step." in model_card(folder, folder / "model")


def test_a_run_without_evaluations_or_steps_has_a_card(tmp_path):
    text = model_card(made(tmp_path / "run", "/gone", []), tmp_path / "run" / "model")
    assert "The run was not evaluated." in text
    assert "no policy update" in text
    lines = [evaluation(0, [1.0, 0.0]), evaluation(2, [1.0, 0.0])]  # an interval of no width would promise too much
    text = model_card(made(tmp_path / "flat", "/gone", lines), tmp_path / "flat" / "model")
    assert "From step 0 to step 2 the accuracy of no problem changed." in text


@pytest.mark.parametrize(
    ("model", "readme", "base", "licence"),
    [
        ("smollm2-135m-instruct", None, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("{folder}", "---\nlicense: mit\nbase_model: some/one\n---\n# x\n", "some/one", "mit"),
        ("{folder}", "---\nbase_model: /a/path\n---\n", None, None),
        ("{folder}", "---\nlicense: [\n---\n", None, None),
        ("{folder}", "no header", None, None),
        ("{folder}", None, None, None),
        ("/gone/since", None, None, None),
    ],
)
def test_base_and_licence_are_what_can_be_known(tmp_path, model, readme, base, licence):
    place = tmp_path / "base"
    place.mkdir()
    (place / "config.json").write_text("{}")
    if readme is not None:
        (place / "README.md").write_text(readme)
    folder = made(tmp_path / "run", model.format(folder=place), [])
    text = model_card(folder, folder / "model")
    told = header(text)
    assert (told.get("base_model"), told.get("license")) == (base, licence)
    assert told.get("base_model_relation") == (base and "finetune")
    assert (f"That of the base model: `{licence}`." if licence else "Not known") in text


def test_a_base_on_the_hub_is_named(tmp_path, monkeypatch):
    from apportion.train import card

    readme = tmp_path / "cached.md"
    readme.write_text("---\nlicense: llama3\n---\n")
    monkeypatch.setattr(card, "base_and_adapter", lambda model: (model, None))
    monkeypatch.setattr(card, "file_of", lambda place, name: readme)
    folder = made(tmp_path / "run", "owner/name", [])
    told = header(model_card(folder, folder / "model"))
    assert (told["base_model"], told["license"]) == ("owner/name", "llama3")


def test_hostile_text_breaks_neither_header_nor_page(tmp_path):
    rollouts = Rollouts.from_lists(
        [[1, 2]],
        [0],
        outcome=[1.0],
        action_mask=[[False, True]],
        meta={"pieces": [[HOSTILE, "a"]], "question": [HOSTILE]},
    )
    folder = made(tmp_path / "run`x", HOSTILE, [evaluation(0, [1.0])], task=HOSTILE, stop=[HOSTILE], judge=HOSTILE)
    writer = RunWriter.resume(folder)
    writer.append(1, rollouts)
    writer.metrics(1, "stop", reason=HOSTILE)
    text = model_card(folder, folder / "model")
    told = header(text)
    assert "license" not in told
    assert told["tags"] == ["apportion", "reinforcement-learning"]
    assert "\x1b" not in text
    assert "\u202e" not in text
    lines = text.splitlines()
    assert lines.count("---") == 2  # those of the header
    assert sum(line.startswith("```") for line in lines) == 2  # the example's
    assert [line for line in lines if line.startswith("#")] == [
        "# ``run`x``",
        *(f"## {name}" for name in ("Evaluation", "Training", "Options", "Machine and versions", "Licence")),
    ]
    for line in lines:
        if line.startswith("| "):  # every row has as many cells as its head
            assert line.replace(r"\|", "").count("|") in (3, 4)
    for line in lines:
        if "<script>" in line and not line.startswith(("prompt = ", "out = ")):
            assert outside_code(line.replace(r"\|", "")).count("<") == 0


def outside_code(line: str) -> str:
    """What is left of a line without its code spans: as CommonMark has it, a run of backticks ends at one as long."""
    out, i = "", 0
    while i < len(line):
        if line[i] != "`":
            out, i = out + line[i], i + 1
            continue
        fence = line[i : i + len(line[i:]) - len(line[i:].lstrip("`"))]
        j = i + len(fence)
        while j < len(line):
            run_of = len(line[j:]) - len(line[j:].lstrip("`"))
            if run_of == len(fence):
                break
            j += max(run_of, 1)
        i = j + len(fence)
    return out


def test_a_form_is_what_all_prompts_share():
    assert form_of([("a 1 b", "1"), ("a 2 b", "2")]) == Form("a ", " b")
    assert form_of([("1, 1?", "1")]) == Form("1, ", "?")  # the last, where a question is there twice
    assert form_of([("a 1 b", "1"), ("c 2 b", "2")]) is None
    assert form_of([("a", "1")]) is None
    assert form_of([]) is None
