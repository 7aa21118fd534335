"""Tasks from the user's own data: reading, columns, prompts, verifiers, filters, splits."""

import csv
import json
import math
import random
from pathlib import Path

import pytest

from apportion.tasks import from_data, gsm8k, resolve_task, word_problems
from conftest import byte_tokenizer

DATA = Path(__file__).parent.parent / "data"
TRAIN, TEST = str(DATA / "gsm8k_train.jsonl"), str(DATA / "gsm8k_test.jsonl")
GSM8K = {"prompt": "question", "answer": "answer"}
ROWS = [
    {"q": f"What is {a} times {b}?", "a": a * b, "kind": "even" if a % 2 == 0 else "odd"}
    for a, b in [(n, n + 3) for n in range(2, 42)]
]
QUIET = {"prompt": "q", "answer": "a", "near_duplicates": "ignore"}


def questions(problems):
    return [p.question for p in problems]


def everything(task):
    return {p.question: p for p in [*task.train, *task.test]}


def one(row, **settings):
    """The task whose only training problem is in the row, and that problem."""
    task = from_data({"train": [row], "test": [{**row, "q": "Is this another question?"}]}, **(QUIET | settings))
    return task, task.train[0]


# ---- where rows come from -----------------------------------------------------------------------------------------------


def write(rows, folder, ending):
    file = folder / f"rows.{ending}"
    if ending == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif ending == "json":
        file.write_text(json.dumps(rows, indent=1))
    elif ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(file)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path, ending):
    task = from_data(write(ROWS, tmp_path, ending), **QUIET)
    memory = from_data(ROWS, **QUIET)
    assert list(map(str, task.train)) == list(map(str, memory.train))
    assert questions(task.test) == questions(memory.test)
    assert everything(task)["What is 2 times 5?"].answer == "10"
    assert everything(task)["What is 2 times 5?"].data == {"kind": "even"}


def test_a_csv_cell_stays_text_and_may_have_several_lines(tmp_path):
    (tmp_path / "x.csv").write_text('\ufeffq,a,code\n"How\nmany, then?",3,007\n', encoding="utf-8")
    task = from_data(str(tmp_path / "x.csv"), ROWS, **QUIET)
    assert questions(task.train) == ["How\nmany, then?"]
    assert task.train[0].data == {"code": "007"}


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert len(everything(from_data(str(tmp_path / "x.json"), **QUIET))) == len(ROWS)


def test_a_folder_with_named_splits_and_their_parts(tmp_path):
    for name, rows in (
        ("train-00000-of-00002", ROWS[:10]),
        ("train-00001-of-00002", ROWS[10:20]),
        ("validation", ROWS[20:]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "README.md").write_text("not data")
    task = from_data(str(tmp_path), **QUIET)
    assert (len(task.train), len(task.test)) == (20, 20)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "the test comes before the validation", "a": 1}))
    assert questions(from_data(str(tmp_path), **QUIET).test) == ["the test comes before the validation"]
    assert len(from_data(str(tmp_path), "validation", **QUIET).test) == 20


@pytest.mark.parametrize("divided", [True, False])
def test_data_sets_of_the_package_in_memory_and_on_disk(tmp_path, divided):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    if divided:
        data = DatasetDict(train=Dataset.from_list(ROWS[:30]), test=Dataset.from_list(ROWS[30:]))
    data.save_to_disk(str(tmp_path / "saved"))
    for source in (data, str(tmp_path / "saved")):
        task = from_data(source, **QUIET)
        assert len(everything(task)) == 40
        assert not divided or questions(task.test) == [row["q"] for row in ROWS[30:]]


def test_splits_by_name():
    splits = {"train_sft": ROWS[:10], "test_sft": ROWS[10:15], "extra": ROWS[15:]}
    task = from_data(splits, "test_sft", split="train_sft", **QUIET)
    assert (len(task.train), len(task.test)) == (10, 5)
    assert len(from_data(splits, "extra", **QUIET).train) == 15  # everything else
    with pytest.raises(ValueError, match=r"the dict has no split 'train'\. Did you mean 'train_sft'"):
        from_data(splits, split="train", **QUIET)
    with pytest.raises(ValueError, match="train and test of data share 10 questions"):
        from_data(splits, "train_sft", split="train_sft", **QUIET)


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    import datasets

    def unreachable(path, config):
        raise ConnectionError(f"no network for {path} {config}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match="could not load owner/data from the hub: ConnectionError: no network for owner/data main"
    ):
        from_data("owner/data", config="main", **QUIET)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config: {"train": ROWS[:30], "test": ROWS[30:]})
    assert len(from_data("owner/data", **QUIET).test) == 10


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.jsonl", '{"q": "a?", "a": 1}\n{"q": "b?" "a"}', r"x\.jsonl line 2 is not JSON"),
        (
            "x.jsonl",
            '{"q": "a?", "a": 1}\n\n"text"',
            r"x\.jsonl line 3 needs an object with a value per column; got str",
        ),
        ("x.jsonl", "[" * 100_000, r"x\.jsonl line 1 is not JSON"),
        ("x.json", '[{"q": "a?"}, 7]', r"x\.json\[1\] needs an object with a value per column; got int"),
        ("x.json", '[{"q": "a?"}', r"x\.json is not JSON"),
        ("x.csv", "q,a\nb?,2\na?,1,9\n", r"x\.csv line 3 is not CSV: there are 3 values for 2 columns"),
        ("x.csv", "q,a\na?\n", r"x\.csv line 2 is not CSV: there are 1 values for 2 columns"),
        ("x.csv", 'q,a\n"a?,1\n', r"x\.csv line \d is not CSV: unexpected end of data"),
        ("x.csv", "q,q\na?,1\n", r"x\.csv line 1 is not CSV: two columns have one name in q, q"),
        ("x.csv", b"q,a\n\xff,1\n", r"x\.csv line 1 is not CSV: .* can't decode"),
        ("x.parquet", b"PAR1 no", r"x\.parquet is not a Parquet file that can be read"),
        ("x.txt", "q", r"cannot read .*x\.txt: its name must end in \.jsonl, \.json, \.parquet, \.csv"),
        ("x.jsonl", "", r"data has 0 problems for train and 0 for test"),
        (
            "x.jsonl",
            '{"q": "a?", "a": 1}\n{"q": "b?"}',
            r"x\.jsonl line 2 has no value in column 'a'\. Give one, or leave",
        ),
        ("x.jsonl", '{"q": "a?", "a": null}', r"x\.jsonl line 1 has no value in column 'a'"),
        ("x.jsonl", '{"q": " ", "a": 1}', r"x\.jsonl line 1 column 'q' needs text or a list of chat messages; got ' '"),
        ("x.jsonl", '{"q": "a \\ud800?", "a": 1}', r"x\.jsonl line 1 holds text that is not Unicode"),
        ("x.jsonl", '{"q": 5, "a": 1}', r"line 1 column 'q' needs text or a list of chat messages; got 5"),
        ("x.jsonl", '{"q": "a?", "a": "none"}', r"x\.jsonl line 1 needs a number as its answer; got 'none'"),
        ("x.jsonl", '{"q": "a?", "a": true}', r"line 1 needs a number as its answer; got True"),
        ("x.jsonl", '{"q": "a?", "a": NaN}', r"line 1 needs a number as its answer; got nan"),
    ],
)
def test_broken_rows_name_file_and_line(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=text):
        from_data(str(tmp_path / name), **QUIET)


def test_rows_in_memory_that_are_none():
    with pytest.raises(ValueError, match=r"rows\[1\] needs a mapping with a value per column; got str"):
        from_data([ROWS[0], "text"], **QUIET)


# ---- columns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"prompt": "questoin"},
            r"gsm8k_train\.jsonl has no column 'questoin' for prompt\. Did you mean 'question'\? Its columns: question, answer\.",
        ),
        ({"answer": "zzz"}, r"has no column 'zzz' for answer\. Its columns: question, answer\."),
        ({"solution": "solutions"}, "has no column 'solutions' for solution"),
        (
            {"template": "{question} {hint}"},
            r"has no column 'hint' for template\. .* Braces that are no place are written \{\{ and \}\}",
        ),
        ({"template": "Answer it."}, r"template needs a place such as \{question\}, or every prompt is the same"),
    ],
)
def test_a_column_that_is_not_there(settings, text):
    with pytest.raises(ValueError, match=text):
        from_data(TRAIN, TEST, **(GSM8K | settings))


def test_the_columns_are_listed_though_no_row_is_kept():
    with pytest.raises(ValueError, match="has no column 'x' for prompt"):
        from_data(TRAIN, TEST, prompt="x", keep=lambda row: False)


def test_a_column_within_a_column():
    row = {"q": "How many?", "reward_model": {"ground_truth": "12", "style": "rule"}, "extra.kind": "x"}
    _, p = one(row, answer="reward_model.ground_truth", template="{q} ({extra.kind})")
    assert p.answer == "12"
    assert p.prompt[0]["content"] == "How many? (x)"
    assert set(p.data) == {"reward_model", "extra.kind"}


def test_gsm8k_by_its_columns_is_gsm8k():
    task = from_data(TRAIN, TEST, **GSM8K, solution="answer", name="gsm8k")
    same = gsm8k(TRAIN, TEST)
    for p, other in zip([*task.train, *task.test], [*same.train, *same.test], strict=True):
        assert (p.id, p.question, p.answer) == (other.id, other.question, other.answer)
        assert task.verify(p, p.solution) == task.verify(p, p.answer) == 1
        assert task.verify(p, "") == 0
    assert task.notes == ()


# ---- prompts ------------------------------------------------------------------------------------------------------------


def test_text_as_a_chat_message_or_as_it_is():
    assert one({"q": "How many? ", "a": 3})[1].prompt == [{"role": "user", "content": "How many? "}]
    p = one({"q": "How many? ", "a": 3}, chat=False, template="Q: {q}\nA: ")[1]
    assert p.prompt == "Q: How many? \nA: "
    assert p.question == "How many?"


def test_a_system_message():
    system = {"role": "system", "content": "Be brief."}
    assert one({"q": "How many?", "a": 3}, system="Be brief.")[1].prompt == [
        system,
        {"role": "user", "content": "How many?"},
    ]
    talk = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "How many?"}]
    assert one({"q": talk, "a": 3}, system="Be brief.")[1].prompt == [system, talk[1]]
    assert one({"q": talk, "a": 3})[1].prompt == talk


def test_messages_keep_their_order_and_the_template_is_put_around_the_last():
    talk = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "2+2?"},
    ]
    p = one({"q": talk, "a": 4, "hint": "even"}, template="{q} It is {hint}.")[1]
    assert p.prompt == [*talk[:2], {"role": "user", "content": "2+2? It is even."}]
    assert p.question == "Hello.\nHi.\n2+2?\neven"
    assert one({"q": talk, "a": 4})[1].question == "Hello.\nHi.\n2+2?"


def test_braces_and_lists_in_a_template():
    row = {"q": "Which city?", "choices": ["Rome", "Oslo"], "a": 1}
    p = one(row, verify="choice", template="{q}\n{choices}\nPut it in \\boxed{} or {{choices}}.")[1]
    assert p.prompt[0]["content"] == "Which city?\nA. Rome\nB. Oslo\nPut it in \\boxed{} or {choices}."
    assert p.question == "Which city?\nA. Rome\nB. Oslo"  # the instruction does not stand in it
    labelled = row | {"choices": {"label": ["1", "2"], "text": ["Rome", "Oslo"]}}
    p = one(labelled, verify="choice", template="{q}\n{choices}")[1]
    assert p.prompt[0]["content"] == "Which city?\n1. Rome\n2. Oslo"


@pytest.mark.parametrize(
    ("prompt", "settings", "text"),
    [
        ([{"role": "user", "content": "a?"}], {"chat": False}, "column 'q' holds chat messages, but chat=False"),
        (
            [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "3"}],
            {},
            "must end with what the policy answers",
        ),
        ([{"role": "user", "content": ["a"]}], {}, "needs messages with role and content as text"),
        (["a?"], {}, "needs messages with role and content as text; got 'a[?]'"),
        ([], {}, r"needs text or a list of chat messages; got \[\]"),
        ("a?", {"chat": False, "system": "s"}, "system is a chat message, but chat=False"),
    ],
)
def test_prompts_that_cannot_be(prompt, settings, text):
    with pytest.raises(ValueError, match=text):
        one({"q": prompt, "a": 3}, **settings)


# ---- verifiers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verify", "answer", "right", "wrong"),
    [
        ("number", "so\n#### 1,250", ["1250", "It is 1250.00."], ["1251", "none"]),
        ("number", 1e-05, ["0.00001"], ["1"]),  # not the -05 that its text ends in
        ("number", "2/3", ["0.66667", "4/6"], ["0.67"]),
        ("exact", " Rome ", ["Rome", "so\n#### Rome", r"\boxed{Rome}", "<answer> Rome </answer>."], ["rome", "It is Rome"]),
        ("exact", 12, ["12"], ["12.0"]),
        ("math", r"\frac{1}{2}", [r"\boxed{0.5}", "$1/2$"], [r"\boxed{2}", "no idea"]),
        ("choice", "(b)", ["B", "(B) Oslo", "The answer is B.", "**Answer: B**", r"\boxed{\text{b}}", "A? no.\n#### B"], ["A", "A big B", "Both"]),
        ("choice", 0, ["A."], ["B", "A man said so"]),
    ],
)  # fmt: skip
def test_verifiers(verify, answer, right, wrong):
    task, p = one({"q": "Which?", "a": answer}, verify=verify)
    assert [task.verify(p, text) for text in right] == [1] * len(right)
    assert [task.verify(p, text) for text in wrong] == [0] * len(wrong)
    assert task.verify(p, "  ") == 0
    assert (task.judge is not None) == (verify in ("number", "math"))


@pytest.mark.parametrize(
    ("verify", "answer", "text"),
    [
        ("choice", "Rome", r"needs a letter, or the place of the choice \(0 = A\), as its answer; got 'Rome'"),
        ("choice", -1, "needs a letter"),
        ("exact", " ", "needs an answer; got ' '"),
        ("math", r"\frac{", "math-verify does not accept the answer"),
        ("nummer", "1", "there is no verifier 'nummer'. Did you mean 'number'"),
    ],
)
def test_gold_answers_that_cannot_be_verified(verify, answer, text):
    with pytest.raises(ValueError, match=text):
        one({"q": "Which?", "a": answer}, verify=verify)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user."""
    (tmp_path / "own_rewards.py").write_text(
        "import time\n"
        "def longer(problem, text): return len(text) / problem.data['length']\n"
        "def hangs(problem, text): time.sleep(60 if text == 'hang' else 0); return 1\n"
        "def breaks(problem, text): return problem.data['lenght']\n"
        "def words(problem, text): return 'good'\n"
        "def short(row): return row['length'] < 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_rewards"


def test_the_users_own_verifier(own):
    row = {"q": "Which?", "a": "x", "length": 8}
    task, p = one(row, verify=f"{own}:longer")
    assert task.verify(p, "four") == 0.5
    assert one(row, verify=lambda problem, text: 0.25)[0].verify(p, "x") == 0.25
    slow, p = one(row, verify=f"{own}:hangs", verify_seconds=0.5)
    assert slow.verify(p, "fine") == 1
    with pytest.raises(
        ValueError, match=rf"own_rewards:hangs gave problem {p.id} no reward: time\. The response: 'hang'"
    ):
        slow.verify(p, "hang")
    assert slow.verify(p, "fine") == 1


def test_the_printed_form_tells_problems_and_verifiers_apart(own):
    row = {"q": "Which?", "a": "3", "length": 8}
    ways = ["number", "exact", "math", f"{own}:longer", f"{own}:hangs", None]
    forms = [repr(one(row, verify=way)[0]) for way in ways]
    assert len(set(forms)) == len(forms)
    assert forms == [repr(one(row, verify=way)[0]) for way in ways]  # no addresses


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("breaks", r"own_rewards:breaks gave problem data-\w+ no reward: raised \(KeyError: 'lenght'\)"),
        ("words", "own_rewards:words must return a number; got 'good'"),
        ("missing", "cannot start a process for own_rewards:missing: AttributeError"),
    ],
)
def test_an_own_verifier_that_does_not_work_is_told_before_the_run(own, name, text):
    with pytest.raises(ValueError, match=text):
        one({"q": "Which?", "a": "x", "length": 8}, verify=f"{own}:{name}")


def test_prompts_without_answers():
    rows = [{"q": row["q"]} for row in ROWS]
    task = from_data(rows, prompt="q", answer=None, verify=None, near_duplicates="ignore")
    assert task.train[0].answer == ""
    assert math.isnan(task.verify(task.train[0], "text"))
    with pytest.raises(
        ValueError,
        match=r"verify='number' compares with a gold answer\. Name its column \(answer=\), or give verify=None",
    ):
        from_data(rows, prompt="q", answer=None)


def test_solutions_that_do_not_give_their_answer_are_told():
    rows = [{**row, "s": f"It is {row['a'] + (n == 3)}."} for n, row in enumerate(ROWS)]
    task = from_data(rows, **QUIET, solution="s")
    assert task.notes == (
        "1 worked solutions do not give their answer, for example that of 'What is 5 times 8?', whose answer is '40'",
    )
    assert everything(task)["What is 2 times 5?"].solution == "It is 10."
    with pytest.raises(ValueError, match=r"rows\[0\] column 's' needs text; got 3"):
        from_data([{**row, "s": 3} for row in ROWS], **QUIET, solution="s")


# ---- filters ------------------------------------------------------------------------------------------------------------


def test_rows_are_kept_by_a_function(own):
    task = from_data(ROWS, **QUIET, keep=lambda row: row["kind"] == "even")
    assert {p.data["kind"] for p in everything(task).values()} == {"even"}
    assert task.notes == ("20 rows were left out by keep",)
    rows = [{"q": f"Question {n}?", "a": n, "length": n} for n in range(30)]
    assert len(everything(from_data(rows, **QUIET, keep=f"{own}:short", test_share=0.5))) == 5
    with pytest.raises(ValueError, match=r"keep raised KeyError: 'kimd' on rows\[0\]"):
        from_data(ROWS, **QUIET, keep=lambda row: row["kimd"])
    with pytest.raises(ValueError, match=r"the module own_rewards has no 'shrt'\. Did you mean 'short'"):
        from_data(rows, **QUIET, keep=f"{own}:shrt")
    with pytest.raises(ValueError, match="keep needs a function or module:function; got 'kind == even'"):
        from_data(ROWS, **QUIET, keep="kind == even")


def test_rows_that_are_left_out_need_no_value():
    rows = [*ROWS, {"q": "", "a": None, "kind": "broken"}]
    assert len(everything(from_data(rows, **QUIET, keep=lambda row: row["kind"] != "broken"))) == 40


def test_long_prompts_are_left_out(tmp_path):
    # "What is 9 times 12?" has 19 characters; with a number of one digit more it has 20
    short = from_data(ROWS, **QUIET, max_characters=19)
    assert max(len(q) for q in everything(short)) == 19
    assert short.notes == (f"{sum(len(row['q']) > 19 for row in ROWS)} rows were left out as too long",)
    # one token a byte: <|im_start|> user \n 19 \n... counted by the tokenizer itself
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tok")
    around = len(tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    for given in (tokenizer, str(tmp_path / "tok")):
        assert questions(from_data(ROWS, **QUIET, max_tokens=around + 19, tokenizer=given).train) == questions(
            short.train
        )
    raw = from_data(ROWS, **QUIET, chat=False, max_tokens=19, tokenizer=tokenizer)
    assert questions(raw.train) == questions(short.train)
    with pytest.raises(ValueError, match="max_tokens counts with a tokenizer"):
        from_data(ROWS, **QUIET, max_tokens=19)
    with pytest.raises(ValueError, match="data has 0 problems for train and 0 for test"):
        from_data(ROWS, **QUIET, max_characters=3)


# ---- splits -------------------------------------------------------------------------------------------------------------


def test_a_question_keeps_its_side_whatever_rows_are_beside_it():
    whole = from_data(ROWS, **QUIET, test_share=0.5)
    shuffled = random.Random(0).sample(ROWS, 20)
    part = from_data(shuffled, **QUIET, test_share=0.5, template="{q} Answer with a number.")
    assert set(questions(part.train)) <= set(questions(whole.train))
    assert set(questions(part.test)) <= set(questions(whole.test))
    assert not set(questions(whole.train)) & set(questions(whole.test))


def test_a_question_that_repeats_is_taken_once_and_never_on_both_sides():
    task = from_data([*ROWS, *({**row, "q": row["q"].upper()} for row in ROWS)], **QUIET, test_share=0.5)
    assert len(everything(task)) == len(ROWS)
    with pytest.raises(ValueError, match="train and test of data share 2 questions, for example 'What is 40"):
        from_data(ROWS, ROWS[38:], **QUIET)


def test_near_duplicates_are_told_or_dropped():
    text = (
        "Ann has {} apples in her basket and her friend Bob has {} more of them than she has. How many does Bob have?"
    )
    splits = {
        "train": [{"q": text.format(2, 3), "a": 5}, *ROWS[:5]],
        "test": [{"q": text.format(4, 5), "a": 9}, *ROWS[20:]],
    }
    settings = {"prompt": "q", "answer": "a", "similarity": 0.75}
    told = from_data(splits, **settings)
    assert len(told.train) == 6
    head = "1 of 6 train problems resemble a test problem (similarity 0.75 or more) and "
    assert told.notes[0] == head + "stay in train; near_duplicates='drop' drops them"
    # 103 pieces of five letters; two changed digits stand in five pieces each: about (103 - 10) / (103 + 10) are shared
    assert told.notes[1].startswith("0.8")
    assert "train 'Ann has 2 apples" in told.notes[1]
    assert "test 'Ann has 4 apples" in told.notes[1]
    dropped = from_data(splits, **settings, near_duplicates="drop")
    assert questions(dropped.train) == [row["q"] for row in ROWS[:5]]
    assert dropped.notes[0] == head + "were dropped from train"
    assert from_data(splits, **settings, near_duplicates="ignore").notes == ()


def test_dropping_drops_what_is_the_same_too():
    task = from_data(ROWS, ROWS[38:], prompt="q", answer="a", similarity=1.0, near_duplicates="drop")
    assert (len(task.train), len(task.test)) == (38, 2)


def test_word_problems_tell_and_drop_near_duplicates(tmp_path):
    lines = [{"input": row["q"], "target": row["a"]} for row in ROWS]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines[:20])))
    held = [*lines[20:], {"input": "And " + ROWS[0]["q"], "target": 10}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, held)))
    told = word_problems(str(tmp_path))
    assert told.notes[0].startswith("1 of 20 train problems resemble")
    assert len(told.train) == 20
    assert len(word_problems(str(tmp_path), near_duplicates="drop").train) == 19


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"near_duplicates": "remove"}, "near_duplicates must be 'report', 'drop' or 'ignore'; got 'remove'"),
        ({"near_duplicates": "report", "similarity": 0.2}, r"similarity must be from 0\.5 to 1; got 0\.2"),
        ({"test_share": 0}, "test_share must be above 0 and below 1; got 0"),
        ({"test_share": 0.0001}, r"data has 40 problems for train and 0 for test, divided with test_share=0\.0001"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(ValueError, match=text):
        from_data(ROWS, **(QUIET | settings))


def test_by_name():
    task = resolve_task(f"from_data(path='{TRAIN}', test='{TEST}', prompt='question', answer='answer')")
    assert (task.name, len(task.train), len(task.test)) == ("data", 24, 8)
    with pytest.raises(ValueError, match=r"from_data has no argument 'promt'\. Did you mean 'prompt'"):
        resolve_task(f"from_data('{TRAIN}', promt='question')")
