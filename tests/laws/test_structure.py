"""Laws about the shape of a batch, devices and torch itself, over the same methods as the other laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from apportion import chain, credit, gae
from laws.every import EVERY, SEEDS, TRANSFORMS, batch_for, methods, same
from reference.derived import joined, with_twin, without_measurements_of

BY_ROW = ("observations='count'", "observations='valued'", "observations='reset'", "align='position'")
few = settings(max_examples=4, deadline=None)
FACTORIES = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.tensor, torch.linspace, torch.eye}


@methods
@given(seed=SEEDS)
@few
def test_rows_of_a_trajectory_may_be_one_row(method, seed):
    if method.name == "potential" or any(word in repr(method) for word in BY_ROW):
        return  # what lies between actions counts there, but not what a later row begins with
    r = batch_for(method, seed)
    whole, row, place = joined(r)
    c, one = method(r), method(whole)
    same(torch.where(r.action_mask, one.advantages[row, place], 0.0), c.advantages)
    assert (one.mask[row, place] == c.mask)[r.action_mask].all()


@methods
@given(seed=SEEDS)
@few
def test_what_is_not_measured_harms_no_other_group(method, seed):
    r = batch_for(method, seed)
    harmed = method(without_measurements_of(r, 0))
    assert harmed.advantages.isfinite().all()
    others = r.group_ids != r.trajectory_groups[0]
    if method.scope != "batch":
        same(harmed.advantages[others], method(r).advantages[others], 1e-12)


@methods
@given(seed=SEEDS)
@few
def test_equal_responses_get_equal_credit(method, seed):
    if "spans.branch.parent" in method.requires:
        return  # others may continue the first of the two and not its twin
    r, rows = with_twin(batch_for(method, seed), 0)
    c = method(r)
    twins = torch.arange(r.batch - len(rows), r.batch)
    same(c.advantages[twins], c.advantages[rows])
    assert (c.mask[twins] == c.mask[rows]).all()


class EveryTensorNamesItsDevice(TorchFunctionMode):
    """Stands in for a GPU: a tensor made without a device would be on the CPU, and meet the batch's on another."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in FACTORIES or kwargs.get("device") is not None, f"torch.{func.__name__} without device"
        return func(*args, **kwargs)


@methods
def test_every_tensor_is_made_on_the_device_of_the_batch(method):
    r = batch_for(method, 7)
    with EveryTensorNamesItsDevice():
        method(r)


def test_the_look_at_devices_sees_something():
    with pytest.raises(AssertionError, match=r"torch.zeros without device"), EveryTensorNamesItsDevice():
        torch.zeros(2)


@methods
def test_credit_is_a_constant_of_the_loss(method):
    """Inputs that carry a gradient, such as the values of a critic in training, do no harm and get none."""
    r = batch_for(method, 7)
    c = method(r._map_tensors(lambda x: x.requires_grad_() if x.is_floating_point() else x))
    assert not c.advantages.requires_grad
    same(c.advantages, method(batch_for(method, 7)).advantages, 1e-12)
    with torch.inference_mode():
        same(method(r).advantages, c.advantages, 1e-12)


@pytest.mark.parametrize("name", TRANSFORMS)
@given(seed=SEEDS, gamma=st.sampled_from([1.0, 0.9]))
@few
def test_transforms_leave_the_returns_of_a_critic_alone(name, seed, gamma):
    r = batch_for(EVERY["gae"], seed)
    first = gae(gamma=gamma)
    assert torch.equal(chain(first, getattr(credit, name)())(r).returns, first(r).returns)
