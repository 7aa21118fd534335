"""Written arithmetic: a tiny transformer works sums out step by step, and a program knows which step is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.arena._continuations import Trie, Values, node_values
from apportion.arena._episodes import Cost, Episodes
from apportion.arena._measuring import COSTS, thought_label, verdicts
from apportion.arena._writer import (
    ALPHABET,
    END,
    Lessons,
    Reading,
    Written,
    copied,
    draw_problems,
    questions,
    read,
    states,
    write,
    writer,
)
from apportion.signals import TOKEN_STATISTICS, AttentionRhythm, fixed_ngrams, token_statistics
from apportion.types import Rollouts, Signal

_SPARE = 16  # further rollouts for each prompt, for `Episodes.gradient` alone
_TESTED = 128  # problems on which a student is evaluated
_MACRO = 5  # tokens of a macro action


@dataclass(frozen=True)
class Arithmetic:
    """Sums of one-digit numbers modulo 10, worked by a small transformer that learned from demonstrations with mistakes.

    The prompt `3a5b2c9=` has letters for plus signs. A response such as `a358b820~0~1b820....c099>9$` is made of steps of
    four tokens: a sum (`a358`: a, 3 + 5 = 8), the same sum once more, to correct it (the second `b820`), a note of what
    twice the value is (`~0~1`), an empty step (`....`). The answer and the end, `>9$`, are one step. The outcome is 1 if
    the answer is right and the end follows at once.

    The program that finds wrong steps takes each from where the one before it stands: what follows a mistake may be
    right. `Episodes.mistake` is the first wrong step that is no note: nothing depends on notes, but judges mark them.
    Decisive are the digits of sums and of the answer, and letters that begin a correction. The first token of each step
    is marked as planning: it says what to do next.

    V is estimated by continuations (`_continuations.py`); `Episodes.errors` says how well. The critic's V is off by a
    normal number that belongs to the prefix. Gradients are those of the output layer. `Episodes.gradient` is the mean of
    `sum over positions and choices of pi A d log pi` over all rollouts for the prompt but the group's own, with 16 that
    are sampled for it alone. It shares no rollout with the group it is held against, and is itself an estimate, which
    lowers `cosine` and `aim` for all methods alike: with the defaults and 208 groups of 8, the exact advantage has an aim
    of 0.99 rather than 1.

    Episodes answer `prompts` problems that were held out from the writer's training. Students are trained on others.

    Args:
        terms: numbers in a sum.
        error_rate: how often a sum of the demonstrations was wrong: 2.8 times that for a quarter of the pairs of digits,
            0.4 times for the others, and each pair always in the same way.
        correction: how often such a sum was put right at once.
        harmless: how often a note followed; half of the notes had a random digit.
        padding: how often an empty step followed.
        prompts: how many problems.
        verifier_error: chance that the verifier says the opposite of the truth.
        verdict_error: chance that a verdict about a step is the opposite of the truth.
        critic_error: deviation of the critic's V from the exact one.
        continuations: how many estimate V, for each unit of probability that no rollout covers.
        hidden, layers: size of the transformer.
        updates: of its training.
        seed: of its weights and demonstrations.
    """

    terms: int = 4
    error_rate: float = 0.3
    correction: float = 0.5
    harmless: float = 0.15
    padding: float = 0.15
    prompts: int = 12
    verifier_error: float = 0.0
    verdict_error: float = 0.1
    critic_error: float = 0.1
    continuations: int = 32
    hidden: int = 128
    layers: int = 3
    updates: int = 800
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.terms <= len(ALPHABET) - END:
            raise ValueError(
                f"Arithmetic needs 2 to {len(ALPHABET) - END} terms; got {self.terms}. A plus sign is a letter."
            )
        for name in ("prompts", "continuations", "hidden", "layers", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"Arithmetic needs {name} to be at least 1; got {getattr(self, name)}. Raise {name}.")
        for name in ("error_rate", "correction", "harmless", "padding", "verifier_error", "verdict_error"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Arithmetic needs {name} between 0 and 1, a chance; got {getattr(self, name)}.")

    @property
    def lessons(self) -> Lessons:
        """What the writer depends on."""
        return Lessons(**{f.name: getattr(self, f.name) for f in fields(Lessons)})

    @property
    def questions(self) -> Int[Tensor, "K P"]:
        """The prompts of the episodes."""
        return self._drawn(self.prompts, 17, test=True)

    def _drawn(self, count: int, seed: int, *, test: bool) -> Int[Tensor, "N P"]:
        generator = torch.Generator().manual_seed(seed)
        return questions(draw_problems(count, self.terms, generator, test=test), self.terms)

    # ---- episodes -----------------------------------------------------------------------------------------------------

    def episodes(self, groups: int, size: int, seed: int) -> Episodes:
        """As `World.episodes`."""
        plain = replace(self, verifier_error=0.0, verdict_error=0.0, critic_error=0.0)
        truth, generator = _truth(plain, groups, size, seed), torch.Generator().manual_seed(seed + 1)
        prompts = torch.arange(groups) % self.prompts
        rollouts = truth.rollouts.with_signals(**self._verified(truth.rollouts, truth.reading, generator))
        critic = truth.values + self.critic_error * truth.noise
        return Episodes(
            rollouts=rollouts.replace(values=torch.where(rollouts.action_mask, critic, 0.0)),
            advantages=truth.advantages,
            errors=truth.errors,
            decisive=_placed(rollouts, truth.reading.decisive),
            mistake=_first_mistake(rollouts, truth.reading),
            pairs=truth.pairs,
            prompts=prompts,
            gradients=truth.gradients,
            gradient=truth.gradient,
            costs={
                **COSTS,
                "signals.waad": Cost(passes=1),
                "signals.fai": Cost(passes=1),
                "signals.greedy_outcome": Cost(tokens=truth.greedy_tokens / size),
            },
            seed=seed,
        )

    def _verified(self, rollouts: Rollouts, reading: Reading, generator: torch.Generator) -> Mapping[str, Signal]:
        """What the verifier and the judges say."""
        flipped = torch.rand(len(reading.outcome), generator=generator) < self.verifier_error
        outcome = torch.where(flipped, 1 - reading.outcome, reading.outcome).double()
        right = outcome[rollouts.spans["step"].row] == 1
        return {
            "outcome": Signal(outcome, "trajectory"),
            **verdicts(reading.wrong, self.verdict_error, generator),
            **thought_label(reading.wrong, reading.used, right, self.verdict_error, generator),
        }

    # ---- learning -----------------------------------------------------------------------------------------------------

    def student(self, seed: int = 0, *, attention: bool = False) -> "Apprentice":
        """The writer, to be trained further, all of it.

        Args:
            seed: makes no difference: every student begins as the writer.
            attention: measure `waad` and `fai` too, which takes a pass.
        """
        return Apprentice(self, attention)


class Apprentice:
    """A `Student` on sums: problems of the writer's training to learn from, others to be evaluated on.

    Its rollouts have every signal that needs no continuations: all but `exact` and `values`. The reference is the writer.
    """

    def __init__(self, world: Arithmetic, attention: bool = False):
        self.world, self.attention, self.reference = world, attention, writer(world.lessons)
        self.model = copied(self.reference)

    def parameters(self) -> list[torch.nn.Parameter]:
        """As `Student.parameters`."""
        return list(self.model.parameters())

    def sample(self, groups: int, size: int, seed: int) -> Rollouts:
        """As `Student.sample`."""
        question, generator = self.world._drawn(groups, seed, test=False), torch.Generator().manual_seed(seed)
        limit = self.world.lessons.limit
        made = write(self.model, question, [size] * groups, limit, generator, statistics=TOKEN_STATISTICS)
        best = write(self.model, question, [1] * groups, limit, generator, greedy=True)
        rollouts, reading = _rollouts(question, torch.arange(groups).repeat_interleave(size), made)
        found = {k: Signal(_placed(rollouts, v), "token") for k, v in made.statistics.items()}
        with torch.no_grad():
            _, reference = _scored(self.reference, rollouts)
        noise = torch.randn(rollouts.action_mask.shape, generator=generator)
        return rollouts.replace(ref_logprobs=reference).with_signals(
            **found,
            **self.world._verified(rollouts, reading, generator),
            **(AttentionRhythm(self.model, **_RHYTHM).measure(rollouts) if self.attention else {}),
            greedy_outcome=Signal(read(question, best.tokens, best.lengths).outcome.double(), "group"),
            noise=Signal(noise, "token"),
        )

    def logprobs(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """As `Student.logprobs`."""
        return _scored(self.model, rollouts)[1]

    def evaluate(self, seed: int) -> Mapping[str, float]:
        """As `Student.evaluate`: 8 responses to each of 128 problems, the same ones every time."""
        question, generator = self.world._drawn(_TESTED, 18, test=True), torch.Generator().manual_seed(seed)
        limit = self.world.lessons.limit
        made = write(self.model, question, [8] * len(question), limit, generator, statistics=("entropy",))
        right = read(question.repeat_interleave(8, 0), made.tokens, made.lengths).outcome.view(-1, 8)
        return {
            "accuracy": float(right.mean()),
            "pass@8": float(right.amax(1).mean()),
            "entropy": float(made.statistics["entropy"].sum() / made.lengths.sum()),
            "length": float(made.lengths.double().mean()),
        }


# ---- the truth --------------------------------------------------------------------------------------------------------

_RHYTHM: Mapping[str, Any] = {"window": 5, "near": 4, "far": None}  # of attention, for responses of some 20 tokens


@dataclass(frozen=True)
class _Truth:
    """Rollouts and what is true of them, before anybody judges them; names as in `Episodes`."""

    rollouts: Rollouts
    reading: Reading
    advantages: Tensor
    errors: Tensor
    values: Tensor
    noise: Tensor
    pairs: Tensor
    gradient: Tensor
    greedy_tokens: float
    states: Tensor
    residual: Tensor

    def gradients(self, weights: Float[Tensor, "B T"]) -> Float[Tensor, "G P"]:
        """As `Episodes.gradients`: the output layer's is `sum_t w_t state_t (x) (chosen_t - pi_t)`."""
        groups = self.rollouts.num_groups
        own = weights[:, -self.residual.shape[1] :, None].float() * self.residual
        return _outer(self.states, own, groups) * (groups / len(weights))


def _outer(states: Float[Tensor, "B L H"], pulls: Float[Tensor, "B L V"], groups: int) -> Float[Tensor, "G P"]:
    """The sum over rows and positions of each group (all of one size) of states (x) pulls."""
    by_group = (x.reshape(groups, -1, x.shape[-1]) for x in (states, pulls))
    left, right = by_group
    return torch.bmm(left.transpose(1, 2), right).flatten(1).double()


@lru_cache(maxsize=2)
@torch.no_grad()
def _truth(world: Arithmetic, groups: int, size: int, seed: int) -> _Truth:
    model, limit = writer(world.lessons), world.lessons.limit
    generator = torch.Generator().manual_seed(seed)
    asked = torch.cat([torch.arange(groups) % world.prompts, torch.arange(world.prompts)])
    copies = torch.tensor([size] * groups + [_SPARE] * world.prompts)
    made = write(model, world.questions[asked], copies.tolist(), limit, generator)
    ids = torch.repeat_interleave(torch.arange(len(copies)), copies)
    everything, _ = _rollouts(world.questions[asked], ids, made)
    hidden, logprobs = _scored(model, everything)
    logits = model.lm_head(hidden)
    trie = Trie.of(asked[ids], made.tokens, made.lengths)
    known = _explored(world, trie, made, asked[ids], logits, generator)

    rows = torch.arange(groups * size)
    r, reading = _rollouts(world.questions[asked[:groups]], ids[rows], made.select(rows))
    nodes, acted = trie.nodes[rows], r.action_mask
    at = torch.arange(limit) < made.lengths[:, None]
    advantages, errors = known.advantage(trie, nodes[:, 1:].clamp(min=0))
    pulls = torch.where(at[..., None], known.pull[trie.nodes[:, :-1].clamp(min=0)], 0.0).float()
    own = _outer(hidden[rows], pulls[rows], groups)
    spare = _outer(hidden[len(rows) :], pulls[len(rows) :], world.prompts)
    prompts = asked[:groups]
    total = spare.index_add(0, prompts, own)
    others = _SPARE + size * (torch.bincount(prompts, minlength=world.prompts) - 1)
    scores = token_statistics(logits[rows].flatten(0, 1), made.tokens[rows].flatten(), names=TOKEN_STATISTICS)
    best = write(model, world.questions, [1] * world.prompts, limit, generator, greedy=True)
    greedy = read(world.questions, best.tokens, best.lengths).outcome.double()[prompts]
    residual = torch.nn.functional.one_hot(made.tokens[rows], len(ALPHABET)) - logits[rows].softmax(-1)
    return _Truth(
        rollouts=r.replace(logprobs=logprobs[rows], ref_logprobs=logprobs[rows]).with_signals(
            greedy_outcome=Signal(greedy, "group"),
            **{k: Signal(_placed(r, v.view(len(rows), limit)), "token") for k, v in scores.items()},
            **AttentionRhythm(model, **_RHYTHM).measure(r),
        ),
        reading=reading,
        advantages=_placed(r, advantages),
        errors=_placed(r, errors),
        values=_placed(r, known.value[nodes[:, :-1].clamp(min=0)]),
        noise=_placed(r, _noise(asked[ids][rows], made.tokens[rows])),
        pairs=torch.where(acted, _placed(r, nodes[:, 1:]), -1),
        gradient=(total[prompts] - own) / others[prompts, None],
        greedy_tokens=float(best.lengths.double().mean()),
        states=hidden[rows],
        residual=torch.where(at[rows, :, None], residual, 0.0),
    )


def _explored(
    world: Arithmetic, trie: Trie, made: Written, prompts: Tensor, logits: Tensor, generator: torch.Generator
) -> Values:
    """V of every prefix of the responses."""
    model, limit, depth = writer(world.lessons), world.lessons.limit, trie.depth
    over = (depth == made.lengths[trie.row]) | (depth == limit)
    asked = world.questions[prompts]
    outcome = torch.where(over, read(asked, made.tokens, made.lengths).outcome[trie.row], 0.0)

    def proceed(node: Tensor, token: Tensor, copies: Tensor) -> Tensor:
        """Beginnings of one length at a time: then nothing is padded."""
        found = torch.zeros(len(node), dtype=torch.float64)
        begun = made.tokens[trie.row[node]].scatter(1, depth[node, None], token[:, None])
        lengths = depth[node] + 1
        for n in lengths.unique().tolist():
            at = ((lengths == n) & (token != END)).nonzero()[:, 0]
            question = asked[trie.row[node[at]]]
            if n == limit or not len(at):
                continue
            head = begun[at, :n]
            more = write(model, torch.cat([question, head], 1), copies[at].tolist(), limit - n, generator)
            of = torch.repeat_interleave(torch.arange(len(at)), copies[at])
            whole = torch.cat([head[of], more.tokens], 1)
            right = read(question[of], whole, more.lengths + n).outcome.double()
            found[at] = torch.zeros(len(at), dtype=torch.float64).index_add_(0, of, right) / copies[at]
        ended = (token == END).nonzero()[:, 0]
        found[ended] = read(asked[trie.row[node[ended]]], begun[ended], lengths[ended]).outcome.double()
        return found

    policy = logits[trie.row, depth.clamp(max=limit - 1)].double().softmax(-1)
    return node_values(trie, policy, over, outcome.double(), proceed, world.continuations, generator)


def _noise(prompts: Int[Tensor, " B"], tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """A normal number for each position, the same wherever prompt and tokens before it are: read from a table by hash."""
    table = torch.randn(65_521, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    key, out = prompts + 1, []
    for token in tokens.unbind(1):
        key = (key * 1_000_003) % 2_147_483_647
        out.append(table[key % len(table)])
        key = key + token + 1
    return torch.stack(out, 1)


# ---- rollouts ---------------------------------------------------------------------------------------------------------


def _rollouts(question: Int[Tensor, "G P"], groups: Int[Tensor, " B"], made: Written) -> tuple[Rollouts, Reading]:
    """Responses with their prompts, and what the program finds in the responses."""
    asked = question[groups]
    prompt, reading = asked.shape[1], read(asked, made.tokens, made.lengths)
    steps, lengths = reading.steps, made.lengths + prompt
    steps = replace(steps, start=steps.start + prompt, stop=steps.stop + prompt)
    tokens = torch.cat([asked, made.tokens], 1)
    place = torch.arange(tokens.shape[1])
    r = Rollouts(
        tokens=tokens,
        lengths=lengths,
        action_mask=(place >= prompt) & (place < lengths[:, None]),
        group_ids=groups,
        trajectory_ids=torch.arange(len(groups)),
        row_index=torch.zeros_like(groups),
        truncated=(made.tokens.gather(1, made.lengths[:, None] - 1) != END)[:, 0],
        logprobs=torch.cat([torch.zeros(asked.shape), made.logprobs], 1),
        spans={"step": steps},
    )
    planning = torch.zeros(r.action_mask.shape, dtype=torch.float64)
    planning[steps.row, steps.start] = 1.0
    r = r.with_spans(macro=fixed_ngrams(_MACRO)(r)).with_signals(
        format=Signal(reading.ended.double(), "trajectory"), planning=Signal(planning, "token")
    )
    return r, reading


def _first_mistake(rollouts: Rollouts, reading: Reading) -> Bool[Tensor, "B T"]:
    """The positions of the first wrong step that is no note."""
    ids = rollouts.span_ids("step")
    return reading.first[ids] & (ids >= 0)


def _placed(rollouts: Rollouts, values: Tensor) -> Tensor:
    """Values of responses, [B, L], at the positions of their rows, [B, T]; 0 where there is no action."""
    out = torch.nn.functional.pad(values, (rollouts.width - values.shape[1], 0))
    return torch.where(rollouts.action_mask, out, torch.zeros((), dtype=out.dtype))


def _scored(model: Any, rollouts: Rollouts) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B T"]]:
    """The states that choices were made from, and log pi of what was chosen, 0 elsewhere."""
    assert rollouts.tokens is not None
    hidden = states(model, rollouts)
    chosen = rollouts.tokens[:, -hidden.shape[1] :, None]
    return hidden, _placed(rollouts, model.lm_head(hidden).log_softmax(-1).gather(-1, chosen)[..., 0])
