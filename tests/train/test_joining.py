"""Several batches as one: groups, trajectories, spans and signals stay what they were."""

import pytest
import torch

from apportion import Rollouts, Signal, Spans
from apportion.credit import capo, gae, grpo
from apportion.train.joining import joined


def batch(tokens, groups, outcome, **more):
    return Rollouts.from_lists(tokens, groups, outcome=outcome, truncated=[False] * len(tokens), **more)


def test_the_credit_of_joined_batches_is_that_of_each():
    a = batch([[1, 2], [3]], [0, 0], [1.0, 0.0], steps=[[(0, 1), (1, 2)], [(0, 1)]], judge=[[[0.0], [1.0]], [[1.0]]])
    b = batch([[4, 5, 6], [7]], [0, 0], [0.0, 1.0], steps=[[(0, 3)], []], judge=[[[1.0]], []])
    both = joined([a, b])
    assert both.group_ids.tolist() == [0, 0, 1, 1]
    assert both.trajectory_ids.tolist() == [0, 1, 2, 3]
    assert both.lengths.tolist() == [2, 1, 3, 1]
    assert both.spans["step"].row.tolist() == [0, 0, 1, 2]
    for method in (grpo(), capo()):
        advantages = method(both).advantages
        assert torch.equal(advantages[:2, :2], method(a).advantages)
        assert torch.equal(advantages[2:], method(b).advantages)


def test_token_signals_and_values_are_widened_with_what_counts_as_absent():
    signal = {"signals": {"entropy": Signal(torch.tensor([[0.5]]), "token")}}
    wide = {"signals": {"entropy": Signal(torch.tensor([[0.25, 0.75]]), "token")}}
    both = joined(
        [batch([[1]], [0], [1.0], values=[[0.5]], **signal), batch([[2, 3]], [0], [1.0], values=[[1, 2]], **wide)]
    )
    entropy = both.signals["entropy"].values
    assert entropy[1].tolist() == [0.25, 0.75]
    assert entropy[0, 0] == 0.5
    assert entropy[0, 1].isnan()
    assert both.values.tolist() == [[0.5, 0.0], [1.0, 2.0]]
    assert gae(lam=1.0)(both).advantages[0].tolist() == [0.5, 0.0]


def test_parents_of_spans_move_with_them_and_roots_stay_roots():
    def tree(parent):
        columns = [torch.tensor(x) for x in ([0, 0], [0, 1], [1, 2], [0, 1])]
        return Spans(*columns, parent=torch.tensor(parent))

    parts = [batch([[1, 2]], [0], [1.0], spans={"branch": tree([-1, 0])}) for _ in range(2)]
    assert joined(parts).spans["branch"].parent.tolist() == [-1, 0, -1, 2]


def test_states_that_one_batch_does_not_know_match_nothing():
    def turns(state):
        columns = [torch.tensor(x) for x in ([0, 1], [0, 0], [1, 1], [0, 0])]
        return Spans(*columns, state=state)

    parts = [batch([[1], [2]], [0, 0], [1.0, 0.0], spans={"turn": turns(s)}) for s in (torch.tensor([7, 7]), None)]
    first, second = joined(parts).spans["turn"].state.view(2, 2).tolist()
    assert first == [7, 7]
    assert second[0] != second[1]
    assert joined(parts[1:] * 2).spans["turn"].state is None


def test_one_batch_is_itself():
    a = batch([[1]], [0], [1.0])
    assert joined([a]) is a


def test_what_only_some_batches_have_is_refused():
    a, b = batch([[1]], [0], [1.0]), batch([[1]], [0], [1.0], values=[[0.0]])
    with pytest.raises(ValueError, match=r"some batches have values and others lack it"):
        joined([a, b])
    with pytest.raises(ValueError, match=r"the signals of the batches differ"):
        joined([a, a.with_signals(more=Signal(torch.zeros(1), "group"))])
    coef = Signal(torch.zeros(1), "batch")
    with pytest.raises(ValueError, match=r"signal 'coef' has the units \['batch', 'batch'\], which cannot be joined"):
        joined([a.with_signals(coef=coef)] * 2)
