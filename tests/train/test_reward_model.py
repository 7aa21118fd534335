"""A real tiny reward model: a Llama with a score head and the byte-level tokenizer."""

import shutil

import pytest
import torch

from apportion.tasks import Problem
from apportion.train import Reward, RewardFailed, RewardModel
from apportion.train.rewards import check_rewards, rewarded
from apportion.types import Rollouts
from conftest import byte_tokenizer, tiny_config

TEXTS = ["12", "7+5=12, so it is 12", "", "no", "twelve"]
PLAIN = [Problem(f"p{i}", "7+5=?", "7+5=?\n", "12") for i in range(len(TEXTS))]
CHAT = [Problem(f"p{i}", "7+5=?", [{"role": "user", "content": "7+5=?"}], "12") for i in range(len(TEXTS))]


def build(folder, *, labels=1, pad=True, template=True, context=128):
    from transformers import LlamaForSequenceClassification

    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    if not pad:
        tokenizer.pad_token = None
    torch.manual_seed(1)
    config = tiny_config(tokenizer, context=context, num_labels=labels)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("reward") / "model")


def alone(folder, text):
    """The score of one text by transformers itself, without any padding."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = byte_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


def written(text):
    return f"<|im_start|>user\n7+5=?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"


def test_scores_are_those_of_transformers_on_the_chat_as_the_template_writes_it(folder):
    expected = [alone(folder, written(text)) for text in TEXTS]
    assert len({round(x, 3) for x in expected}) == len(TEXTS)
    assert RewardModel(folder).score(CHAT, TEXTS) == pytest.approx(expected, abs=1e-5)


def test_a_plain_prompt_is_the_users_message(folder):
    plain = [Problem("p", "7+5=?", "7+5=?", "12")] * len(TEXTS)
    assert RewardModel(folder).score(plain, TEXTS) == RewardModel(folder).score(CHAT, TEXTS)


def test_without_a_template_the_response_follows_the_prompt(tmp_path):
    folder = build(tmp_path / "plain", template=False)
    expected = [alone(folder, f"7+5=?\n{text}") for text in TEXTS]
    assert RewardModel(folder).score(PLAIN, TEXTS) == pytest.approx(expected, abs=1e-5)
    chat = RewardModel(folder).score(CHAT, TEXTS)  # a line break after each message
    assert chat == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_batches_change_nothing(folder, limit):
    model = RewardModel(folder, micro_tokens=limit)
    one = [model.score([p], [t])[0] for p, t in zip(CHAT, TEXTS, strict=True)]
    assert model.score(CHAT, TEXTS) == pytest.approx(one, abs=1e-5)


def test_a_folder_without_a_padding_token_is_read_at_the_last_token(tmp_path):
    folder = build(tmp_path / "bare", pad=False, template=False)
    endings = ["12", "12!", "12<|im_end|>", "a much longer one"]
    expected = [alone(folder, f"7+5=?\n{text}") for text in endings]
    model = RewardModel(folder)
    assert model.score(PLAIN[:4], endings) == pytest.approx(expected, abs=1e-5)
    assert model._loaded[0].config.pad_token_id is None


def test_batches_are_by_length_and_within_the_limit(folder, monkeypatch):
    from apportion.train import reward_model

    sizes = []
    real = reward_model._scores

    def count(model, rows):
        sizes.append([len(row["input_ids"]) for row in rows])
        return real(model, rows)

    monkeypatch.setattr(reward_model, "_scores", count)
    RewardModel(folder, micro_tokens=130).score(CHAT, TEXTS)
    flat = [n for batch in sizes for n in batch]
    assert flat == sorted(flat)
    assert all(max(batch) * len(batch) <= 130 for batch in sizes)
    assert len(sizes) < len(TEXTS)


def test_a_text_that_is_too_long_fails_for_itself(tmp_path, config, task):
    model = RewardModel(build(tmp_path / "short", context=64))
    texts = ["12", "1" * 80]
    scores = model.score(CHAT[:2], texts)
    assert isinstance(scores[0], float)
    assert isinstance(scores[1], ValueError)
    batch = Rollouts.from_lists([[1], [1]], [0, 0], truncated=[False, False], meta={"text": texts})
    settings = config(rewards=(Reward(model),))
    with pytest.raises(
        RewardFailed, match=r"the reward reward_model failed: prompt and response have \d+ tokens, .* on row 1"
    ):
        rewarded(batch, task.train[:2], settings, may_miss=False)
    found = rewarded(batch, task.train[:2], settings, may_miss=True).signals["reward_model"].values
    assert found.isnan().tolist() == [False, True]


def test_it_is_a_reward_with_a_weight(folder, config, digits):
    problems = digits.train[:2]
    batch = Rollouts.from_lists([[1], [1]], [0, 0], truncated=[False, False], meta={"text": ["12", "no"]})
    settings = config(task=digits, rewards=(Reward(RewardModel(folder), 0.5, "helpful"),))
    check_rewards(settings)
    found = rewarded(batch, problems, settings, may_miss=False)
    scores = RewardModel(folder).score(problems, ["12", "no"])
    assert found.signals["helpful"].values.tolist() == pytest.approx(scores, abs=1e-6)
    assert found.signals["outcome"].values.tolist() == pytest.approx([1 + 0.5 * scores[0], 0.5 * scores[1]], abs=1e-5)
    assert repr(settings.rewards[0]) == f"Reward(RewardModel(folder={folder!r}), weight=0.5, name='helpful')"


def test_an_encoder_gets_prompt_and_response_as_a_pair(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "is", "it", "yes", "no", "good"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    folder = tmp_path / "bert"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    problems = [Problem("a", "is it good", "is it good", "")] * 2
    texts = ["yes", "no it is good"]
    with torch.no_grad():
        expected = [float(model(**tokenizer("is it good", t, return_tensors="pt")).logits[0, 0]) for t in texts]
    assert RewardModel(str(folder)).score(problems, texts) == pytest.approx(expected, abs=1e-5)


# ---- folders that are no reward model -------------------------------------------------------------------------------------


def test_several_labels_are_refused(tmp_path):
    model = RewardModel(build(tmp_path / "three", labels=3))
    with pytest.raises(ValueError, match=r"needs a model with one label, but this one has 3. Give a reward model"):
        model.check()


def test_a_head_that_was_not_saved_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    headless = tmp_path / "headless"
    shutil.copytree(folder, headless)
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no score.weight among its weights, so its scores would be random"):
        RewardModel(str(headless)).check()


def test_a_language_model_is_refused(tiny_model):
    with pytest.raises(ValueError, match="needs a model with one label, but this one has 2"):
        RewardModel(tiny_model).check()


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match=r"model 'nowhere' is neither a folder"):
        RewardModel("nowhere").check()
