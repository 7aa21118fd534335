import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from apportion import Rollouts
from apportion.tasks import (
    BasicTask,
    Problem,
    Task,
    arithmetic,
    available,
    check_disjoint,
    gsm8k,
    mawps,
    reasoning_gym_task,
    resolve_task,
    svamp,
    word_problems,
)

DATA = Path(__file__).parent.parent / "data"


def problem(question, answer="1"):
    return Problem(id=question, question=question, prompt=question, answer=answer)


def questions(problems):
    return [p.question for p in problems]


# ---- laws of every task -------------------------------------------------------------------------------------------------

EVERY = {
    "arithmetic": lambda: arithmetic(train=40, test=20),
    "arithmetic with products and negatives": lambda: arithmetic(
        terms=5, digits=2, operators="+-*", negative=True, train=40, test=20
    ),
    "gsm8k": lambda: gsm8k(str(DATA / "gsm8k_train.jsonl"), str(DATA / "gsm8k_test.jsonl")),
    "svamp": lambda: svamp(str(DATA / "svamp.jsonl")),
    "mawps": lambda: word_problems(str(DATA / "mawps_schema.jsonl"), name="mawps", test_share=0.5),
    "chain_sum": lambda: reasoning_gym_task("chain_sum", train=8, test=4, extract="number"),
    "countdown": lambda: reasoning_gym_task("countdown", train=4, test=2),
}


@pytest.fixture(params=EVERY, scope="module")
def task(request):
    return EVERY[request.param]()


def test_the_gold_answer_is_accepted_and_an_empty_one_is_not(task):
    for p in [*task.train, *task.test]:
        assert task.verify(p, p.answer) == 1
        assert task.verify(p, "") == 0
        assert task.verify(p, " \n") == 0


def test_the_worked_solution_is_accepted_and_ends_with_the_answer(task):
    for p in [*task.train, *task.test]:
        if p.solution is not None:
            assert task.verify(p, p.solution) == 1
            assert p.solution.replace(",", "").endswith(p.answer)


def test_train_and_test_are_disjoint_and_named_apart(task):
    assert task.train
    assert task.test
    assert not set(questions(task.train)) & set(questions(task.test))
    ids = [p.id for p in [*task.train, *task.test]]
    assert len(set(ids)) == len(ids)
    assert isinstance(task, Task)


def test_building_it_again_gives_the_same(task, request):
    again = EVERY[request.node.callspec.params["task"]]()
    assert list(again.train) == list(task.train)
    assert list(again.test) == list(task.test)


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def test_an_arithmetic_problem_looks_as_promised():
    task = arithmetic(terms=4, digits=1, train=200, test=50)
    for p in task.train:
        left, equals, rest = p.question.partition("=")
        assert (equals, rest) == ("=", "?")
        assert p.prompt == p.question + "\n"
        assert set(left) <= set("123456789+-")
        assert eval(left) == int(p.answer)
        lines = p.solution.split("\n")
        assert len(lines) == 3
        previous = left[0]
        for line in lines:  # one true equation a line, each from the result before
            expression, _, result = line.partition("=")
            assert expression.startswith(previous)
            assert eval(expression) == int(result) >= 0
            previous = result
        assert previous == p.answer


def test_parentheses_keep_the_order_where_a_product_follows_a_sum():
    task = arithmetic(terms=5, digits=1, operators="+-*", negative=True, train=300, test=50)
    assert any("(" in q for q in questions(task.train))
    assert any(int(p.answer) < 0 for p in task.train)
    for p in task.train:
        assert eval(p.question.removesuffix("=?")) == int(p.answer)
        results = [line.partition("=")[2] for line in p.solution.split("\n")]
        starts = p.solution.split("\n")[1:]
        assert all(line.startswith(result) for line, result in zip(starts, results, strict=False))


def test_only_the_last_number_counts():
    task = arithmetic(terms=3, train=1, test=1)
    p = task.train[0]
    wrong = str(int(p.answer) + 1)
    assert task.verify(p, f"{wrong} no, {p.answer}") == 1
    assert task.verify(p, f"{p.answer} no, {wrong}") == 0
    assert task.verify(p, f"{p.answer}.5") == 0
    assert task.verify(p, "no idea") == 0


def test_no_seed_moves_a_question_from_test_to_train():
    held = {q for seed in range(5) for q in questions(arithmetic(terms=3, train=0, test=200, seed=seed).test)}
    learnt = {q for seed in range(5) for q in questions(arithmetic(terms=3, train=300, test=0, seed=seed).train)}
    assert len(held) > 400
    assert not held & learnt
    assert questions(arithmetic(train=9, test=0, seed=1).train) != questions(arithmetic(train=9, test=0, seed=2).train)


def test_seed_0_stays_what_it_is():
    # a run names its problems by these ids; they must not move between versions
    assert questions(arithmetic(train=3, test=1).train) == ["8+6-4+9=?", "2+4-4+4=?", "3+1+5+8=?"]


def test_the_judge_finds_nothing_wrong_with_the_solutions_and_something_with_a_slip():
    task = arithmetic(terms=5, operators="+-*", train=30, test=1)
    texts = [p.solution for p in task.train]
    bad = texts[0].split("\n")
    texts.append("\n".join([bad[0], "1+1=2", *bad[1:]]))  # true, but nothing of the question
    asked = [*task.train, task.train[0]]
    rollouts = Rollouts.from_lists(
        [list(map(ord, text)) for text in texts],
        list(range(len(texts))),
        meta={"pieces": [list(text) for text in texts], "question": [p.question for p in asked]},
    )
    rollouts = rollouts.with_spans(step=task.splitter(rollouts))
    verdicts = task.judge.measure(rollouts)["judge"].values[:, 0]
    row = rollouts.spans["step"].row
    assert not verdicts[row < len(texts) - 1].any()
    assert verdicts[row == len(texts) - 1].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"terms": 1}, "terms of at least 2 and digits of at least 1; got 1 and 1"),
        ({"operators": "+/"}, r"operators out of '\+-\*'; got '\+/'"),
        (
            {"terms": 2},
            r"too few different questions: .* gave \d+ for train and \d+ for test, but train=4096 and test=512",
        ),
        ({"train": -1}, "sizes of at least 0; got train=-1"),
    ],
)
def test_arithmetic_settings_out_of_range(settings, text):
    with pytest.raises(ValueError, match=text):
        arithmetic(**settings)


# ---- word problems ------------------------------------------------------------------------------------------------------


def test_gsm8k_rows():
    task = gsm8k(str(DATA / "gsm8k_train.jsonl"), str(DATA / "gsm8k_test.jsonl"))
    assert (len(task.train), len(task.test)) == (24, 8)
    p = task.train[0]
    assert p.question.startswith("Natalia sold clips to 48")
    assert p.answer == "72"
    assert p.solution == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )
    assert p.data["equations"] == ("48/2=24", "48+24=72")
    (message,) = p.prompt
    assert message["role"] == "user"
    assert message["content"].startswith(p.question)
    assert task.verify(p, "She sold 24 in May.\n#### 72") == 1
    assert task.verify(p, "72 clips\n#### 24") == 0


def test_svamp_rows():
    task = svamp(str(DATA / "svamp.jsonl"))
    assert len(task.train) + len(task.test) == 24
    (p,) = [p for p in [*task.train, *task.test] if "bananas are organized into 2 groups" in p.question]
    assert p.question.endswith("oranges are organized into 93 groups. How big is each group of bananas?")
    assert p.answer == "145"
    assert p.data["equations"] == ("( 290.0 / 2.0 )",)
    assert p.solution is None


def test_mawps_rows_and_rounded_answers():
    task = word_problems(str(DATA / "mawps_schema.jsonl"), test_share=0.5)
    found = {p.question[:4]: p for p in [*task.train, *task.test]}
    assert found["Mira"].answer == "12"
    assert found["Two "].answer == "1.5"
    assert task.verify(found["A ri"], "2/3") == 1  # published as 0.6666666667
    assert task.verify(found["A ri"], "0.67") == 0
    assert task.verify(found["A ti"], "$1,254.") == 1


def test_a_prompt_may_be_text():
    p = word_problems(str(DATA / "mawps_schema.jsonl"), test_share=0.5, chat=False, instruction="Answer:").train[0]
    assert p.prompt == f"{p.question}\nAnswer:\n"


def test_a_folder_with_train_and_test(tmp_path):
    (tmp_path / "train.jsonl").write_text((DATA / "gsm8k_train.jsonl").read_text())
    (tmp_path / "test.jsonl").write_text((DATA / "gsm8k_test.jsonl").read_text())
    task = gsm8k(str(tmp_path))
    assert (len(task.train), len(task.test)) == (24, 8)


def test_a_folder_of_parts_and_questions_that_repeat(tmp_path):
    rows = (DATA / "mawps_schema.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(rows[:5]) + "\n\n")  # a blank line is no row
    (tmp_path / "b.jsonl").write_text("\n".join(rows[3:]).replace("Otto reads", "otto  READS"))
    task = word_problems(str(tmp_path), test_share=0.5)
    assert len(task.train) + len(task.test) == 8


def test_the_split_depends_on_the_question_alone(tmp_path):
    rows = (DATA / "svamp.jsonl").read_text().splitlines()
    whole = word_problems(str(DATA / "svamp.jsonl"), test_share=0.5)
    (tmp_path / "part.jsonl").write_text("\n".join(rows[::-2]))
    part = word_problems(str(tmp_path / "part.jsonl"), test_share=0.5)
    assert set(questions(part.train)) <= set(questions(whole.train))
    assert set(questions(part.test)) <= set(questions(whole.test))


def test_train_and_test_files_that_share_questions(tmp_path):
    rows = (DATA / "gsm8k_train.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:3]).replace("Natalia", "NATALIA"))
    with pytest.raises(ValueError, match="train and test of gsm8k share 3 questions, for example 'NATALIA sold clips"):
        gsm8k(str(DATA / "gsm8k_train.jsonl"), str(tmp_path / "test.jsonl"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            '{"question": "How many?", "answer": "#### 3"',
            r"data\.jsonl line 2 is not JSON: .*Repair or remove it",
        ),
        (b"\xff\xfe\x00", r"data\.jsonl line 2 is not JSON"),
        ('{"question": "How many?", "reply": "3"}', "line 2 needs question and answer, .* got question, reply"),
        ("[1, 2]", "line 2 needs an object with a value per column; got list"),
        (
            '{"question": "How many?", "answer": "3"}',
            "line 2 needs an answer that ends in '#### ' and a number; got '3'",
        ),
        ('{"question": "How many?", "answer": "#### three"}', "line 2 needs a number as its answer; got ' three'"),
        ('{"input": "How many?", "target": null}', "line 2 needs a number as its answer; got None"),
        ('{"input": "How many?", "target": true}', "line 2 needs a number as its answer; got True"),
        ('{"Body": "x", "Question": "y", "Answer": NaN}', "line 2 needs a number as its answer; got nan"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, text):
    good = (DATA / "gsm8k_train.jsonl").read_bytes().splitlines()[0]
    (tmp_path / "data.jsonl").write_bytes(good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=text):
        word_problems(str(tmp_path / "data.jsonl"))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file nowhere/data\.jsonl\. Give a file \(\.jsonl"):
        gsm8k("nowhere/data.jsonl")
    with pytest.raises(ValueError, match=r"has no file that ends in \.jsonl, \.json, \.parquet, \.csv"):
        gsm8k(str(tmp_path))


def test_too_few_problems_to_split(tmp_path):
    (tmp_path / "one.jsonl").write_text((DATA / "mawps_schema.jsonl").read_text().splitlines()[0])
    with pytest.raises(
        ValueError, match=r"mawps has \d problems for train and \d for test, divided with test_share=0\.2"
    ):
        mawps(str(tmp_path / "one.jsonl"))


def test_a_hub_that_cannot_be_reached_gives_one_clear_message():
    code = "from apportion.tasks import gsm8k\ntry:\n    gsm8k()\nexcept ValueError as error:\n    print(error)\n"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": "/usr/bin", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=True)
    assert done.stdout.startswith("could not load openai/gsm8k from the hub: ")
    assert "give the path of a file" in done.stdout


# ---- reasoning-gym ------------------------------------------------------------------------------------------------------

# Every data set of reasoning-gym 0.1.25 but three (see below) was run through this test; these are the quick ones of each kind.
QUICK = [
    "aiw",
    "base_conversion",
    "basic_arithmetic",
    "binary_matrix",
    "caesar_cipher",
    "calendar_arithmetic",
    "circuit_logic",
    "complex_arithmetic",
    "count_primes",
    "decimal_arithmetic",
    "family_relationships",
    "fraction_simplification",
    "gcd",
    "graph_color",
    "gsm_symbolic",
    "knights_knaves",
    "letter_counting",
    "maze",
    "mini_sudoku",
    "n_queens",
    "number_sorting",
    "palindrome_generation",
    "polynomial_equations",
    "power_function",
    "prime_factorization",
    "propositional_logic",
    "rubiks_cube",
    "sentence_reordering",
    "simple_integration",
    "spell_backward",
    "syllogism",
    "time_intervals",
    "tower_of_hanoi",
    "word_ladder",
    "word_sorting",
]


@pytest.mark.parametrize("name", QUICK)
def test_data_sets_accept_their_own_gold_answer(name):
    task = reasoning_gym_task(name, train=2, test=1)
    for p in [*task.train, *task.test]:
        assert task.verify(p, p.answer) == 1
        assert task.verify(p, f"It must be\n<answer>\n{p.answer}\n</answer>") == 1
        assert task.verify(p, "") == task.verify(p, "<answer> </answer>") == 0


@pytest.mark.parametrize("name", ["boxnet", "rush_hour"])
def test_data_sets_without_a_gold_answer_are_refused(name):
    with pytest.raises(ValueError, match=f"the reasoning-gym data set {name} publishes no gold answer"):
        reasoning_gym_task(name, train=1, test=1)


def test_what_is_scored_of_a_response():
    number = reasoning_gym_task("chain_sum", train=4, test=1, extract="number")
    p = number.train[0]
    assert number.verify(p, f"That makes {p.answer}.") == 1
    assert number.verify(p, "no number") == 0
    tag = reasoning_gym_task("chain_sum", train=4, test=1)
    assert tag.verify(p, f"<answer>1</answer> no: <answer>{p.answer}</answer> of course") == 1
    assert tag.verify(p, f"<answer>{p.answer}") == 1  # cut off before the closing tag
    assert 0 < tag.verify(p, f"{p.answer} is what I get") < 1  # the scorer's own partial reward
    assert "<answer>" in p.prompt[0]["content"] or "<answer>" in tag.train[0].prompt[0]["content"]


def test_options_may_be_lists():
    task = reasoning_gym_task("basic_arithmetic", train=3, test=1, operators=["+"])
    for p in task.train:
        assert "*" not in p.question
        assert task.verify(p, p.answer) == 1


def test_a_small_pool_is_split_without_overlap():
    task = reasoning_gym_task("chain_sum", train=80, test=20, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert max(Counter(questions([*task.train, *task.test])).values()) == 1
    other = reasoning_gym_task(
        "chain_sum", train=80, test=20, seed=7, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    assert not set(questions(other.train)) & set(questions(task.test))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("chain_sums", {}, "no data set 'chain_sums'. Did you mean 'chain_sum'"),
        ("zzzzzzz", {}, "no data set 'zzzzzzz'. Known: ab, acre, "),
        ("chain_sum", {"min_term": 2}, "chain_sum of reasoning-gym has no option 'min_term'. Did you mean 'min_terms'"),
        (
            "chain_sum",
            {"min_terms": 9},
            "chain_sum of reasoning-gym refuses these options: max_terms must be >= min_terms",
        ),
        ("chain_sum", {"extract": "last"}, "extract must be 'tag', 'number' or 'text'; got 'last'"),
        ("composite", {}, "composite of reasoning-gym refuses these options"),
    ],
)
def test_reasoning_gym_mistakes(name, options, text):
    with pytest.raises(ValueError, match=text):
        reasoning_gym_task(name, train=1, test=1, **options)


# ---- disjointness -------------------------------------------------------------------------------------------------------


def test_shared_questions_are_counted_and_shown():
    train = [problem("2+2=?"), problem("How many ?"), problem("x")]
    with pytest.raises(ValueError, match=r"train and test of mine share 1 question, for example 'how  many\?'"):
        check_disjoint("mine", train, [problem("how  many?"), problem("y")])
    with pytest.raises(ValueError, match="share 2 questions"):
        BasicTask("mine", train, [problem("x"), problem("2+2=?")], lambda p, text: 1.0)
    check_disjoint("mine", train, [problem("2-2=?"), problem("3+2=?")])


# ---- by name ------------------------------------------------------------------------------------------------------------


def test_every_example_resolves(tmp_path, monkeypatch):
    # the paths of the examples, so that they are what a user would type
    for folder, file in (("data/gsm8k", "train.jsonl"), ("data/svamp", "test.jsonl"), ("data/mawps", "addsub.jsonl")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text((DATA / "gsm8k_train.jsonl").read_text())
    (tmp_path / "train.jsonl").write_text((DATA / "gsm8k_train.jsonl").read_text())
    (tmp_path / "test.jsonl").write_text((DATA / "gsm8k_test.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    assert [info.name for info in available()] == sorted(info.name for info in available())
    for info in available():
        assert isinstance(resolve_task(info.example), Task)
        assert info.what.endswith(".")
        assert "\n" not in info.what


def test_names_calls_and_bare_words():
    assert resolve_task("arithmetic").name == "arithmetic"
    assert len(resolve_task(" arithmetic(terms=3, train=7, test=2) ").train) == 7
    assert resolve_task("reasoning_gym(spell_backward, train=3, test=1)").name == "spell_backward"
    assert resolve_task("reasoning_gym('spell_backward', train=3, test=1)").name == "spell_backward"


def test_a_users_own_task(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(
        "from apportion.tasks import BasicTask, Problem\n"
        "def make(): return BasicTask('own', [Problem('1', 'a', 'a', 'x')], [Problem('2', 'b', 'b', 'x')], lambda p, t: 1.0)\n"
        "ready = make()\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_task("own_tasks:make").name == resolve_task("own_tasks:ready").name == "own"
    with pytest.raises(ValueError, match=r"the module own_tasks has no 'raedy'\. Did you mean 'ready'"):
        resolve_task("own_tasks:raedy")
    with pytest.raises(ValueError, match=r"own_tasks:number gave a int\. A task has name, train, test and verify"):
        resolve_task("own_tasks:number")
    with pytest.raises(ValueError, match="cannot import own_task for the task own_task:make"):
        resolve_task("own_task:make")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arithmatic", "there is no task 'arithmatic'. Did you mean 'arithmetic'"),
        ("chain_sum", r"there is no task 'chain_sum'. Did you mean 'reasoning_gym\(chain_sum\)'"),
        ("zzz(1)", "there is no task 'zzz'. Known: arithmetic, calculator, from_data, "),
        ("arithmetic(term=5)", "arithmetic has no argument 'term'. Did you mean 'terms'"),
        ("arithmetic(5)", r"arithmetic: too many positional arguments. For example arithmetic\(terms=4"),
        ("arithmetic(terms='x')", r"arithmetic\(terms='x'\): an argument has a wrong type: .* For example arithmetic"),
        ("mawps", "mawps: missing a required argument: 'path'"),
        ("arithmetic(terms=2+2)", "a task is written as a name, a call with literals or module:function"),
        ("arithmetic(**{'terms': 3})", "a task is written as a name"),
        ("arithmetic(terms=open('x'))", "a task is written as a name"),
        ("__import__('os').getcwd()", "a task is written as a name"),
        ("arithmetic(", "a task is written as a name"),
        ("", "a task is written as a name"),
        ("(" * 5000, "a task is written as a name"),
    ],
)
def test_what_a_person_mistypes(text, message):
    with pytest.raises(ValueError, match=message):
        resolve_task(text)


def test_light_to_import():
    code = (
        "import sys, json, apportion.tasks\n"
        "print(json.dumps([m for m in ('reasoning_gym', 'datasets', 'math_verify', 'transformers') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
