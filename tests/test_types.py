"""The core types: what they refuse, how units reach positions, and what a slice keeps."""

import pytest
import torch

from apportion import Credit, Rollouts, Signal, Spans

NAN = float("nan")


@pytest.fixture
def rollouts() -> Rollouts:
    return Rollouts.from_lists(
        [[1, 2, 3, 4], [5, 6, 7], [8]],
        ["a", "a", "b"],
        outcome=[1.0, 0.0, NAN],
        steps=[[(1, 2), (2, 4)], [(0, 3)], [(1, 1)]],
        process=[[0.5, -0.5], [1.0], [NAN]],
        action_mask=[[False, True, True, True], [True] * 3, [True]],
        truncated=[False, True, False],
        meta={"name": ["x", "y", "z"]},
    )


def test_ids_are_made_dense_in_order_of_appearance():
    r = Rollouts.from_lists([[1], [2], [3]], ["b", "a", "b"], trajectories=["t", "u", "t"])
    assert r.group_ids.tolist() == [0, 1, 0]
    assert r.trajectory_ids.tolist() == [0, 1, 0]
    assert r.row_index.tolist() == [0, 0, 1]
    assert (r.num_groups, r.num_trajectories, r.trajectory_groups.tolist()) == (2, 2, [0, 1])


def test_units_reach_positions(rollouts):
    assert rollouts.span_ids("step").tolist() == [[-1, 0, 1, 1], [2, 2, 2, -1], [-1] * 4]
    at = rollouts.at_tokens(rollouts.signals["process"])
    assert at.tolist() == [[0, 0.5, -0.5, -0.5], [1, 1, 1, 0], [0] * 4]
    outcome = rollouts.at_tokens(rollouts.signals["outcome"])
    assert outcome[:2].tolist() == [[1.0] * 4, [0.0] * 4]
    assert outcome[2].isnan().all()
    assert rollouts.at_tokens(Signal(torch.tensor([2.0, 3.0]), "group"))[:, 0].tolist() == [2, 2, 3]
    assert rollouts.at_tokens(Signal(torch.tensor([7.0]), "batch")).unique().tolist() == [7]


def test_a_signal_over_no_spans_is_zero_everywhere():
    r = Rollouts.from_lists([[1, 2]], [0], steps=[[]], process=[[]])
    assert r.at_tokens(r.signals["process"]).tolist() == [[0.0, 0.0]]


def test_a_slice_keeps_its_spans_signals_and_meta(rollouts):
    part = rollouts.select(torch.tensor([2, 0]))
    assert part.tokens[0, 0] == 8
    assert part.covers == "row"
    assert part.group_ids.tolist() == [1, 0]  # dense again; "a" was first before
    assert part.spans["step"].to_lists(2) == [[(1, 1)], [(1, 2), (2, 4)]]
    assert part.signals["outcome"].values[part.trajectory_ids].tolist()[1] == 1.0
    assert part.at_tokens(part.signals["process"])[1].tolist() == [0, 0.5, -0.5, -0.5]
    assert part.meta["name"] == ["z", "x"]
    assert part.truncated.tolist() == [False, False]


def test_a_slice_renumbers_parents():
    spans = Spans(
        *(torch.tensor(x) for x in ([0, 1, 1], [0, 0, 1], [1, 1, 2], [0, 1, 2])), parent=torch.tensor([-1, 0, 1])
    )
    r = Rollouts.from_lists([[1], [2, 3]], [0, 0], trajectories=[0, 0], spans={"turn": spans})
    assert r.select(torch.tensor([1])).spans["turn"].parent.tolist() == [-1, 0]  # its parent is gone: a root


def test_rollouts_are_frozen_down_to_their_mappings(rollouts):
    with pytest.raises(AttributeError):
        rollouts.lengths = rollouts.lengths
    with pytest.raises(TypeError):
        rollouts.signals["outcome"] = None
    assert "more" not in rollouts.with_signals(more=Signal(torch.zeros(1), "batch")).replace(signals={}).signals


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"logprobs": torch.zeros(3, 5)},
            r"logprobs has shape \[3, 5\] but action_mask has \[3, 4\]. Give one value per position",
        ),
        (
            {"truncated": torch.zeros(2).bool()},
            r"truncated has shape \[2\] but the batch has 3 rows. Give one value per row",
        ),
        ({"action_mask": torch.zeros(3, 4)}, r"action_mask must be a bool tensor"),
        (
            {"action_mask": torch.ones(3, 4).bool()},
            r"action_mask of row 1 is True beyond its length 3. Padding carries no credit",
        ),
        ({"group_ids": torch.tensor([0, 0, 2])}, r"group_ids must be dense, 0..n-1 with none left out; got 0..2"),
        ({"trajectory_ids": torch.tensor([0, 1, 0])}, r"a trajectory lies in two groups"),
        ({"lengths": torch.tensor([4, 3, 9])}, r"lengths must lie in 0..4; got 3..9"),
        ({"covers": "all"}, r"covers must be 'row', 'group' or 'batch'; got 'all'"),
        ({"meta": {"name": ["x"]}}, r"meta\['name'\] has 1 entries but the batch has 3 rows"),
        (
            {"signals": {"judge": Signal(torch.zeros(31, 2), "step")}},
            r"signals\['judge'\] has 31 values but spans\['step'\] has 4. Give one value per span; use NaN where nothing",
        ),
        (
            {"signals": {"x": Signal(torch.zeros(2), "trajectory")}},
            r"has 2 values but the batch has 3 of unit 'trajectory'",
        ),
        (
            {"signals": {"x": Signal(torch.zeros(3), "turn")}},
            r"has unit 'turn', which is neither a unit nor a span set",
        ),
        ({"signals": {"x": Signal(torch.zeros(3).long(), "trajectory")}}, r"Signals are floating point"),
        ({"signals": {"x": Signal(torch.zeros(3, 5), "token")}}, r"\[3, 5\] but action_mask has \[3, 4\]"),
        ({"spans": {"token": Spans.from_lists([[], [], []])}, "signals": {}}, r"spans cannot be named 'token'"),
        ({"spans": {"s": Spans.from_lists([[(0, 3), (2, 4)]])}, "signals": {}}, r"spans\['s'\] overlap in row 0"),
        (
            {"spans": {"s": Spans.from_lists([[], [(2, 4)]])}, "signals": {}},
            r"number 0 is \[2, 4\) but row 1 has 3 positions",
        ),
        (
            {"spans": {"s": Spans.from_lists([[], [], [], [(0, 1)]])}, "signals": {}},
            r"names row 3 but the batch has 3 rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(rollouts, changes, text):
    with pytest.raises(ValueError, match=text):
        rollouts.replace(**changes)


def test_lists_of_wrong_length_name_the_row():
    with pytest.raises(ValueError, match=r"logprobs of row 1 has 1 entries but the row has 2 tokens"):
        Rollouts.from_lists([[1], [2, 3]], [0, 0], logprobs=[[0.0], [0.0]])
    with pytest.raises(ValueError, match="the same number of critiques for every step"):
        Rollouts.from_lists([[1, 2]], [0], steps=[[(0, 1), (1, 2)]], judge=[[[0], [0, 1]]])


def test_an_empty_batch_is_legal():
    r = Rollouts.from_lists([], [])
    assert (r.batch, r.width, r.num_groups, r.num_trajectories) == (0, 0, 0, 0)


# ---- credit ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def credit(rollouts) -> Credit:
    parts = {
        "outcome": Signal(torch.tensor([2.0, -1.0, 0.0]), "trajectory"),
        "process": Signal(torch.tensor([1.0, -1.0, 0.5, 0.0]), "step"),
    }
    bare = Credit(torch.zeros(3, 4), rollouts.action_mask, parts)
    return Credit(bare.total(rollouts), rollouts.action_mask, parts)


def test_parts_add_up_inside_the_mask(rollouts, credit):
    assert credit.advantages.tolist() == [[0, 3, 1, 1], [-0.5, -0.5, -0.5, 0], [0, 0, 0, 0]]


def test_scaling_by_a_number_keeps_units_and_by_positions_moves_parts_there(rollouts, credit):
    doubled = credit.scaled(2.0, rollouts)
    assert doubled.parts["outcome"].unit == "trajectory"
    assert torch.equal(doubled.total(rollouts), credit.advantages * 2)
    factor = torch.arange(12.0).view(3, 4)
    scaled = credit.scaled(factor, rollouts)
    assert scaled.parts["outcome"].unit == "token"
    assert torch.equal(scaled.total(rollouts), credit.advantages * factor)


def test_replacing_adds_the_difference_as_a_part(rollouts, credit):
    clipped = credit.replaced(credit.advantages.clamp(max=1.0), "clip")
    assert clipped.parts["clip"].values[0].tolist() == [0, -2, 0, 0]
    assert torch.equal(clipped.total(rollouts), clipped.advantages)
    twice = clipped.replaced(clipped.advantages * 0, "clip")
    assert list(twice.parts) == ["outcome", "process", "clip", "clip'"]


def test_narrowing_takes_positions_out_of_the_mask_and_nan_outside_never_matters(rollouts, credit):
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[0, 0] = keep[0, 1] = True  # position 0 is no action: it stays out
    narrow = credit.narrowed(keep)
    assert narrow.mask.nonzero().tolist() == [[0, 1]]
    assert narrow.advantages.sum() == 3
    hostile = torch.where(narrow.mask, 1.0, NAN)
    assert narrow.scaled(hostile, rollouts).advantages.sum() == 3
    assert narrow.replaced(hostile, "x").advantages.sum() == 1
