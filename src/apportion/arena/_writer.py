"""A tiny transformer that writes worked sums, the demonstrations it learned from, and the program that reads them."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from apportion.train.models import user_cache
from apportion.train.packing import pack
from apportion.train.sampler import Sampling, sample, uniform_numbers
from apportion.types import Rollouts, Spans

ALPHABET = "0123456789=~.>$abcdefg"
"""One token each: digits, `=`, `~` note, `.` empty step, `>` answer, `$` end, letters for plus signs."""
EQUALS, NOTE, EMPTY, ANSWER, END, LETTER = range(10, 16)
_RECIPE = 1  # raise it when training changes, so that no cached writer of the old recipe is used
_RATE, _BATCH, _RAMP = 2e-3, 32, 50
_CLEAN, _FORGIVING, _HOLD = 0.25, 0.625, 0.6  # shares of the training
_ROWS = 1024  # rows that are sampled together


@dataclass(frozen=True)
class Lessons:
    """All that a writer depends on; the fields are the knobs of `Arithmetic` of the same names."""

    terms: int
    error_rate: float
    correction: float
    harmless: float
    padding: float
    hidden: int
    layers: int
    updates: int
    seed: int

    @property
    def limit(self) -> int:
        """Most tokens of a response."""
        return 8 * self.terms - 1  # each number summed, as many further steps and one, and the answer


# ---- problems ---------------------------------------------------------------------------------------------------------


def held_out(problems: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether a problem belongs to the test: by its number alone, about one in four does.

    Example:
        >>> held_out(torch.arange(8))
        tensor([ True, False, False,  True, False, False, False,  True])
    """
    return (problems * 0x9E3779B1 >> 15) % 4 == 0


def draw_problems(count: int, terms: int, generator: torch.Generator, *, test: bool) -> Int[Tensor, " N"]:
    """Numbers of random problems, all of the test or all of the training."""
    drawn = torch.randint(10**terms, (16 * count + 64,), generator=generator)
    return drawn[held_out(drawn) == test][:count]


def questions(problems: Int[Tensor, " N"], terms: int) -> Int[Tensor, "N P"]:
    """The tokens of each problem, all of one length.

    Example:
        >>> text(questions(torch.tensor([253, 7]), terms=3))
        ['3a5b2=', '7a0b0=']
    """
    numbers = problems[:, None] // 10 ** torch.arange(terms) % 10
    letters = LETTER + torch.arange(terms).expand_as(numbers)
    row = torch.stack([numbers, letters], 2).flatten(1)
    row[:, -1] = EQUALS
    return row


def _number(question: Int[Tensor, "N P"], step: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The number behind plus sign `step`; a sign that does not exist is the nearest one."""
    return question.gather(1, 2 * step.clamp(0, question.shape[1] // 2 - 2)[:, None] + 2)[:, 0]


def apply(value: Int[Tensor, " N"], question: Int[Tensor, "N P"], step: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The value plus that number, modulo 10."""
    return (value + _number(question, step)) % 10


def results(question: Int[Tensor, "N P"]) -> Int[Tensor, "N terms"]:
    """The first number, and the right value after each operation."""
    values = [question[:, 0]]
    for step in range(question.shape[1] // 2 - 1):
        values.append(apply(values[-1], question, torch.full_like(values[0], step)))
    return torch.stack(values, 1)


def text(tokens: Int[Tensor, "N T"]) -> list[str]:
    """As people read it."""
    return ["".join(ALPHABET[i] for i in row) for row in tokens.tolist()]


# ---- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What a program finds in responses.

    Args:
        outcome: 1 if the answer is right and properly ended, else 0, [B].
        ended: there is an answer with the end right behind it, [B].
        steps: four tokens each, an answer three. Positions count from the response's first token.
        wrong: each step, taken from where the one before it stands, [S].
        first: the first wrong step that is no note, [S].
        used: what follows rests on the step: it is neither a note nor empty, [S].
        decisive: digits of sums and of the answer, and letters that say a sum once more, [B, L].
    """

    outcome: Float[Tensor, " B"]
    ended: Bool[Tensor, " B"]
    steps: Spans
    wrong: Bool[Tensor, " S"]
    first: Bool[Tensor, " S"]
    used: Bool[Tensor, " S"]
    decisive: Bool[Tensor, "B L"]


def read(question: Int[Tensor, "B P"], tokens: Int[Tensor, "B L"], lengths: Int[Tensor, " B"]) -> Reading:
    """Read responses; whatever has no known form is a wrong step.

    Example:
        >>> question = questions(torch.tensor([253]), terms=3)  # 3a5b2=
        >>> response = torch.tensor([[ALPHABET.index(c) for c in "a357~7~4a358b820>0$"]])
        >>> found = read(question, response, torch.tensor([19]))
        >>> found.outcome, found.wrong, found.steps.to_lists(1)
        (tensor([1.]), tensor([ True, False, False, False, False]), [[(0, 4), (4, 8), (8, 12), (12, 16), (16, 19)]])
    """
    width, truth = tokens.shape[1], results(question)
    quads = pad(tokens, (0, -width % 4), value=END).unflatten(1, (-1, 4))
    begin = 4 * torch.arange(quads.shape[1])
    there = begin < lengths[:, None]
    value = before = truth[:, 0]
    done = torch.zeros_like(value)
    right, again, answers = [], [], []
    for start, quad in zip(begin.tolist(), quads.unbind(1), strict=True):
        mark, x, y, z = quad.unbind(1)
        step = mark - LETTER
        redone = (step == done - 1) & (step >= 0)
        origin = torch.where(redone, before, value)
        due = apply(origin, question, step)
        adds = (mark >= LETTER) & (z < 10)
        fits = adds & (redone | (step == done)) & (x == origin) & (y == _number(question, step)) & (z == due)
        fits |= (mark == NOTE) & (x == value) & (y == NOTE) & (z == 2 * value % 10)
        fits |= (mark == EMPTY) & (x == EMPTY) & (y == EMPTY) & (z == EMPTY)
        answer = (mark == ANSWER) & (x < 10) & (y == END) & (lengths == start + 3)
        right.append(fits | (answer & (done == truth.shape[1] - 1) & (x == value)))
        again.append(redone)
        answers.append(answer)
        before = torch.where(adds & ~redone, value, before)
        done, value = torch.where(adds, step + 1, done), torch.where(adds, z, value)
    answer = torch.stack(answers, 1)
    wrong = there & ~torch.stack(right, 1)
    vital = wrong & (quads[..., 0] != NOTE)
    sums = (quads[..., :1] >= LETTER) | (quads[..., :1] == ANSWER)
    decisive = (sums & (quads < 10)).index_put((torch.stack(again, 1), torch.tensor(0)), torch.tensor(True))
    row, index = there.nonzero(as_tuple=True)
    return Reading(
        outcome=(answer & (quads[..., 1] == truth[:, -1:])).any(1).float(),
        ended=answer.any(1),
        steps=Spans(row=row, start=begin[index], stop=torch.minimum(begin[index] + 4, lengths[row]), index=index),
        wrong=wrong[row, index],
        first=(vital & (vital.cumsum(1) == 1))[row, index],
        used=((quads[..., 0] != NOTE) & (quads[..., 0] != EMPTY))[row, index],
        decisive=decisive.flatten(1)[:, :width] & (torch.arange(width) < lengths[:, None]),
    )


# ---- demonstrations ---------------------------------------------------------------------------------------------------


def demonstrations(
    problems: Int[Tensor, " N"], lessons: Lessons, generator: torch.Generator
) -> tuple[Int[Tensor, "N T"], Int[Tensor, " N"], Bool[Tensor, "N T"]]:
    """Question and worked answer of each problem, their lengths, and which digits are wrong; too long ones are left out.

    Every pair of value and number has one wrong result that is shown instead of the right one. A quarter of the pairs are
    hard: their sums are wrong 2.8 times as often as `error_rate` says, the others 0.4 times. After a wrong sum everything
    goes on from its result, unless it is corrected at once.
    """
    habits = torch.Generator().manual_seed(17)
    often = torch.where(torch.randperm(100, generator=habits) < 25, 2.8, 0.4).view(10, 10)
    off = torch.randint(1, 10, (10, 10), generator=habits)
    question = questions(problems, lessons.terms)
    value, count = question[:, 0], len(problems)
    always, never = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    columns, kept, slips = [*question.unbind(1)], [always] * question.shape[1], [never] * question.shape[1]

    def chance(p: float | Tensor) -> Bool[Tensor, " N"]:
        return torch.rand(count, generator=generator) < p

    def put(step: Sequence[int | Tensor], where: Tensor = always, wrong: Tensor = never) -> None:
        columns.extend(torch.as_tensor(x).expand(count) for x in step)
        kept.extend([where] * len(step))
        slips.extend([*[never] * (len(step) - 1), wrong])

    for step in range(lessons.terms - 1):
        number = question[:, 2 * step + 2]
        right = (value + number) % 10
        wrong = chance((lessons.error_rate * often[value, number]).clamp(max=0.95))
        fixed = wrong & chance(lessons.correction)
        got = torch.where(wrong, right + off[value, number], right) % 10
        put([LETTER + step, value, number, got], wrong=wrong)
        put([LETTER + step, value, number, right], fixed)
        value = torch.where(fixed, right, got)
        slip = torch.where(chance(0.5), torch.randint(10, (count,), generator=generator), 0)
        put([NOTE, value, NOTE, (2 * value + slip) % 10], chance(lessons.harmless), slip > 0)
        put([EMPTY] * 4, chance(lessons.padding))
    put([ANSWER, value, END])
    keep = torch.stack(kept, 1)
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    lengths = keep.sum(1)
    fits = lengths <= question.shape[1] + lessons.limit
    width = int(lengths[fits].max())
    tokens, marks = (torch.stack(x, 1).gather(1, order)[fits, :width] for x in (columns, slips))
    return tokens, lengths[fits], marks & (torch.arange(width) < lengths[fits, None])


# ---- the model --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def writer(lessons: Lessons) -> Any:
    """The writer of these lessons, from the user's cache folder or trained now; not to be changed, see `copied`.

    Two processes may train the same one at the same time; the file of the later one replaces the other's whole.
    """
    model = _fresh(lessons)
    made = f"{lessons} {_RECIPE} {torch.__version__} {metadata.version('transformers')}"
    path = user_cache("arena") / f"writer-{hashlib.sha256(made.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    _train(model, lessons)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), whole)
    whole.replace(path)
    return model


def copied(model: Any) -> Any:
    """A copy that may be trained."""
    return deepcopy(model).requires_grad_(True)


def _fresh(lessons: Lessons) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=lessons.hidden,
        intermediate_size=2 * lessons.hidden,
        num_hidden_layers=lessons.layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(lessons.seed)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.enable_grad()  # type: ignore[untyped-decorator]
def _train(model: Any, lessons: Lessons) -> None:
    """Three lessons: sums without mistakes; mistakes to go on from and to put right, which are not to be written; all."""
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(lessons.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    prompt = 2 * lessons.terms
    for update in range(lessons.updates):
        done = update / lessons.updates
        clean, forgiving = done < _CLEAN, done < _FORGIVING
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (update + 1) / _RAMP, (1 - done) / (1 - _HOLD))
        problems = draw_problems(_BATCH, lessons.terms, generator, test=False)
        shown = replace(lessons, error_rate=0.0) if clean else lessons
        tokens, lengths, wrong = demonstrations(problems, shown, generator)
        beyond = torch.arange(tokens.shape[1]) >= lengths[:, None]
        goal = tokens.masked_fill(beyond | wrong if forgiving else beyond, -100)
        logits = model(input_ids=tokens[:, :-1], logits_to_keep=tokens.shape[1] - prompt).logits
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), goal[:, prompt:].flatten()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.requires_grad_(False)


# ---- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """Responses, padded with `$`; `statistics` are those of `signals.TOKEN_STATISTICS` that were asked for, [B, L]."""

    tokens: Int[Tensor, "B L"]
    lengths: Int[Tensor, " B"]
    logprobs: Float[Tensor, "B L"]
    statistics: Mapping[str, Float[Tensor, "B L"]]

    def select(self, rows: Int[Tensor, " R"]) -> "Written":
        """Some of them."""
        kept = {name: x[rows] for name, x in self.statistics.items()}
        return Written(self.tokens[rows], self.lengths[rows], self.logprobs[rows], kept)


def write(
    model: Any,
    begun: Int[Tensor, "N P"],
    copies: Sequence[int],
    limit: int,
    generator: torch.Generator,
    *,
    greedy: bool = False,
    statistics: Sequence[str] = (),
) -> Written:
    """So many responses to each beginning, of at most `limit` tokens."""
    sampling = Sampling(max_new_tokens=limit, temperature=0.0 if greedy else 1.0)
    uniform = uniform_numbers(sum(copies), sampling, generator)
    groups = sample(
        model,
        begun.tolist(),
        copies,
        sampling,
        uniform,
        end_ids=(END,),
        pad_id=END,
        statistics=statistics,
        batch_rows=_ROWS,
    )
    rows = [s for group in groups for s in group]

    def padded(lists: Iterable[list[Any]], fill: Any) -> Tensor:
        return torch.tensor([[*x, *[fill] * (limit - len(x))] for x in lists]).view(len(rows), limit)

    return Written(
        tokens=padded((s.tokens for s in rows), END),
        lengths=torch.tensor([len(s.tokens) for s in rows]),
        logprobs=padded((s.logprobs for s in rows), 0.0),
        statistics={name: padded((s.statistics[name] for s in rows), 0.0) for name in statistics},
    )


def states(model: Any, rollouts: Rollouts) -> Float[Tensor, "B L H"]:
    """The last hidden state before each token behind the prompt; those beyond a row's end mean nothing."""
    laid = pack(rollouts, pad_id=END)
    out = model.model(
        input_ids=laid.tokens, attention_mask=laid.block_mask(), position_ids=laid.positions, use_cache=False
    )
    prompt = int(rollouts.action_mask[0].to(torch.int8).argmax())
    found: Tensor = out.last_hidden_state.flatten(0, 1)[laid.home[:, prompt - 1 : -1]]
    return found
