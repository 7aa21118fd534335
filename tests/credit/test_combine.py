import pytest
import torch

from apportion import (
    Rollouts,
    Spans,
    add,
    chain,
    clip,
    dr_grpo,
    gae,
    grpo,
    nsr,
    partition,
    process_min,
    scale_by_sign,
    signed_outcome,
    tempo,
    whiten,
)

NAN = float("nan")


def halves(outcome=(1.0, 0.0)) -> Rollouts:
    spans = {
        "think": Spans.from_lists([[(0, 1)], [(0, 2)]]),
        "answer": Spans.from_lists([[(1, 2)], [(2, 3)]]),
        "late": Spans.from_lists([[(1, 3)], []]),
    }
    return Rollouts.from_lists([[1, 2, 3], [1, 2, 3]], [0, 0], outcome=list(outcome), spans=spans)


def test_chain_joins_what_its_members_need():
    both = chain(gae(kl_coef=0.1), whiten(), clip(limit=3.0))
    assert both.requires == ("values", "signals.outcome", "logprobs", "ref_logprobs")
    assert both.scope == "batch"
    assert chain(signed_outcome(), whiten(over="group")).scope == "group"
    assert chain(signed_outcome(), whiten(over="group")).needs_group_of == 2
    assert chain(chain(signed_outcome(), clip()), whiten()).scope == "batch"


def test_add_weighs_and_names_its_terms():
    credit = add((1.0, dr_grpo()), (0.5, signed_outcome()))(halves())
    assert credit.advantages.tolist() == [[1.0] * 3, [-1.0] * 3]
    assert list(credit.parts) == ["group_relative.outcome", "signed_outcome.outcome"]
    assert credit.notes["signed_outcome.right"] == 0.5


def test_add_of_the_same_method_twice_keeps_both():
    credit = add((1.0, grpo()), (1.0, dr_grpo()))(halves())
    assert list(credit.parts) == ["group_relative.outcome", "group_relative2.outcome"]


def test_add_unites_masks_and_a_term_gives_nothing_outside_its_own():
    """NSR leaves the right response out; there only the other term speaks."""
    r = halves()
    credit = add((1.0, nsr()), (2.0, signed_outcome(outcome="outcome")))(r)
    assert credit.advantages.tolist() == [[2.0] * 3, [-3.0] * 3]
    assert credit.mask.all()
    assert (credit.total(r) == credit.advantages).all()


def test_add_takes_one_critic():
    r = Rollouts.from_lists([[1]], [0], outcome=[1], values=[[0.5]])
    credit = add((0.5, gae()), (1.0, signed_outcome()))(r)
    assert credit.returns.tolist() == [[1.0]], "a weight scales the advantage, not the critic's target"
    with pytest.raises(
        ValueError, match=r"add got returns from 2 terms, but a critic has one target\. Keep one critic"
    ):
        add((1.0, gae()), (1.0, gae(lam=1.0)))(r)


def test_partition_gives_each_span_set_its_own_method():
    r = halves()
    credit = partition({"think": signed_outcome(high=7.0), "answer": dr_grpo()})(r)
    assert credit.advantages.tolist() == [[7.0, 0.5, 0.0], [-1.0, -1.0, -0.5]]
    assert credit.mask.tolist() == [[True, True, False], [True, True, True]]
    assert (credit.total(r) == credit.advantages).all()
    assert list(credit.parts) == ["think.outcome", "answer.outcome"]


def test_partition_refuses_overlap():
    with pytest.raises(ValueError, match="disjoint spans, but 'answer' and 'late' overlap"):
        partition({"think": grpo(), "answer": grpo(), "late": grpo()})(halves())


def test_rounding_happens_once():
    """In float32 the sum 1/3 + (-1/3 rounded) would leave a rest; computed in float64 it is 0."""
    r = Rollouts.from_lists([[1], [1], [1]], [0] * 3, outcome=[1.0, 0.0, 0.0])
    assert (add((1.0, dr_grpo()), (-1.0, dr_grpo()))(r).advantages == 0).all()
    assert dr_grpo(r).advantages.dtype == torch.float32


def test_laws_of_compositions():
    assert set(chain(grpo(), clip()).laws) == {"shift", "equal"}
    assert set(add((1.0, grpo()), (1.0, tempo())).laws) == {"shift", "equal"}
    assert add((1.0, grpo()), (1.0, process_min())).laws == ("shift",)
    assert add((1.0, grpo()), (1.0, nsr())).laws == ()
    assert chain(signed_outcome(), scale_by_sign(), whiten()).laws == ()
