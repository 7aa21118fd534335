"""What train_step.py runs in processes of their own: `prepare` a model and prompts once, then time `ours` or `trl`.

    python _one_process.py prepare|ours|trl WORK.json

Every step of a timed process becomes one line of the file `steps` of its WORK, written as soon as it is known, so that a
process that is stopped by its time limit leaves what it had measured.
"""

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LR, RAMP, CLIP_LOW, CLIP_HIGH = 2e-5, 4, 0.2, 0.28  # the same for both, and without influence on the time


def reward(call: int, work: dict[str, Any]) -> float:
    """Of the `call`-th response of a run: 1, 0, 1, 0 ... within a group; always 1 in the first `dead` groups of a step.

    Responses of a group are neighbours in both systems, so every other group is mixed.
    """
    group = call // work["group"] % work["prompts"]
    return 1.0 if group < work["dead"] else float(call % 2)


class Steps:
    """Writes one line per step: seconds of its parts and in all, tokens sampled, peak memory so far."""

    def __init__(self, work: dict[str, Any]):
        self.work = work

    def append(self, sample: float, measure: float, update: float, tokens: int) -> None:
        expected = self.work["prompts"] * self.work["group"] * self.work["new_tokens"]
        if tokens != expected:
            raise ValueError(f"a step must sample exactly {expected} tokens to be compared, but it sampled {tokens}.")
        seconds = {"sample": sample, "measure": measure, "update": update, "seconds": sample + measure + update}
        with open(self.work["steps"], "a") as file:
            file.write(json.dumps({**seconds, "tokens": tokens, **peak_memory()}) + "\n")


def peak_memory() -> dict[str, float | None]:
    """GiB: the largest resident size of this process, and of the GPU's allocator if there is a GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"memory": resident / 2**30, "gpu_memory": gpu}


# ---- this trainer -----------------------------------------------------------------------------------------------------


class BenchTask:
    """The prompts, and a reward that looks only at a response's place."""

    name, test = "bench", ()

    def __init__(self, work: dict[str, Any]):
        from apportion.tasks import Problem

        self.work, self.calls = work, 0
        self.train = [Problem(f"bench-{i}", text, text, "none") for i, text in enumerate(work["texts"])]

    def verify(self, problem: Any, text: str) -> float:
        self.calls += 1
        return reward(self.calls - 1, self.work)


def ours(work: dict[str, Any]) -> None:
    from apportion.credit import grpo
    from apportion.record import Run
    from apportion.train import Config, run

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=work["model"],
            task=BenchTask(work),
            credit=grpo(),
            out=folder,
            seed=work["seed"],
            steps=1 + work["counted"],
            prompts_per_step=work["prompts"],
            group_size=work["group"],
            max_new_tokens=work["new_tokens"],
            sample_rows=work["prompts"] * work["group"],
            truncated_reward=None,
            lr=LR,
            lr_ramp=RAMP,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            threads=work["threads"],
            precision=work["precision"],
            skip_flat=work["skip_flat"],
            share_prompt=work["share_prompt"],
            eval_every=0,
            save_every=0,
            save_model=False,
            progress=False,
        )
        steps = Steps(work)
        for m in Run(run(config)).metrics("train"):
            tokens = round(m["length"] * work["prompts"] * work["group"])
            steps.append(m["seconds_sample"], m["seconds_measure"], m["seconds_update"], tokens)


# ---- TRL --------------------------------------------------------------------------------------------------------------


def trl(work: dict[str, Any]) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(work["threads"])
    rows = work["prompts"] * work["group"]
    clock = {"generate": 0.0, "generate_and_score": 0.0, "start": 0.0}
    seen = {"responses": 0, "tokens": 0}

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            return _timed(clock, "generate", super()._generate, *args, **kwargs)

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            return _timed(clock, "generate_and_score", super()._generate_and_score_completions, *args, **kwargs)

    class Watch(TrainerCallback):  # type: ignore[misc]
        """From the start of a step to its optimizer step; loading of the batch and logging are outside."""

        def __init__(self) -> None:
            self.steps = Steps(work)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.update(generate=0.0, generate_and_score=0.0, start=_now())
            seen["tokens"] = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            whole, scored, generated = _now() - clock["start"], clock["generate_and_score"], clock["generate"]
            self.steps.append(generated, scored - generated, whole - scored, seen["tokens"])

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        first = seen["responses"]
        seen["responses"] += len(completion_ids)
        seen["tokens"] += sum(len(ids) for ids in completion_ids)
        return [reward(first + i, work) for i in range(len(completion_ids))]

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            seed=work["seed"],
            max_steps=1 + work["counted"],
            per_device_train_batch_size=work["trl_batch"],
            gradient_accumulation_steps=rows // work["trl_batch"],
            num_generations=work["group"],
            max_completion_length=work["new_tokens"],
            temperature=1.0,
            beta=0.0,
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            loss_type="dapo",
            scale_rewards="group",
            learning_rate=LR,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=RAMP,
            adam_beta2=0.99,
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=work["precision"] == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Timed(
            model=work["model"],
            args=settings,
            processing_class=AutoTokenizer.from_pretrained(work["model"]),
            train_dataset=Dataset.from_dict({"prompt": work["texts"]}),
            reward_funcs=score,
            callbacks=[Watch()],
        ).train()


def _timed(clock: dict[str, float], name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    start = _now()
    out = function(*args, **kwargs)
    clock[name] += _now() - start
    return out


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- the model and the prompts, the same for both ---------------------------------------------------------------------


def prepare(work: dict[str, Any]) -> None:
    """Write what both systems load: the model with an end token that it has no logit for, and prompts of one length.

    A token that cannot be sampled ends no response, so every response has exactly `new_tokens` tokens, and neither
    system does anything that it does not do in ordinary use.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from apportion.train import CausalPolicy, resolve_model

    target = Path(work["folder"])
    source = Path(_tiny(target / "tiny") if work["tiny"] else resolve_model(work["model"]))
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(str(source)))
    model = target / "model"
    model.mkdir()
    for weights in (*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")):
        (model / weights.name).symlink_to(weights.resolve())
    config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    texts = _prompts(tokenizer, work["prompts"], work["prompt_tokens"], work["seed"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    vocabulary = config.get_text_config().vocab_size
    tokenizer.add_tokens([f"<|never-{i}|>" for i in range(len(tokenizer), vocabulary + 1)], special_tokens=True)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    config.eos_token_id = tokenizer.eos_token_id
    config.save_pretrained(model)
    tokenizer.save_pretrained(model)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(model)

    policy = CausalPolicy.load(str(model), precision=work["precision"])
    prepared = {
        "model": str(model),
        "texts": texts,
        "precision": str(policy.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    (target / "prepared.json").write_text(json.dumps(prepared))


def _prompts(tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """Different texts of exactly `length` tokens."""
    drawn, texts = random.Random(seed), []
    for _ in range(100 * count):
        text = "Compute: " + " ".join(f"{drawn.randrange(100)} {drawn.choice('+-')}" for _ in range(length))
        cut = tokenizer.decode(tokenizer(text)["input_ids"][:length], skip_special_tokens=True)
        if len(tokenizer(cut)["input_ids"]) == length and cut not in texts:
            texts.append(cut)
        if len(texts) == count:
            return texts
    raise ValueError(f"{count} different prompts of {length} tokens could not be made. Choose another --prompt-tokens.")


def _tiny(folder: Path) -> Path:
    """A random Llama of about 30,000 parameters that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    # A file is handed over, not arguments: the prompts are in it.
    {"prepare": prepare, "ours": ours, "trl": trl}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
