"""Factors of steps by a function that a language model wrote (LaRe), run where it can be killed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from apportion.signals._process import Worker


class FactorFunction:
    r"""A function of states and actions that a language model wrote, run in a process that can be killed.

    The source defines `factors(states, actions)`: two arrays [batch, ...] in, a list of arrays of shape (batch, 1) out, one per
    factor. `numpy` and `math` are there (`np`), the usual parts of them; nothing else can be imported, no file or socket
    opened, no private name used. This fences code off, it does not prove it harmless: see the page.

    Source: LaRe, arXiv 2412.11120: candidates are verified by running them, and the error goes back to their author.

    Args:
        source: the code.
        seconds: limit of one call. memory: bytes it may take. output: largest reply in bytes.

    Example:
        >>> speed = FactorFunction("def factors(states, actions):\n    return [states[:, :1] * actions]")
        >>> speed(torch.tensor([[2.0, 9.0], [3.0, 9.0]]), torch.tensor([[1.0], [2.0]]))
        tensor([[2.],
                [6.]], dtype=torch.float64)
        >>> FactorFunction("def factors(states, actions):\n    return [states.sum()]").problem([[1.0]], [[1.0]])
        'ValueError: factor 0 must be an array of shape (batch, 1) = (1, 1); got float64'
    """

    def __init__(self, source: str, *, seconds: float = 5.0, memory: int = 1 << 29, output: int = 1 << 24) -> None:
        self.source = source
        target = f"{Path(__file__).with_name('_factors.py')}:factors"
        self._worker = Worker(target, seconds=seconds, memory=memory, output=output)

    def __call__(self, states: Any, actions: Any) -> Float[Tensor, "M D"]:
        """The factors of each state and action, [M, D].

        Raises:
            ValueError: the code failed, with the error's text.
        """
        reply = self._call(states, actions)
        if isinstance(reply, str):
            raise ValueError(f"the factor function failed: {reply}.")
        return reply

    def problem(self, states: Any, actions: Any) -> str | None:
        """What is wrong with it on these (random) states and actions, to be told to its author; None if nothing is."""
        reply = self._call(states, actions)
        return reply if isinstance(reply, str) else None

    def close(self) -> None:
        """End the process; a later call starts another."""
        self._worker.close()

    def _call(self, states: Any, actions: Any) -> Tensor | str:
        arrays = [np.asarray(torch.as_tensor(x, device="cpu"), dtype=np.float64) for x in (states, actions)]
        reply = self._worker(self.source, *arrays)
        if reply.status == "ok":
            return torch.tensor(reply.value, dtype=torch.float64)
        limits = {"time": "it took too long", "memory": "it took too much memory", "output": "it returned too much"}
        return str(reply.value) if reply.status == "raised" else limits.get(reply.status, "its process died")
