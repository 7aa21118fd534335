"""What leaves a run: adapters that are trained on, and folders that other programs read."""

import json
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from apportion.tasks import Problem
from apportion.train import CausalPolicy, run
from apportion.train.policy import Request
from apportion.train.sampler import Sampling
from conftest import TEMPLATE, build_tiny_model

CHAT = Problem(id="chat", question="2+2", prompt=[{"role": "user", "content": "2+2"}], answer="4")
RAW = Problem(id="raw", question="2+2=?", prompt="2+2=?\n", answer="4")
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


def loaded(name: str, **settings) -> CausalPolicy:
    return CausalPolicy.load(name, **{"precision": "float32", **settings})


def moved(policy: CausalPolicy, seed: int = 1) -> CausalPolicy:
    """The policy after something that stands for training: every trained weight is another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    policy.refresh_sampler()
    return policy


def sampled(policy: CausalPolicy, sampling: Sampling = GREEDY):
    return policy.sample([Request(CHAT, 2), Request(RAW, 2)], sampling, generator=torch.Generator().manual_seed(0))


def logprobs(policy: CausalPolicy, rollouts) -> torch.Tensor:
    return policy.outputs(rollouts, rollouts.action_mask).logprobs.detach()


# ---- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_trained_on_from_exactly_where_it_was(tiny_model, tmp_path):
    first = moved(loaded(tiny_model, lora_rank=2, lora_alpha=6))
    rollouts = sampled(first)
    first.save_adapter(str(tmp_path / "adapter"))
    again = loaded(str(tmp_path / "adapter"), seed=5)
    assert torch.equal(logprobs(again, rollouts), logprobs(first, rollouts))
    assert not torch.equal(logprobs(loaded(tiny_model), rollouts), logprobs(first, rollouts))
    assert again.trainable().keys() == first.trainable().keys()
    for policy in (first, again):
        optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
        policy.outputs(rollouts, rollouts.action_mask).logprobs.sum().backward()
        optimizer.step()
    assert torch.equal(logprobs(again, rollouts), logprobs(first, rollouts))


def test_a_run_continues_the_adapter_of_another(config, digits, tmp_path):
    options = {"task": digits, "save_model": True, "steps": 2, "lr": 1e-2}
    first = run(config(out=str(tmp_path / "first"), lora_rank=2, **options))
    second = run(config(out=str(tmp_path / "second"), model=str(first / "adapter"), **options))

    def evaluated(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [m for m in lines if m["kind"] == "eval"]

    assert evaluated(second)[0]["correct"] == evaluated(first)[-1]["correct"]
    rollouts = sampled(loaded(str(second / "adapter")))
    ended = logprobs(loaded(str(second / "adapter")), rollouts)
    assert not torch.equal(ended, logprobs(loaded(str(first / "adapter")), rollouts))
    torch.testing.assert_close(logprobs(loaded(str(second / "model")), rollouts), ended, atol=1e-4, rtol=0)


def test_peft_itself_reads_the_adapter(tiny_model, tmp_path):
    from peft import AutoPeftModelForCausalLM

    policy = moved(loaded(tiny_model, lora_rank=2))
    policy.save_adapter(str(tmp_path / "adapter"))
    with warnings.catch_warnings():  # peft 0.21 reads an attribute that transformers 5.23 has renamed
        warnings.simplefilter("ignore", FutureWarning)
        theirs = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32).eval()
    ids = torch.tensor([policy.prompt_ids(RAW)])
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, policy.model(ids).logits)


def test_the_base_of_an_adapter_is_found_from_every_folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny_model).parent)
    loaded(Path(tiny_model).name, lora_rank=2).save_adapter(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path)
    assert loaded("adapter").adapted


def test_the_packaged_base_of_an_adapter_is_found_in_another_cache(tiny_model, tmp_path, monkeypatch):
    name = "smollm2-135m-instruct"
    loaded(tiny_model, lora_rank=2).save_adapter(str(tmp_path / "adapter"))
    rewrite(tmp_path / "adapter", base_model_name_or_path=f"/another/machine/apportion/models/{name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "apportion" / "models").mkdir(parents=True)
    (tmp_path / "apportion" / "models" / name).symlink_to(tiny_model)
    assert loaded(str(tmp_path / "adapter")).adapted


def rewrite(adapter: Path, **settings: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"lora_rank": 4}, r"has lora_rank 2, but lora_rank 4 was asked for. Leave lora_rank out to train it on"),
        ({}, {"lora_alpha": 3}, r"has lora_alpha 4, but lora_alpha 3 was asked for"),
        ({"peft_type": "IA3"}, {}, r"is of the kind IA3, but only LORA can be trained on"),
        ({"base_model_name_or_path": "/gone"}, {}, r"was trained on '/gone', which is not here. Put the base model"),
    ],
)
def test_an_adapter_that_cannot_be_trained_on_is_refused(tiny_model, tmp_path, settings, options, message):
    loaded(tiny_model, lora_rank=2).save_adapter(str(tmp_path / "adapter"))
    assert loaded(str(tmp_path / "adapter"), lora_rank=2, lora_alpha=4).adapted
    rewrite(tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=message):
        loaded(str(tmp_path / "adapter"), **options)


def test_an_adapter_on_a_base_of_another_shape_is_refused(tiny_model, tmp_path):
    other = str(build_tiny_model(tmp_path / "other", hidden=16))
    loaded(tiny_model, lora_rank=2).save_adapter(str(tmp_path / "adapter"))
    rewrite(tmp_path / "adapter", base_model_name_or_path=other)
    with pytest.raises(ValueError, match=r"adapter .* does not fit .*other, which its base_model_name_or_path names"):
        loaded(str(tmp_path / "adapter"))


def test_without_an_adapter_there_is_none_to_save(policy, tmp_path):
    assert not policy.adapted
    with pytest.raises(ValueError, match="all weights are trained"):
        policy.save_adapter(str(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", ["full", "fresh adapter", "trained adapter"])
def test_the_reference_is_the_model_as_it_was_when_it_was_kept(tiny_model, tmp_path, kind):
    rank = 0 if kind == "full" else 2
    policy = loaded(tiny_model, lora_rank=rank)
    if kind == "trained adapter":
        moved(policy).save_adapter(str(tmp_path / "adapter"))
        policy = loaded(str(tmp_path / "adapter"))
    rollouts = sampled(policy)
    before = logprobs(policy, rollouts)
    policy.keep_reference()
    assert torch.equal(policy.reference_logprobs(rollouts, rollouts.action_mask), before)
    after = logprobs(moved(policy, seed=2), rollouts)
    assert not torch.equal(after, before)
    assert torch.equal(policy.reference_logprobs(rollouts, rollouts.action_mask), before)
    assert torch.equal(logprobs(policy, rollouts), after)  # the trained weights are back
    if rank:  # the adapter alone is copied
        assert all("lora_" in name for name in policy.reference_state())
    resumed = loaded(tiny_model, lora_rank=rank)
    resumed.load_reference(policy.reference_state())
    assert torch.equal(resumed.reference_logprobs(rollouts, rollouts.action_mask), before)


# ---- activation checkpointing -----------------------------------------------------------------------------------------


def gradient_and_kept_bytes(policy: CausalPolicy, rollouts) -> tuple[dict[str, torch.Tensor], int]:
    kept = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total = policy.outputs(rollouts, rollouts.action_mask, ("entropies",)).logprobs.sum()
    total.backward()
    return {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}, kept


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"precision": "bfloat16"}], ids=["full", "lora", "bfloat16"])
def test_recomputed_activations_give_the_same_gradient_and_keep_fewer_bytes(tiny_model, options):
    usual, sparing = (loaded(tiny_model, activation_checkpointing=x, **options) for x in (False, True))
    rollouts = sampled(usual)
    assert torch.equal(sampled(sparing).tokens, rollouts.tokens)
    expected, all_bytes = gradient_and_kept_bytes(usual, rollouts)
    found, few_bytes = gradient_and_kept_bytes(sparing, rollouts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(float(x.abs().sum()) for x in expected.values()) > 0
    # a layer of width h keeps h numbers a token for its input, and otherwise about 20 h: inputs of norms, projections,
    # attention and the gated MLP
    assert few_bytes < 0.3 * all_bytes


def test_recomputed_activations_leave_sampling_alone(tiny_model, capsys):
    policy = loaded(tiny_model, activation_checkpointing=True)
    layers = []
    original = torch.nn.Module.__call__

    def counted(module, *args, **options):
        if type(module).__name__ == "LlamaDecoderLayer":
            layers.append(options["past_key_values"])
        return original(module, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", counted)
        sampled(policy, Sampling(max_new_tokens=3, min_new_tokens=3))
    assert len(layers) == 2 * 3  # two layers, once for the prompt and once for each token but the last
    assert all(cache is not None for cache in layers)
    assert capsys.readouterr().err == ""


def test_the_sampling_copy_recomputes_with_its_own_layers(tiny_model):
    policy = loaded(tiny_model, activation_checkpointing=True, precision="bfloat16")
    assert policy.acting_model is not policy.model
    assert policy.acting_model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_a_model_whose_layers_cannot_be_recomputed_is_refused():
    from apportion.train.activations import recompute_activations

    with pytest.raises(ValueError, match=r"activation_checkpointing needs layers .* which Linear lacks"):
        recompute_activations(torch.nn.Linear(1, 1))


# ---- the folder -------------------------------------------------------------------------------------------------------

READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, messages, raw, rows = sys.argv[1], *map(json.loads, sys.argv[2:])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
prompts = [
    tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), add_special_tokens=False)["input_ids"],
    tokenizer(raw)["input_ids"],
]
answers, logprobs = [], []
with torch.no_grad():
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt):]
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
    for row in rows:
        lp = model(torch.tensor([row])).logits[0, :-1].float().log_softmax(1)
        logprobs.append(lp.gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist())
print(json.dumps({"answers": answers, "logprobs": logprobs, "dtype": str(model.dtype)}))
"""


def read_by_transformers(folder: Path, rollouts) -> dict:
    """In a fresh process that knows nothing of this library."""
    rows = [row[:n] for row, n in zip(rollouts.tokens.tolist(), rollouts.lengths.tolist(), strict=True)]
    argv = [
        sys.executable,
        "-c",
        READER,
        str(folder),
        json.dumps(CHAT.prompt),
        json.dumps(RAW.prompt),
        json.dumps(rows),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_transformers_reads_the_folder_in_a_fresh_process_and_answers_the_same(tiny_model, tmp_path, options):
    policy = moved(loaded(tiny_model, **options))
    policy.save(str(tmp_path / "model"))
    rollouts = sampled(policy)
    told = read_by_transformers(tmp_path / "model", rollouts)
    assert told["dtype"] == "torch.float32"
    assert told["answers"] == rollouts.meta["text"][::2]
    for row, found in enumerate(told["logprobs"]):
        acted = rollouts.action_mask[row, 1 : len(found) + 1]
        expected = rollouts.logprobs[row, 1 : len(found) + 1][acted]
        torch.testing.assert_close(torch.tensor(found)[acted], expected, atol=1e-4, rtol=0)


def in_bfloat16(model: str, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stored", "options", "saved"),
    [
        ("bfloat16", {"precision": "bfloat16"}, "bfloat16"),
        ("bfloat16", {"precision": "float32"}, "float32"),
        ("float32", {"precision": "bfloat16"}, "float32"),
        ("bfloat16", {"precision": "bfloat16", "lora_rank": 2}, "float32"),
    ],
)
def test_weights_are_rounded_only_where_they_acted_so(tiny_model, tmp_path, stored, options, saved):
    base = tiny_model if stored == "float32" else str(in_bfloat16(tiny_model, tmp_path / "base"))
    moved(loaded(base, **options)).save(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == saved


def test_the_folder_of_a_bfloat16_model_has_just_the_weights_that_sampled(tiny_model, tmp_path):
    from safetensors.torch import load_file

    policy = moved(loaded(str(in_bfloat16(tiny_model, tmp_path / "base")), precision="bfloat16"))
    policy.save(str(tmp_path / "model"))
    written = load_file(tmp_path / "model" / "model.safetensors")
    acted = policy.acting_model.state_dict()
    assert {x.dtype for x in written.values()} == {torch.bfloat16}
    assert all(torch.equal(x, acted[name]) for name, x in written.items())
    assert policy.model.dtype == torch.float32  # the trained weights stay as they are


def test_the_folder_names_every_end_token_and_the_template(tiny_model, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    policy = loaded(tiny_model)
    start = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    policy.end_ids = [*policy.end_ids, start]  # as of a model whose generation settings name a second one
    policy.model.generation_config.temperature = 0.6  # and a temperature without do_sample, which may not be saved
    policy.save(str(tmp_path / "model"))
    settings = GenerationConfig.from_pretrained(str(tmp_path / "model"))
    assert settings.eos_token_id == policy.end_ids
    assert settings.pad_token_id == policy.pad_id
    assert (settings.temperature, settings.do_sample) == (0.6, True)
    assert AutoTokenizer.from_pretrained(str(tmp_path / "model")).chat_template == TEMPLATE
    assert loaded(str(tmp_path / "model")).end_ids == policy.end_ids


def test_the_folder_can_be_read_by_others_and_is_replaced_in_place(tiny_model, tmp_path):
    folder = tmp_path / "model"
    loaded(tiny_model).save(str(folder))
    (folder / "README.md").write_text("mine")
    policy = moved(loaded(tiny_model))
    policy.save(str(folder))
    assert (folder / "README.md").read_text() == "mine"
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    assert not list(tmp_path.glob("*.partial"))
    rollouts = sampled(policy)
    assert torch.equal(logprobs(loaded(str(folder)), rollouts), logprobs(policy, rollouts))


def test_llama_cpp_finds_the_vocabulary_the_template_and_a_place_for_every_tensor(tiny_model, tmp_path):
    """With the package of llama.cpp's converter: what it reads of the folder."""
    import gguf
    from safetensors.torch import load_file

    moved(loaded(tiny_model, lora_rank=2)).save(str(tmp_path / "model"))
    vocabulary = gguf.SpecialVocab(tmp_path / "model", load_merges=True)
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert vocabulary.special_token_ids == {"eos": ids["<|im_end|>"], "pad": ids["<|im_end|>"]}
    assert vocabulary.chat_template == TEMPLATE
    places = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert all(places.get_name(name, try_suffixes=(".weight",)) for name in names)
    assert "lm_head.weight" not in names  # tied: written once
