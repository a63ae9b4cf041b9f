"""The tokenizer in a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

A GGUF file holds the vocabulary, the merges and the name of how texts are split before them; what a name means is llama.cpp's
convention (`llama-vocab.cpp`). A name that is not listed here is refused: a guess would tokenise otherwise than the model has
learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedloop_events.errors import UsageError

from fedloop_tasks.models.gguf_file import GgufFile

TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CONTROL, USER_DEFINED = 3, 4
NAMES: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: Final[Mapping[str, Sequence[Mapping[str, Any]]]] = {
    "gpt-2": [_BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    **{
        name: [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            _BYTES | {"use_regex": False},
        ]
        for name, pattern in (("llama-bpe", _LLAMA3), ("qwen2", _QWEN2), ("tekken", _TEKKEN))
    },
}
WHOLE_TOKENS_FIRST: Final = {"llama-bpe", "tekken"}
"""Whose vocabulary is looked up before anything is merged, and whose texts have a beginning unless the file says otherwise."""


def byte_alphabet() -> dict[int, str]:
    """The character by which a byte-level vocabulary writes each byte (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def tokenizer_files(file: GgufFile, vocab_size: int, max_tokens: int) -> dict[str, bytes]:
    """Both files. Raises UsageError if the file has no tokenizer, or one that is broken or of a kind that is not known."""
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise UsageError(f"{file.path} has no tokenizer", hint="take a file that has one")
    model, split = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str, "")
    if model != "gpt2" or split not in SPLITS:
        raise UsageError(
            f"{file.path} has a tokenizer of the kind {model[:40]!r}, {split[:40]!r}, which cannot be used",
            hint=f"take a file with byte-level BPE that splits as {', '.join(SPLITS)}, or the Hugging Face folder",
        )
    tokens = _tokens(file, vocab_size)
    vocab = {token: number for number, token in enumerate(tokens)}
    special = _special(file, tokens)
    begins = special.get("bos_token") if file.get("tokenizer.ggml.add_bos_token", bool, split in WHOLE_TOKENS_FIRST) else None
    splits = SPLITS[split]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(file, tokens, special),
        "normalizer": None,
        "pre_tokenizer": splits[0] if len(splits) == 1 else {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None if begins is None else _beginning(begins, vocab[begins]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split in WHOLE_TOKENS_FIRST,
            "vocab": vocab,
            "merges": _merges(file, vocab),
        },
    }
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.get("tokenizer.chat_template", str)
    return {TOKENIZER: as_json(document), TOKENIZER_CONFIG: as_json(config)}


def ids(file: GgufFile) -> dict[str, int]:
    """The ids of the tokens that begin and end a text and fill it up, as `config.json` names them; those that there are."""
    found = {
        f"{name}_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMES.items() if name != "unk_token"
    }
    return {name: number for name, number in found.items() if type(number) is int}


def as_json(document: object) -> bytes:
    """As a file: the same bytes for the same value. (Limits on lengths are written as integers of more than 64 bits.)"""
    return json.dumps(document, indent=2).encode() + b"\n"


def _tokens(file: GgufFile, vocab_size: int) -> list[str]:
    """The vocabulary in the byte alphabet, in which a byte-level tokenizer spells; a token that is written otherwise is
    respelled, unless it is one that stands in texts as it is."""
    alphabet = byte_alphabet()
    letters, kinds = set(alphabet.values()), _kinds(file)
    written: list[str] = file.get("tokenizer.ggml.tokens", list)
    tokens = []
    for number, token in enumerate(written):
        if type(token) is not str or not token:
            raise _broken(file, f"token {number} is no text")
        as_is = set(token) <= letters or (number < len(kinds) and kinds[number] == USER_DEFINED)
        tokens.append(token if as_is else "".join(alphabet[byte] for byte in token.encode()))
    if len(set(tokens)) != len(tokens):
        raise _broken(file, "a token is there twice")
    if len(tokens) > vocab_size:
        raise _broken(file, f"there are {len(tokens):,} tokens, and the model knows {vocab_size:,}")
    return tokens


def _kinds(file: GgufFile) -> list[Any]:
    return list(file.get("tokenizer.ggml.token_type", list, []))


def _merges(file: GgufFile, vocab: Mapping[str, int]) -> list[list[str]]:
    merges = []
    for merge in file.get("tokenizer.ggml.merges", list):
        pair = merge.split(" ") if type(merge) is str else []
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise _broken(file, f"the merge {str(merge)[:80]!r} is not of two tokens that make a third")
        merges.append(pair)
    return merges


def _special(file: GgufFile, tokens: Sequence[str]) -> dict[str, str]:
    found = {}
    for name, key in NAMES.items():
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            if type(number) is not int or not 0 <= number < len(tokens):
                raise _broken(file, f"its {key} token is number {number!r:.20} of {len(tokens):,}")
            found[name] = tokens[number]
    return found


def _added(file: GgufFile, tokens: Sequence[str], special: Mapping[str, str]) -> list[dict[str, Any]]:
    """The tokens that stand for themselves wherever they are in a text; a control token is special."""
    kinds, named = _kinds(file), set(special.values())
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for number, token in enumerate(tokens)
        if (kind := kinds[number] if number < len(kinds) else None) in (CONTROL, USER_DEFINED) or token in named
    ]


def _beginning(token: str, number: int) -> dict[str, Any]:
    """Puts `token` before each text."""
    text, other = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    before, again = ({"SpecialToken": {"id": token, "type_id": n}} for n in (0, 1))
    return {
        "type": "TemplateProcessing",
        "single": [before, text],
        "pair": [before, text, again, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _broken(file: GgufFile, cause: str) -> UsageError:
    return UsageError(f"the tokenizer in {file.path} is broken", cause=cause)
