"""A training step that torch compiles may contain credit. Not run with shapes checked: the checker cannot be compiled."""

import pytest
import torch

from laws.every import EVERY, batch_for, same


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler, about what it leaves uncompiled
@pytest.mark.parametrize("name", ["grpo", "capo", "gae", "tempo", "gigpo", "branch_grpo", "ucas"])
def test_a_compiled_step_may_contain_credit(name):
    method, r = EVERY[name], batch_for(EVERY[name], 7)
    weighted = torch.compile(lambda batch, logprobs: -(method(batch).advantages * logprobs).sum(), backend="eager")
    logprobs = torch.full(r.action_mask.shape, -1.0, dtype=torch.float64, requires_grad=True)
    loss = weighted(r, logprobs)
    loss.backward()
    same(logprobs.grad, -method(r).advantages, 1e-12)
    same(loss, method(r).advantages.sum(), 1e-9)
