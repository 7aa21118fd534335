"""What k of the n responses to a problem would score: by the best of them (pass@k), and by their most frequent answer."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pass_at_k(outcomes: Float[Tensor, "P n"], k: int) -> Float[Tensor, " P"]:
    """The expected best outcome of k of the n responses to each problem, drawn without putting back.

    With the outcomes in ascending order, x_1 <= ... <= x_n:

        x_n - sum_{i<n} F_i (x_{i+1} - x_i)        F_i = C(i, k) / C(n, k) = prod_{m=i+1..n} max(0, 1 - k/m)

    F_i is the chance that all k are among the i worst. For outcomes of 0 and 1 with c ones this is pass@k,
    1 - C(n-c, k) / C(n, k), whose expectation over samples is exactly the chance that one of k responses is right.
    Nothing is rounded but the products: no binomial is formed, and a problem without a 1 gives 0.

    Source: arXiv 2107.03374, equation 1 and the product below it. Departs: outcomes between 0 and 1 count as they are.
    Laws: k = 1 is the mean, k = n the maximum; it does not fall with k.
    Degenerate: NaN (not measured) is left out; a problem with fewer than k measured responses gives NaN.
    Raises: ValueError if k is below 1.

    Example:
        >>> pass_at_k(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0]]), 2)  # 1 - 3/6; (3 * 1 + 2 * 0.5 + 0) / 6
        tensor([0.5000, 0.6667], dtype=torch.float64)
    """
    _check(k)
    x = outcomes.double().sort(dim=1).values  # NaN last
    n = (~x.isnan()).sum(1)
    m = torch.arange(1, x.shape[1] + 1, device=x.device)
    kept = torch.where(m <= n[:, None], (1 - k / m.double()).clamp(min=0), 1.0)
    below = kept[:, 1:].flip(1).cumprod(1).flip(1)
    lost = (below * x.diff(dim=1).nan_to_num(0.0)).sum(1)
    best = x.nan_to_num(-torch.inf).amax(1) if x.shape[1] else x.new_zeros(len(x))
    return torch.where(n >= k, best - lost, torch.nan)


def majority_at_k(outcomes: Float[Tensor, "P n"], answers: Int[Tensor, "P n"], k: int) -> Float[Tensor, " P"]:
    """The expected outcome of the most frequent answer of k of the n responses, drawn without putting back.

    Exact, over all C(n, k) draws: for each number of votes c that can win, the draws in which no answer has more than c
    are counted answer by answer, together with how many answers share the first place and what those are worth.

        sum_c sum_{t>=1} (1/t) * [sum over draws whose largest count is c, held by t answers, of the worth of the t] / C(n, k)

    An answer is worth the mean outcome of the responses that give it, and equal counts are broken by an even draw.

    Source: the vote of arXiv 2203.11171, averaged over all draws instead of one.
    Laws: k = 1 is the mean; so is k = 2 where every response votes, since two votes agree or tie.
    Degenerate: a negative answer means "none": it does not vote, and stands only if nobody drawn votes. NaN outcomes (not
    measured) are left out; a problem with fewer than k measured responses gives NaN.
    Raises: ValueError if k is below 1, or C(n, k) exceeds a float64 (beyond about n = 1000).

    Args:
        answers: equal numbers in a row mean equal answers; negative = no answer.

    Example: of the draws of 3 of the answers a, a, b, c, two hold both a's; in the other two all answers differ.
        >>> majority_at_k(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[0, 0, 1, 2]]), 3)  # (1 + 1 + 1/3 + 1/3) / 4
        tensor([0.6667], dtype=torch.float64)
    """
    _check(k)
    x, measured = outcomes.double(), ~outcomes.isnan()
    votes = measured & (answers >= 0)
    silent = measured & ~votes
    sizes, worth = _classes(x, answers, votes)
    choose = _binomials(x.shape[1], k, x.device)
    start = x.new_zeros(len(x), 2, 1, k + 1)  # axes: number of draws and their summed worth; ties; responses drawn
    start[:, 0, 0] = choose[silent.sum(1)]
    total = choose[silent.sum(1), k] * _mean(x, silent)
    for c in range(1, min(k, int(sizes.amax()) if sizes.numel() else 0) + 1):
        first = _first_places(start, sizes, worth, choose, c)[:, 1, 1:, k]
        total = total + (first / torch.arange(1, first.shape[1] + 1, device=x.device)).sum(1)
    n = measured.sum(1)
    return torch.where(n >= k, total / choose[n, k].clamp(min=1), torch.nan)


def _first_places(start: Tensor, sizes: Tensor, worth: Tensor, choose: Tensor, c: int) -> Tensor:
    """Draws in which no answer has more than c votes, by how many have c, and the summed worth of those: [P, 2, t, k]."""
    k = start.shape[3] - 1
    table = torch.cat([start, start.new_zeros(len(start), 2, k // c, k + 1)], 2)
    for size, value in zip(sizes.T, worth.T, strict=True):
        most = int(size.amax())
        grown = table.clone()  # the answer is given 0 times; then 1, 2, ... but fewer than c times; then c times
        for votes in range(1, min(c - 1, most) + 1):
            grown[..., votes:] += choose[size, votes][:, None, None, None] * table[..., :-votes]
        if c <= most:
            at = choose[size, c][:, None, None, None] * table[:, :, :-1, : k + 1 - c]
            grown[:, 0, 1:, c:] += at[:, 0]
            grown[:, 1, 1:, c:] += at[:, 1] + value[:, None, None] * at[:, 0]
        table = grown
    return table


def _classes(x: Tensor, answers: Tensor, votes: Tensor) -> tuple[Tensor, Tensor]:
    """How many responses give each different answer, and their mean outcome: [P, answers], padded with empty ones."""
    same = (answers[:, :, None] == answers[:, None, :]) & votes[:, :, None] & votes[:, None, :]
    size = same.sum(2)
    worth = (same * x.nan_to_num(0.0)[:, None]).sum(2) / size.clamp(min=1)
    repeated = same.tril(-1).any(2)
    size, order = torch.where(repeated, 0, size).sort(dim=1, descending=True)
    most = int((size > 0).sum(1).amax()) if size.numel() else 0
    return size[:, :most], worth.gather(1, order)[:, :most]


def _binomials(n: int, k: int, device: torch.device) -> Tensor:
    """C(i, j) for i up to n and j up to k, by Pascal's rule: exact up to 2^53."""
    rows = [torch.eye(1, k + 1, dtype=torch.float64, device=device)[0]]
    for _ in range(n):
        rows.append(rows[-1] + torch.cat([rows[-1].new_zeros(1), rows[-1][:-1]]))
    table = torch.stack(rows)
    if not bool(table.isfinite().all()):
        raise ValueError(f"majority_at_k needs C(n, k) within float64; got n = {n}, k = {k}. Use fewer responses.")
    return table


def _mean(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, 0.0).sum(1) / where.sum(1).clamp(min=1)


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"k responses need k of at least 1; got {k}.")
