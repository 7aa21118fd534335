"""Laws that every exported method keeps, on random ragged batches; those a method declares are held against it."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Signal, credit
from laws.every import EXPORTED, METHODS, SEEDS, SETTINGS, TRANSFORMED, alone, batch_for, methods, quiet, same, size
from reference.batches import padded, random_batch, with_outcome

tried = settings(max_examples=6, deadline=None)


@methods
@given(seed=SEEDS)
@tried
def test_zero_outside_the_mask_finite_and_adding_up(method, seed):
    for dtype in (torch.float64, torch.float32):
        r = batch_for(method, seed, dtype=dtype)
        c = method(r)
        assert c.advantages.dtype == dtype
        assert c.advantages.shape == c.mask.shape == r.action_mask.shape
        assert not (c.mask & ~r.action_mask).any()
        assert (c.advantages[~c.mask] == 0).all()
        assert c.advantages.isfinite().all()
        assert c.returns is None or (c.returns.isfinite().all() and c.returns.dtype == dtype)
        same(c.total(r), c.advantages, size(c, r) * (1e-12 if dtype == torch.float64 else 2e-6))
        assert all(isinstance(v, float) for v in c.notes.values())
        for name, part in c.parts.items():
            r.with_signals(**{name: part})


@methods
@given(seed=SEEDS)
@tried
def test_float32_agrees_with_float64(method, seed):
    wide = batch_for(method, seed, dtype=torch.float32)
    c = method(wide)
    doubled = wide._map_tensors(lambda x: x.double() if x.is_floating_point() else x)
    same(c.advantages.double(), method(doubled).advantages, 2e-6)


@methods
@given(seed=SEEDS, turn=st.randoms(use_true_random=False))
@tried
def test_the_order_of_rows_is_irrelevant(method, seed, turn):
    r = batch_for(method, seed)
    order = list(range(r.batch))
    turn.shuffle(order)
    rows = torch.tensor(order)
    c, turned = method(r), method(r.select(rows, covers="batch"))
    same(turned.advantages, c.advantages[rows])
    assert (turned.mask == c.mask[rows]).all()


@methods
@given(seed=SEEDS, more=st.integers(1, 5))
@tried
def test_padding_is_irrelevant(method, seed, more):
    r = batch_for(method, seed)
    c, longer = method(r), method(padded(r, more))
    same(longer.advantages[:, : r.width], c.advantages)
    assert not longer.mask[:, r.width :].any()


@methods
@given(seed=SEEDS)
@tried
def test_what_lies_outside_the_scope_is_irrelevant(method, seed):
    """The credit of a group (of a trajectory, for scope "row") is the same without the rest of the batch."""
    r = batch_for(method, seed)
    if method.scope == "batch":
        words = ("whiten(", "batch_std", "gpg", "penalise_certainty", "weigh_by_duration")
        assert any(word in repr(method) for word in words), "why would it need the whole batch?"
        return
    c, ids = method(r), r.group_ids if method.scope == "group" else r.trajectory_ids
    for one in ids.unique():
        rows = (ids == one).nonzero()[:, 0]
        same(method(r.select(rows, covers=method.scope)).advantages, c.advantages[rows])


@methods
@given(seed=SEEDS, by=st.sampled_from([-3.0, 0.3, 7.0]))
@tried
def test_a_shift_of_the_outcomes(method, seed, by):
    r = batch_for(method, seed)
    shifted = with_outcome(r, r.signals["outcome"].values + by)
    c, moved = method(r), method(shifted)
    if "shift" in method.laws:
        same(moved.advantages, c.advantages, 1e-6)
    if "additive" in method.laws:
        difference = (moved.advantages - c.advantages)[c.mask]
        assert not len(difference) or difference.max() - difference.min() < 1e-9
    assert set(method.laws) <= {"shift", "additive", "equal", "linear", "scale"}


@methods
@given(seed=SEEDS, by=st.sampled_from([0.25, 3.0, 50.0]))
@tried
def test_a_scale_of_the_outcomes(method, seed, by):
    """With nothing else measured, advantages grow with the outcomes ("linear") or stay as they are ("scale")."""
    if not {"linear", "scale"} & set(method.laws):
        return
    r = batch_for(method, seed)
    r = with_outcome(quiet(r), r.signals["outcome"].values)
    c, more = method(r), method(with_outcome(r, r.signals["outcome"].values * by))
    if "linear" in method.laws:
        same(more.advantages, c.advantages * by, 1e-6 * max(1.0, by))
    else:
        same(more.advantages, c.advantages, 1e-3)


@methods
@given(seed=SEEDS, value=st.sampled_from([0.99, 0.1, 1 / 3, 1.0, 0.0]))
@tried
def test_equal_outcomes(method, seed, value):
    """Always finite; exactly nothing where the method declares it and nothing else was measured."""
    for dtype in (torch.float64, torch.float32):
        r = batch_for(method, seed, unmeasured=False, dtype=dtype)
        r = with_outcome(r, torch.full_like(r.signals["outcome"].values, value))
        assert method(r).advantages.isfinite().all()
        if "equal" in method.laws:
            assert (method(with_outcome(quiet(r), r.signals["outcome"].values)).advantages == 0).all()


@methods
@given(seed=SEEDS)
@tried
def test_nothing_measured(method, seed):
    r = batch_for(method, seed)
    blank = {k: replace(v, values=torch.full_like(v.values, torch.nan)) for k, v in r.signals.items()}
    c = method(r.replace(signals=blank))
    assert c.advantages.isfinite().all()
    if "signals.outcome" in method.requires:
        assert not c.mask.any() or "unmeasured='process'" in repr(method)
        assert (c.advantages == 0).all() or c.mask.any()


@methods
@given(seed=SEEDS)
@tried
def test_an_unmeasured_trajectory_is_as_if_it_were_not_there(method, seed):
    r = batch_for(method, seed)
    if "signals.outcome" not in method.requires or "unmeasured='process'" in repr(method):
        return
    gone = r.signals["outcome"].values.isnan()[r.trajectory_ids]
    c = method(r)
    assert not c.mask[gone].any()
    rows = (~gone).nonzero()[:, 0]
    if "horizon" in repr(method) or method.name == "process_min":
        return  # the longest response of the group sets N
    same(method(r.select(rows, covers="batch")).advantages, c.advantages[rows])


@methods
@given(seed=SEEDS)
@tried
def test_inputs_stay_and_the_same_input_gives_the_same_bits(method, seed):
    r = batch_for(method, seed)
    before = {f.name: getattr(r, f.name) for f in fields(r)} | {k: v.values for k, v in r.signals.items()}
    tensors = {k: v for k, v in before.items() if isinstance(v, torch.Tensor)}
    copies = {k: v.clone() for k, v in tensors.items()}
    c, again = method(r), method(r)
    assert torch.equal(c.advantages, again.advantages)
    for name, copy in copies.items():
        torch.testing.assert_close(tensors[name], copy, rtol=0, atol=0, equal_nan=True)


@methods
def test_the_printed_form_makes_an_equal_method(method):
    typed = eval(repr(method), {"__builtins__": {}}, EXPORTED)
    assert typed == method
    assert repr(typed) == repr(method)
    assert (typed.requires, typed.scope, typed.needs_group_of) == (method.requires, method.scope, method.needs_group_of)


@methods
def test_a_missing_field_is_named(method):
    r = batch_for(method, 5)
    for needed in method.requires:
        kind, key, column = (*needed.split("."), "", "")[:3]
        if column:
            poorer = r.with_spans(**{key: replace(r.spans[key], **{column: None})})
        elif kind == "spans":
            signals = {k: v for k, v in r.signals.items() if v.unit != key}
            poorer = r.replace(spans={k: v for k, v in r.spans.items() if k != key}, signals=signals)
        else:
            held = getattr(r, kind)
            poorer = r.replace(**{kind: {k: v for k, v in held.items() if k != key} if key else None})
        with pytest.raises(ValueError, match=r"needs rollouts\.\w+.*, which this batch lacks.*\. \w+") as error:
            method(poorer)
        assert kind in str(error.value)


@methods
def test_a_narrower_slice_is_refused(method):
    r = batch_for(method, 5)
    covers = ("row", "group", "batch")
    for narrower in covers[: covers.index(method.scope)]:
        with pytest.raises(ValueError, match=f"but this slice covers only the {narrower}"):
            method(r.replace(covers=narrower))


@methods
def test_empty_batches(method):
    r = batch_for(method, 5)
    nothing = r.select(torch.zeros(0, dtype=torch.int64), covers="batch")
    assert method(nothing).advantages.shape[0] == 0
    silent = r.replace(action_mask=torch.zeros_like(r.action_mask))
    c = method(silent)
    assert not c.mask.any()
    assert (c.advantages == 0).all()


@methods
def test_the_smallest_group_that_can_speak(method):
    """With groups of one, a method that needs two says nothing."""
    spoken = False
    for seed in range(4):
        r = alone(batch_for(method, seed, unmeasured=False))
        spoken |= bool((method(r).advantages != 0).any())
    if method.name == "add":
        assert method.needs_group_of == 2, "of its terms, grpo and capo would be silent"
    elif "penalise_certainty" in repr(method) and "skip_zero_groups=True" not in repr(method):
        assert spoken, "the penalty speaks where the rewards are silent"
    else:
        assert spoken == (method.needs_group_of == 1)


def test_every_exported_method_is_held_to_the_laws():
    names = {n for n in credit.__all__ if hasattr(EXPORTED[n], "role")}
    held = set(METHODS) | {n.rpartition(" ")[2] for n in TRANSFORMED}
    assert held == names
    assert {"chain", "add", "partition"} <= {repr(e).partition("(")[0] for e in SETTINGS}


def test_declared_laws_are_those_of_the_papers():
    for name in ("grpo", "dr_grpo", "rloo", "capo", "tempo"):
        assert set(METHODS[name].laws) == {"shift", "equal"}, name
    assert METHODS["pure"].laws == ("shift",)
    for name in ("nsr", "psr", "w_reinforce", "gae", "tp_grpo"):
        assert METHODS[name].laws == (), name
    assert set(METHODS["oprl"].laws) == {"shift", "equal", "scale"}
    assert (METHODS["gigpo"].laws, METHODS["calm"].laws) == (("scale",), ("linear",))
    assert METHODS["vapo"].laws == METHODS["ma_rlhf"].laws == ()
    assert set(METHODS["returns_to_go"].laws) == {"additive", "linear"}
    assert METHODS["optimal_token_baseline"].laws == ("linear",)
    assert set(METHODS["process_implicit"].laws) == {"shift", "equal", "linear"}
    assert (METHODS["ucas"].laws, METHODS["mle_agents"].laws) == (("shift",), ())
    assert (set(METHODS["hicra"].laws), set(METHODS["attention_rhythm"].laws)) == ({"shift", "equal"},) * 2
    assert METHODS["clip_delta"].laws == ("additive", "linear")


def test_signal_units_of_the_parts():
    r = random_batch(3)
    units = {n: {k: v.unit for k, v in m(r).parts.items()} for n, m in METHODS.items()}
    assert units["capo"] == {"outcome": "trajectory", "judge": "step", "baseline": "group"}
    assert units["pure"] == {"outcome": "trajectory", "process": "token", "baseline": "trajectory"}
    assert units["tempo"] == {"outcome": "trajectory", "branch": "token"}
    assert units["gae"] == {"outcome": "token", "values": "token"}
    assert units["gigpo"] == {"turn_reward": "trajectory", "state": "turn"}
    assert units["oprl"] == {"outcome": "trajectory", "log_ratio": "turn"}
    assert units["calm"] == {"turn_reward": "turn", "subgoal": "turn"}
    assert units["tp_grpo"] == {"outcome": "trajectory", "label": "step"}
    assert units["ma_rlhf"] == {"outcome": "macro", "kl": "macro", "values": "macro"}
    assert units["reinforce_plus_plus"] == {"outcome": "trajectory", "baseline": "batch"}
    assert units["prime"] == {"outcome": "trajectory", "log_ratio": "token", "baseline": "batch"}
    assert units["ucas"] == {"outcome": "token", "certainty": "token"}
    assert units["hicra"] == {"outcome": "trajectory", "planning": "token"}
    assert units["clip_delta"] == {"outcome": "trajectory", "process": "token"}
    assert isinstance(METHODS["grpo"](r).parts["outcome"], Signal)
