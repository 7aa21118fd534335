"""The rhythm of attention: the worked numbers, and a model looked into against loops over all of its maps."""

from itertools import product

import pytest
import torch

from apportion.signals import AttentionRhythm, fai, waad
from apportion.types import Rollouts


def lower(rows: list[list[float]], dtype=torch.float64) -> torch.Tensor:
    return torch.tensor([row + [0.0] * (len(rows) - len(row)) for row in rows], dtype=dtype)


# ---- worked by hand -----------------------------------------------------------------------------------------------------


def test_waad_of_the_worked_example():
    maps = lower([[1], [0.6, 0.4], [0.5, 0.1, 0.4], [0, 0.1, 0.3, 0.6], [0.2, 0, 0.1, 0.1, 0.6]])
    want = torch.tensor([0, 0.6, 1.1, 0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(waad(maps, window=2), want)
    torch.testing.assert_close(waad(maps[3:], window=2, first=3), want[3:])


def test_fai_of_the_worked_example():
    maps = lower([[1], [0.9, 0.1], [0.3, 0.6, 0.1], [0.1, 0.6, 0.2, 0.1], [0.1, 0.5, 0.3, 0.05, 0.05]])
    want = torch.tensor([0.6, 0.6, 0.25, 0.05, 0], dtype=torch.float64)
    torch.testing.assert_close(fai(maps, near=1, far=2), want)
    # to the end: s = 0 is looked at by (.9 + .3 + .1 + .1) / 4, s = 1 by (.6 + .6 + .5) / 3
    torch.testing.assert_close(fai(maps, near=1, far=None)[:2], torch.tensor([1.4 / 4, 1.7 / 3], dtype=torch.float64))


def test_uniform_attention_gives_a_rising_waad_that_stays_below_the_window():
    n = 200
    maps = torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1)[:, None]
    values = waad(maps, window=10)
    assert (values.diff() > 0).all()
    assert 9 < values[-1] < 10


# ---- a model ------------------------------------------------------------------------------------------------------------


def build(kind: str, layers: int = 9):
    import transformers

    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "windows": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "softcap": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    }[kind]
    settings = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    if kind == "windows":  # every other layer sees six positions
        types = ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]
        settings |= {"use_sliding_window": True, "sliding_window": 6, "layer_types": types}
    if kind == "softcap":  # logits of the attention are squashed, which only the model's own function knows
        settings |= {"head_dim": 8, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}
    torch.manual_seed(1)
    return model(config(**settings)).eval()


def batch() -> Rollouts:
    """Prompts of several lengths; one response has a gap, one is empty, one fills the batch."""
    torch.manual_seed(0)
    lengths, prompts = [17, 30, 9, 12, 4], [5, 3, 4, 8, 4]
    tokens = [torch.randint(0, 50, (n,)).tolist() for n in lengths]
    masks = [[t >= p for t in range(n)] for n, p in zip(lengths, prompts, strict=True)]
    masks[1][10:14] = [False] * 4
    return Rollouts.from_lists(tokens, list(range(5)), action_mask=masks)


def slowly(model, r: Rollouts, layers: list[int], window: int, near: int, far: int, share: float):
    """From the definitions, with every map of the model at hand: WAAD and FAI as dictionaries of (row, position)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps, acts = [], []
    for b in range(r.batch):
        ids = r.tokens[b : b + 1, : int(r.lengths[b])]
        with torch.no_grad():
            every = model(ids, output_attentions=True).attentions
        maps.append([every[layer][0, h].tolist() for layer, h in product(layers, range(4))])
        acts.append([t for t in range(int(r.lengths[b])) if r.action_mask[b, t]])
    model.set_attn_implementation(before)

    def span(h: int) -> float:
        looks = [sum(a * (t - s) for s, a in enumerate(maps[b][h][t])) for b in range(r.batch) for t in acts[b]]
        return sum(looks) / len(looks)

    ranked = sorted(range(4 * len(layers)), key=span)
    size = round(share * len(ranked))
    short, long = ranked[:size], ranked[-size:]
    distances, influence = {}, {}
    for b in range(r.batch):
        for t in acts[b]:
            local = [sum(maps[b][h][t][s] for h in short) / size for s in range(t + 1)]
            distances[b, t] = sum(a * min(t - s, window) for s, a in enumerate(local))
            queries = [q for q in acts[b] if t + near <= q <= t + far]
            values = [sum(maps[b][h][q][t] for h in long) / size for q in queries]
            influence[b, t] = sum(values) / len(values) if values else 0.0
    return distances, influence


@pytest.mark.parametrize("kind", ["llama", "qwen2", "windows", "softcap"])
@pytest.mark.parametrize(("micro_tokens", "queries"), [(4096, 128), (40, 5)])
def test_a_model_gives_what_loops_over_its_maps_give(kind, micro_tokens, queries):
    model, r = build(kind), batch()
    settings = {"window": 4, "near": 2, "far": 7, "share": 0.3}
    measured = AttentionRhythm(model, micro_tokens=micro_tokens, queries=queries, **settings).measure(r)
    # nine layers: 3, 3.75, 4.5, 5.25, 6, rounded to 3, 4, 4, 5, 6
    for signal, want in zip(measured.values(), slowly(model, r, [3, 4, 5, 6], **settings), strict=True):
        assert torch.equal(signal.values.isnan(), ~r.action_mask)
        for (b, t), value in want.items():
            assert float(signal.values[b, t]) == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert measured["fai"].values[0, 16] == 0  # nobody looks back at the last token


def test_the_model_is_left_as_it_was_and_the_rest_of_it_does_not_run():
    model, ran = build("llama"), []
    before = model(torch.arange(8)[None]).logits
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    AttentionRhythm(model).measure(batch())
    assert ran == [0, 1, 2, 3, 4, 5, 6]
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(torch.arange(8)[None]).logits, before)


def test_no_whole_map_is_ever_held():
    """Of 256 positions, maps of at most 16 queries are seen."""
    model, shapes = build("llama"), []
    r = Rollouts.from_lists([[i % 50 for i in range(256)]], [0])
    rhythm = AttentionRhythm(model, queries=16)
    import apportion.signals._attention as room

    see = room._Heads.see
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            room._Heads, "see", lambda self, first, maps: (shapes.append(tuple(maps.shape)), see(self, first, maps))
        )
        rhythm.measure(r)
    assert set(shapes) == {(1, 4, 16, 256)}


def test_heads_follow_the_batch_or_stay_as_they_were_first():
    model, r = build("llama"), batch()
    first, second = r.select(torch.tensor([0])), r.select(torch.tensor([1]))
    fresh, frozen = AttentionRhythm(model), AttentionRhythm(model, heads="first")
    want = fresh.measure(first)
    torch.testing.assert_close(frozen.measure(first)["waad"].values, want["waad"].values, equal_nan=True)
    kept = frozen.state_dict()["heads"]
    resumed = AttentionRhythm(model, heads="first")
    resumed.load_state_dict(frozen.state_dict())
    here = resumed.measure(second)["fai"].values
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict()["heads"], kept, strict=True))
    torch.testing.assert_close(here, frozen.measure(second)["fai"].values, equal_nan=True)
    fresh.measure(second)
    assert not all(torch.equal(a, b) for a, b in zip(fresh.state_dict()["heads"], kept, strict=True))


def test_nothing_to_measure_and_nothing_to_look_into():
    r = Rollouts.from_lists([[1, 2]], [0], action_mask=[[False, False]])
    assert AttentionRhythm(build("llama")).measure(r)["waad"].values.isnan().all()
    with pytest.raises(ValueError, match="AttentionRhythm needs a model"):
        AttentionRhythm().measure(r)
    with pytest.raises(ValueError, match=r"AttentionRhythm got far=5, share=0\. Numbers must be"):
        AttentionRhythm(far=5, share=0)
