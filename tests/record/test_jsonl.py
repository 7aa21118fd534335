"""Logs of rollouts as JSON lines: what is read, what is written, and what a broken line is told."""

import json
import math

import pytest
import torch

from apportion import Credit, Rollouts, Signal, Spans
from apportion.record import read_jsonl, to_dicts, write_jsonl

NAN = math.nan


def log(tmp_path, *entries):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in entries))
    return path


def test_every_key_of_the_schema(tmp_path):
    first = {
        "tokens": [5, 6, 7],
        "group": "q1",
        "trajectory": "a",
        "action_mask": [0, 1, 1],
        "outcome": 1,
        "steps": [[1, 2], [2, 3]],
        "judge": [[0, 1], [None, 0]],
        "process": [0.5, None],
        "logprobs": [-0.5, -0.25, -1],
        "values": [0, 0.5, 0.75],
        "truncated": True,
        "bootstrap": 0.5,
        "off_policy": True,
        "spans": {"turn": [[0, 3]]},
        "signals": {
            "entropy": {"unit": "token", "values": [1, 2, 3]},
            "style": {"unit": "trajectory", "axes": ["factor"], "values": [1, 2]},
            "hard": {"unit": "group", "values": 0.25},
        },
        "text": "six seven",
        "difficulty": 3,
    }
    second = {"tokens": [8], "group": "q2", "logprobs": [-2], "values": [1], "steps": [[0, 1]]}
    r = read_jsonl(log(tmp_path, first, "\n", second))
    assert r.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert r.group_ids.tolist() == r.trajectory_ids.tolist() == [0, 1]
    assert r.action_mask.tolist() == [[False, True, True], [True, False, False]]
    assert r.logprobs.tolist() == [[-0.5, -0.25, -1], [-2, 0, 0]]
    assert r.values.tolist() == [[0, 0.5, 0.75], [1, 0, 0]]
    assert (r.truncated.tolist(), r.off_policy.tolist(), r.bootstrap.tolist()) == (
        [True, False],
        [True, False],
        [0.5, 0],
    )
    assert r.spans["step"].to_lists(2) == [[(1, 2), (2, 3)], [(0, 1)]]
    assert r.spans["step"].index.tolist() == [0, 1, 0]
    assert r.spans["turn"].to_lists(2) == [[(0, 3)], []]
    same(r.signals["outcome"], Signal(torch.tensor([1.0, NAN]), "trajectory"))
    same(r.signals["judge"], Signal(torch.tensor([[0, 1], [NAN, 0], [NAN, NAN]]), "step", ("critiques",)))
    same(r.signals["process"], Signal(torch.tensor([0.5, NAN, NAN]), "step"))
    same(r.signals["entropy"], Signal(torch.tensor([[1, 2, 3], [NAN, NAN, NAN]]), "token"))
    same(r.signals["style"], Signal(torch.tensor([[1.0, 2], [NAN, NAN]]), "trajectory", ("factor",)))
    same(r.signals["hard"], Signal(torch.tensor([0.25, NAN]), "group"))
    assert dict(r.meta) == {"text": ["six seven", None], "difficulty": [3, None]}


def same(a, b):
    assert (a.unit, a.axes) == (b.unit, b.axes)
    assert torch.equal(a.values.nan_to_num(nan=-99), b.values.nan_to_num(nan=-99))


def test_one_verdict_per_step_is_one_critique(tmp_path):
    r = read_jsonl(log(tmp_path, {"tokens": [1, 2], "group": 0, "steps": [[0, 1], [1, 2]], "judge": [0, 1]}))
    assert r.signals["judge"].values.tolist() == [[0], [1]]


def test_pieces_stand_for_tokens(tmp_path):
    """Equal texts get equal ids, so that prefixes can be compared."""
    r = read_jsonl(log(tmp_path, {"pieces": ["a", "b", "a"], "group": 0}, {"pieces": ["a", "c"], "group": 0}))
    assert r.tokens.tolist() == [[0, 1, 0], [0, 2, 0]]
    assert r.meta["pieces"] == [["a", "b", "a"], ["a", "c"]]


def test_rows_of_one_trajectory(tmp_path):
    """Given out of order: the ordinals of steps follow row_index, the outcome may stand on one line or on both."""
    later = {"tokens": [3], "group": "g", "trajectory": 7, "row_index": 1, "steps": [[0, 1]], "outcome": 1}
    earlier = {"tokens": [1, 2], "group": "g", "trajectory": 7, "row_index": 0, "steps": [[0, 1], [1, 2]]}
    r = read_jsonl(log(tmp_path, later, earlier))
    assert r.trajectory_ids.tolist() == [0, 0]
    assert r.spans["step"].index.tolist() == [2, 0, 1]
    assert r.signals["outcome"].values.tolist() == [1]


def test_what_is_written_is_read_again(tmp_path):
    r = Rollouts.from_lists(
        [[1, 2, 3], [4, 5], [6]],
        [0, 0, 1],
        outcome=[0.1, NAN],
        trajectories=[0, 0, 1],
        steps=[[(0, 2)], [], [(0, 1)]],
        judge=[[[1.0, NAN]], [], [[0.0, 0.0]]],
        process=[[0.1], [], [1 / 3]],
        action_mask=[[False, True, True], [True, True], [True]],
        logprobs=[[-0.1, -0.2, -0.3], [-0.4, -0.5], [-1 / 3]],
        truncated=[True, False, False],
        signals={"entropy": Signal(torch.full((3, 3), NAN), "token"), "all": Signal(torch.tensor([0.7]), "batch")},
        meta={"text": ["a\n\u2028\x1b", "b", "c"], "pieces": [["x", "y", "z"], ["u", "v"], ["w"]]},
    )
    credit = Credit(torch.rand(3, 3), r.action_mask, {"outcome": Signal(torch.tensor([0.25, 1.0]), "trajectory")})
    write_jsonl(tmp_path / "out.jsonl", r, credit)
    again = read_jsonl(tmp_path / "out.jsonl")
    for name in (
        "tokens",
        "lengths",
        "action_mask",
        "group_ids",
        "trajectory_ids",
        "row_index",
        "truncated",
        "logprobs",
    ):
        assert torch.equal(getattr(again, name), getattr(r, name))
    for name, signal in r.signals.items():
        same(again.signals[name], signal)
    assert again.spans["step"].to_lists(3) == r.spans["step"].to_lists(3)
    assert dict(again.meta) == dict(r.meta)
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert torch.equal(torch.tensor(line["advantages"]), credit.advantages[0])
    assert line["credit_mask"] == [0, 1, 1]
    assert line["parts"] == {"outcome": {"unit": "trajectory", "values": 0.25}}
    assert line["outcome"] == 0.1  # the shortest number that is the same float32


def test_float64_is_kept_when_asked_for(tmp_path):
    r = Rollouts.from_lists([[1]], [0], outcome=[1 / 3], dtype=torch.float64)
    write_jsonl(tmp_path / "out.jsonl", r)
    assert read_jsonl(tmp_path / "out.jsonl", dtype=torch.float64).signals["outcome"].values.item() == 1 / 3


def test_what_json_lines_cannot_hold(tmp_path):
    r = Rollouts.from_lists([[1]], [0])
    with pytest.raises(ValueError, match=r"meta\['steps'\] has the name of a key of the schema. Rename it"):
        to_dicts(r.replace(meta={"steps": [1]}))
    with pytest.raises(ValueError, match=r"continuous actions. Record it as a run folder"):
        to_dicts(r.replace(actions=torch.zeros(1, 1, 2)))


GOOD = {"tokens": [1, 2, 3], "group": 0, "steps": [[0, 1], [1, 3]]}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{oops\n", r"line 2: not JSON"),
        ("[1, 2]\n", r"line 2: is list, but each line must be a JSON object"),
        ({"group": 0}, r'line 2: needs "tokens" \(a list of token ids\) or "pieces"'),
        ({"tokens": [1.5], "group": 0}, r"line 2: tokens must be whole numbers"),
        (
            {"pieces": ["a"], "group": 0},
            r"line 2: tokens must be whole numbers, .* on every line of the file or on none",
        ),
        ({"tokens": [1]}, r'line 2: needs "group": a number or text'),
        ({**GOOD, "pieces": ["a"]}, r"line 2: pieces has 1 entries but the row has 3 tokens. Give one text per token"),
        ({**GOOD, "action_mask": [1]}, r"line 2: action_mask has 1 values but the row has 3 tokens"),
        ({**GOOD, "judge": [[0]]}, r"line 2: judge has 1 values but the row has 2 steps. Give one per entry"),
        ({**GOOD, "judge": [[0], [0, 1]]}, r"line 2: judge has lists of different lengths"),
        ({**GOOD, "judge": "fine"}, r"line 2: judge holds 'fine'. Give numbers, or null where nothing was measured"),
        ({**GOOD, "process": [1]}, r"line 2: process has 1 values but the row has 2 steps"),
        ({**GOOD, "process": [[1], [2]]}, r"line 2: process has 2 levels of lists; its unit and axes ask for 1"),
        ({**GOOD, "steps": [[0, 4]]}, r"line 2: steps has \[0, 4\] but the row has 3 tokens"),
        ({**GOOD, "steps": [[0, 2], [1, 3]]}, r"line 2: steps overlap"),
        ({**GOOD, "steps": [[0, 2.5]]}, r"line 2: steps must be a list of \[start, stop\] pairs of whole numbers"),
        ({**GOOD, "spans": {"turn": [[2, 1]]}}, r"line 2: spans.turn has \[2, 1\]"),
        ({**GOOD, "outcome": "yes"}, r"line 2: outcome holds 'yes'. Give numbers, or null"),
        ({**GOOD, "truncated": "no"}, r"line 2: truncated is 'no'. Give one number"),
        ({**GOOD, "pieces": 3}, r"line 2: pieces has 3 but the row has 3 tokens. Give one text per token"),
        (
            {**GOOD, "signals": {"x": {"unit": "token", "axes": 3, "values": []}}},
            r"line 2: signals.x.axes must be a list",
        ),
        ({**GOOD, "signals": {"x": 3}}, r'line 2: signals.x needs "unit" and "values"; got 3'),
        (
            {**GOOD, "signals": {"x": {"unit": "token", "values": [1]}}},
            r"line 2: signals.x has 1 values but the row has 3",
        ),
        (
            {**GOOD, "signals": {"x": {"unit": "word", "values": []}}},
            r"line 2: signals.x has unit 'word', which is not known",
        ),
    ],
)
def test_a_broken_line_names_file_line_and_field(tmp_path, broken, message):
    with pytest.raises(ValueError, match="log.jsonl " + message):
        read_jsonl(log(tmp_path, GOOD, broken))


def test_lines_that_do_not_fit_together(tmp_path):
    with pytest.raises(ValueError, match=r"line 2: logprobs has 2 values but the row has 3 tokens. Give one value per"):
        read_jsonl(log(tmp_path, {**GOOD, "logprobs": [0, 0, 0]}, {**GOOD, "logprobs": [-1, -2]}))
    with pytest.raises(ValueError, match=r"line 2: logprobs is missing here but given on other lines"):
        read_jsonl(log(tmp_path, {**GOOD, "logprobs": [0, 0, 0]}, GOOD))
    with pytest.raises(ValueError, match=r"line 2: judge has entries of shape \[1\]; other lines have \[2\]"):
        read_jsonl(log(tmp_path, {**GOOD, "judge": [[0, 0], [0, 0]]}, {**GOOD, "judge": [0, 0]}))
    with pytest.raises(ValueError, match=r"line 2: outcome differs from another line of the same trajectory"):
        read_jsonl(log(tmp_path, *({**GOOD, "trajectory": 1, "outcome": x} for x in (0, 1))))
    with pytest.raises(ValueError, match=r"log.jsonl: a trajectory lies in two groups"):
        read_jsonl(log(tmp_path, *({**GOOD, "trajectory": 1, "group": x} for x in (0, 1))))
    units = ({"unit": "token", "values": [1, 2, 3]}, {"unit": "step", "values": [1, 2]})
    with pytest.raises(ValueError, match=r"line 2: signals.x has another unit or other axes than on line 1"):
        read_jsonl(log(tmp_path, *({**GOOD, "signals": {"x": x}} for x in units)))


def test_a_step_without_any_critique_is_not_judged(tmp_path):
    lines = ({**GOOD, "judge": [[0, 1], [0, 0]]}, {**GOOD, "judge": [[], []]}, {**GOOD, "steps": [], "judge": []})
    r = read_jsonl(log(tmp_path, *lines))
    same(r.signals["judge"], Signal(torch.tensor([[0, 1], [0, 0], [NAN, NAN], [NAN, NAN]]), "step", ("critiques",)))


def test_an_empty_answer_is_legal(tmp_path):
    r = read_jsonl(log(tmp_path, {"tokens": [], "group": 0, "outcome": 0}, {"tokens": [1], "group": 0, "outcome": 1}))
    assert r.lengths.tolist() == [0, 1]


def test_files_without_rollouts(tmp_path):
    with pytest.raises(ValueError, match="has no rollouts: every line is blank"):
        read_jsonl(log(tmp_path, "\n"))
    with pytest.raises(FileNotFoundError, match=r"is not a file. Give a JSON lines file"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary line 1: not JSON"):
        read_jsonl(tmp_path / "binary")


def test_spans_with_states_are_written_without_them(tmp_path):
    """The page says so: JSON lines hold start and stop, a run folder holds everything."""
    s = Spans(*(torch.tensor([x]) for x in (0, 0, 1, 5)), state=torch.tensor([3]))
    write_jsonl(tmp_path / "out.jsonl", Rollouts.from_lists([[1]], [0], spans={"turn": s}))
    again = read_jsonl(tmp_path / "out.jsonl").spans["turn"]
    assert (again.index.tolist(), again.state) == ([0], None)
