"""`apportion tasks TASK`: a look at one task."""

import json
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"


def test_a_task_shows_its_size_its_notes_and_its_first_problem(apportion, tmp_path):
    rows = [json.loads(line) for line in (DATA / "gsm8k_train.jsonl").read_text().splitlines()]
    near = rows[0] | {"question": rows[0]["question"].replace("Natalia", "Maria")}
    (tmp_path / "test.jsonl").write_text(json.dumps(near))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = f"from_data('{tmp_path}', prompt='question', answer='answer', system='Be brief.', name='mine')"
    told = json.loads(apportion("tasks", task, "--json").out)
    assert (told["name"], told["train"], told["test"]) == ("mine", 24, 1)
    assert told["notes"][0].startswith("1 of 24 train problems resemble a test problem")
    assert told["first"]["answer"] == "72"
    shown = apportion("tasks", task).out
    assert "mine: 24 problems to train on, 1 to test\n1 of 24 train problems resemble" in shown
    assert "\n[system] Be brief.\n[user] Natalia sold clips" in shown
    assert "\nanswer:\n72\n" in shown


def test_a_task_of_text_prompts(apportion):
    shown = apportion("tasks", "arithmetic(terms=3, train=2, test=1)").out
    assert shown.startswith("arithmetic: 2 problems to train on, 1 to test\n")
    assert "solution:\n" in shown
    assert json.loads(apportion("tasks", "arithmetic(terms=3, train=0, test=1)", "--json").out)["train"] == 0
    assert "Did you mean 'arithmetic'" in apportion("tasks", "arithmatic").err


def test_what_stands_in_the_data_cannot_steer_the_terminal(apportion, tmp_path):
    rows = [{"prompt": f"\x1b[2J{n}?\nSay it.", "answer": n} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = apportion("tasks", f"from_data('{tmp_path}/rows.jsonl')").out
    assert "\x1b" not in shown
    assert r"[user] \x1b[2J0?" in shown
    assert "\nSay it." in shown
