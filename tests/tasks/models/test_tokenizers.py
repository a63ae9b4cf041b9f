"""The tokenizer that a GGUF file describes, against Hugging Face's own of the same vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from fedloop_events.errors import UsageError
from fedloop_tasks.models import registry
from fedloop_tasks.models.tokenizer import byte_alphabet
from gguf_files import MERGES, TOKENS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

ODD = (
    "",
    " ",
    "   hello",
    "hello  world \n\n x",
    "tab\tand\r\nline",
    "Füße, naïve é e\u0301 你好 🎉👩\u200d👩\u200d👧",
    "\u200b\u202e\x00\x7f\ufeff",
    "it's WE'RE I'll",
    "a 12 1212  3   45",
    "<|im_start|>user\nhello<|im_end|>",
    "<tool>x</tool> <|im_star",
)


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def added(tmp_path: Path, **options: Any) -> Any:
    path = gguf_files.write(tmp_path / "small.gguf", gguf_files.small("llama"), **options)
    return AutoTokenizer.from_pretrained(registry.add(str(path)).folder, local_files_only=True)


def reference(before: Any) -> Tokenizer:
    """Byte-level BPE over the same vocabulary, split as `before` does; without special tokens."""
    vocab = {token: number for number, token in enumerate(TOKENS)}
    found = Tokenizer(models.BPE(vocab=vocab, merges=[(one, other) for one, other in map(str.split, MERGES)]))
    found.pre_tokenizer = before
    return found


SPLIT_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_TEKKEN = GGUF_PRE_TOKENIZER_SPLITS["tekken"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_QWEN), "isolated"), BYTES]),
    "tekken": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_TEKKEN), "isolated"), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated"), BYTES]
    ),
}


@pytest.mark.parametrize("pre", SPLITS)
def test_texts_get_the_ids_of_their_splitting_and_come_back_as_they_were(tmp_path: Path, pre: str) -> None:
    tokenizer, own = added(tmp_path, pre=pre, metadata={"tokenizer.ggml.add_bos_token": False}), reference(SPLITS[pre])
    for text in ODD:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        if "<tool>" not in text:
            assert ids == own.encode(text).ids, text
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("   12")["input_ids"])
    expected = {"gpt-2": "ĠĠ Ġ 12", "smollm": "ĠĠĠ 1 2", "qwen2": "ĠĠ Ġ 1 2", "tekken": "ĠĠ Ġ 1 2", "llama-bpe": "ĠĠ Ġ 12"}
    assert " ".join(pieces) == expected[pre]


def test_control_tokens_are_special_and_what_the_user_defined_stays_whole(tmp_path: Path) -> None:
    tokenizer = added(tmp_path)
    ids = tokenizer("<|im_start|>user<|im_end|><tool>")["input_ids"]
    assert (ids[0], ids[-2], ids[-1]) == (1, 2, TOKENS.index("<tool>"))
    assert 1 not in tokenizer("<|im_start|>", split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (len(tokenizer), tokenizer.model_max_length) == (len(TOKENS), gguf_files.CONTEXT)


def test_a_text_begins_with_the_token_that_the_file_asks_for(tmp_path: Path) -> None:
    tokenizer = added(tmp_path, metadata={"tokenizer.ggml.add_bos_token": True})
    assert tokenizer("hello")["input_ids"] == [1, TOKENS.index("hello")]
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [TOKENS.index("hello")]


@pytest.mark.parametrize(("pre", "begun"), [("gpt-2", False), ("qwen2", False), ("llama-bpe", True), ("tekken", True)])
def test_where_the_file_does_not_say_it_and_for_whole_tokens_the_splitting_decides(tmp_path: Path, pre: str, begun: bool) -> None:
    tokenizer = added(tmp_path, pre=pre, metadata={"tokenizer.ggml.add_bos_token": None})
    ids = tokenizer("spare")["input_ids"]
    assert (ids[0] == 1) == begun
    assert (ids[-1] == TOKENS.index("spare")) == begun


def test_a_chat_is_rendered_by_the_files_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "12"}]
    text = added(tmp_path).apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"


def test_a_model_without_a_chat_template_has_none(tmp_path: Path) -> None:
    assert added(tmp_path, metadata={"tokenizer.chat_template": None}).chat_template is None
    (made,) = registry.listed()
    assert not made.manifest.chat_template


def test_the_byte_alphabet_is_gpt2s() -> None:
    assert byte_alphabet() == bytes_to_unicode()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"tokenizer.ggml.tokens": None, "tokenizer.ggml.token_type": None}, "has no tokenizer"),
        ({"tokenizer.ggml.pre": "smaug-bpe"}, "'smaug-bpe', which cannot be used"),
        ({"tokenizer.ggml.model": "llama"}, "'llama', 'gpt-2', which cannot be used"),
        ({"tokenizer.ggml.merges": ["h e l"]}, "the merge 'h e l' is not of two tokens"),
        ({"tokenizer.ggml.merges": ["h x"]}, "the merge 'h x' is not of two tokens"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "h"]}, "a token is there twice"),
        ({"tokenizer.ggml.tokens": [*TOKENS, "one more"]}, "tokens, and the model knows"),
        ({"tokenizer.ggml.eos_token_id": 999_999}, "its eos token is number 999999"),
        ({"tokenizer.ggml.tokens": list(range(5))}, "token 0 is no text"),
    ],
)
def test_a_tokenizer_that_is_absent_unknown_or_broken_is_refused(tmp_path: Path, metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        added(tmp_path, metadata=metadata)
    assert said in f"{refused.value.message}: {refused.value.cause}"
    assert registry.listed() == []


def test_a_tokenizer_of_a_folder_is_taken_as_it_is_with_its_template(tmp_path: Path) -> None:
    model = gguf_files.small("llama")
    first = registry.add(str(gguf_files.write(tmp_path / "one.gguf", model)))
    model.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "tokenizer.json").write_bytes((first.folder / "tokenizer.json").read_bytes())
    (tmp_path / "two" / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "auto_map": {"AutoTokenizer": ["evil.T", None]},
                "eos_token": "<|im_end|>",
            }
        )
    )
    (tmp_path / "two" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    made = registry.add(str(tmp_path / "two"))
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"
    assert "auto_map" not in json.loads((made.folder / "tokenizer_config.json").read_text())
    assert tokenizer("hello")["input_ids"] == [TOKENS.index("hello")]
