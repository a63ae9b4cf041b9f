"""The tokenizer of a Hugging Face folder as the metadata of a GGUF file: what `tokenizer.py` reads, the other way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedloop_events.errors import UsageError

from fedloop_tasks.models.tokenizer import CONTROL, NAMES, SPLITS, USER_DEFINED, WHOLE_TOKENS_FIRST

_NORMAL, _UNUSED = 1, 5
_NFC_TOO: Final = {"qwen2"}
"""Kinds whose texts may be normalised to NFC first in a folder: llama.cpp knows the kind and leaves that out."""


def vocabulary(document: Mapping[str, Any], config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The keys `tokenizer.*` of `tokenizer.json` and `tokenizer_config.json`, with a token for each of the `size` rows of the
    embedding: those that nothing names are unused ones, as llama.cpp's converter writes them.

    Raises UsageError for a tokenizer that llama.cpp would not split texts as.
    """
    kind, model = _kind(document), document["model"]
    added = {each["id"]: each for each in document.get("added_tokens") or ()}
    contents = {number: token for token, number in model["vocab"].items()} | {n: each["content"] for n, each in added.items()}
    if not contents or max(contents) >= size:
        raise _refused(f"it has the token {max(contents, default=0):,}, and the model knows {size:,}")
    types = {n: CONTROL if each.get("special") else USER_DEFINED for n, each in added.items()}
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": [contents.get(n, f"[PAD{n}]") for n in range(size)],
        "tokenizer.ggml.token_type": [types.get(n, _NORMAL) if n in contents else _UNUSED for n in range(size)],
        "tokenizer.ggml.merges": [each if isinstance(each, str) else " ".join(each) for each in model["merges"]],
    }
    numbers = {token: number for number, token in contents.items()}
    named = {name: _content(config.get(name)) for name in NAMES}
    for name, key in NAMES.items():
        if (number := numbers.get(named[name])) is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = number
    found["tokenizer.ggml.add_bos_token"] = _begins(document.get("post_processor"), named["bos_token"])
    found["tokenizer.ggml.add_space_prefix"] = False
    if isinstance(template := config.get("chat_template"), str):
        found["tokenizer.chat_template"] = template
    return found


def _kind(document: Mapping[str, Any]) -> str:
    """What llama.cpp calls how texts are split before they are merged. Raises UsageError for another way."""
    model = document.get("model") or {}
    if model.get("type") != "BPE" or (document.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refused("it is no byte-level BPE")
    splits = _comparable(document.get("pre_tokenizer") or {})
    kinds = [
        kind
        for kind, known in SPLITS.items()
        if splits == _comparable({"pretokenizers": known}) and bool(model.get("ignore_merges")) == (kind in WHOLE_TOKENS_FIRST)
    ]
    if not kinds:
        raise _refused("it splits texts in a way of its own")
    normalizer = (document.get("normalizer") or {}).get("type")
    if normalizer not in ({None, "NFC"} if kinds[0] in _NFC_TOO else {None}):
        raise _refused(f"it changes texts first ({normalizer})")
    return kinds[0]


def _comparable(pre_tokenizer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Its steps, with what they are where nothing is said, and without what concerns offsets alone."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    filled = [{"use_regex": True, **each} if each.get("type") == "ByteLevel" else each for each in steps]
    return [{key: value for key, value in each.items() if key != "trim_offsets"} for each in filled]


def _begins(processor: Mapping[str, Any] | None, bos: str) -> bool:
    """Whether each text gets the token `bos` before it. Raises UsageError for one that gets something else."""
    steps = (processor or {}).get("processors", [processor] if processor else [])
    begins = False
    for step in (each for each in steps if each.get("type") != "ByteLevel"):
        single = [next(iter(each.items())) for each in step.get("single") or ()]
        begins = single[:1] == [("SpecialToken", {"id": bos, "type_id": 0})]
        if step.get("type") != "TemplateProcessing" or [name for name, _ in single[begins:]] != ["Sequence"]:
            raise _refused("it puts other tokens around a text than the one that begins it")
    return begins


def _content(token: Any) -> str:
    """`tokenizer_config.json` names a token by its text, or by an object that has it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _refused(cause: str) -> UsageError:
    return UsageError(
        "the base model's tokenizer cannot be written into a GGUF file",
        cause=cause,
        hint="export it as merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
    )
