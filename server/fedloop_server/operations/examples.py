"""What there is to train on: the curated examples that count, and as files for other programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from fedloop_events import files, types
from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.training import TrainingView
from fedloop_events.logs.port import EventLog
from fedloop_events.masked import MaskedText
from msgspec import Struct

Format = Literal["trl-sft", "trl-kto", "trl-dpo", "jsonl"]
Row = dict[str, Any]


class Balance(Struct, frozen=True):
    """How many examples of one kind a use case has, by class: a label's name, or "desirable" and "undesirable"."""

    use_case: str
    kind: str
    examples: int
    classes: dict[str, int]


def curated(log: EventLog) -> list[types.ExampleCurated]:
    """The examples that count, in the order in which they were curated."""
    reader = Reader(log, TrainingView(), identities=Identities())
    reader.catch_up()
    return list(reader.fold.examples.values())


def balances(examples: Iterable[types.ExampleCurated]) -> list[Balance]:
    """By use case and kind; the largest class first."""
    counts = Counter((each.use_case, each.kind, _class_of(each)) for each in examples)
    found: dict[tuple[str, str], Balance] = {}
    for (use_case, kind, name), count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0][2] or "")):
        before = found.get((use_case, kind), Balance(use_case, kind, 0, {}))
        classes = before.classes if name is None else before.classes | {name: count}
        found[use_case, kind] = Balance(use_case, kind, before.examples + count, classes)
    return [each for _, each in sorted(found.items())]


def of_format(examples: Sequence[types.ExampleCurated], form: Format, use_case: str | None = None) -> list[types.ExampleCurated]:
    """Those that a file of the format holds, of one use case or of all. Raises `UsageError` if there are none."""
    kind, _ = _FORMATS[form]
    found = [each for each in examples if kind in (None, each.kind) and use_case in (None, each.use_case)]
    if not found:
        there = ", ".join(f"{each.examples} {each.kind} of {each.use_case}" for each in balances(examples))
        what = "curated example" if kind is None else f"curated example of kind {kind}, which {form} holds"
        raise UsageError(
            f"there is no {what}{'' if use_case is None else f', of use case {use_case!r}'}",
            cause=f"there are {there}" if there else "",
            hint="" if there else "`fedloop feedback run` curates examples of what users say",
        )
    return found


def write(examples: Iterable[types.ExampleCurated], form: Format, path: Path, *, replace: bool = False) -> None:
    """Write a file in JSON Lines, whole or not at all. Raises `UsageError` if it cannot be, or (not `replace`) is there."""
    _, row = _FORMATS[form]
    if path.exists() and not (replace and path.is_file()):
        there, hint = ("it is there already", ", or replace it with --force") if path.is_file() else ("it is no file", "")
        raise UsageError(f"the file {path} cannot be written", cause=there, hint=f"name another one{hint}")
    encode = msgspec.json.Encoder().encode
    try:
        with files.new_file(path.parent, f".{path.name}.") as new:
            for each in examples:
                new.file.write(encode(row(each)) + b"\n")
            new.publish(path, replace=replace)
    except OSError as error:
        raise UsageError(f"the file {path} cannot be written", cause=files.reason(error, path)) from None


def _class_of(example: types.ExampleCurated) -> str | None:
    if example.desirable is not None:
        return "desirable" if example.desirable else "undesirable"
    return example.label


# --- rows ----------------------------------------------------------------------------------------------------------------
# Source: TRL's documentation of dataset formats. Always turns: a column that held texts in one row and turns in another would be
# of no type, and a prompt in turns is what a trainer puts the model's chat template around.


def _sft(example: types.ExampleCurated) -> Row:
    return {"prompt": _prompt(example), "completion": _answer(example.completion)}


def _kto(example: types.ExampleCurated) -> Row:
    return {"prompt": _prompt(example), "completion": _answer(example.completion), "label": example.desirable}


def _dpo(example: types.ExampleCurated) -> Row:
    return {"prompt": _prompt(example), "chosen": _answer(example.completion), "rejected": _answer(example.rejected)}


def _all(example: types.ExampleCurated) -> Row:
    """Whose it is stays out: its id is what a withdrawal names."""
    return {
        "example_id": example.example_id,
        "use_case": example.use_case,
        "kind": example.kind,
        "release": example.release,
        "language": example.language,
        "priority": example.priority,
        "context": [{"role": each.role, "content": each.text.text} for each in example.context],
        "text": example.text.text,
        "label": example.label,
        "completion": example.completion and example.completion.text,
        "rejected": example.rejected and example.rejected.text,
        "desirable": example.desirable,
    }


def _prompt(example: types.ExampleCurated) -> list[Row]:
    earlier = [{"role": each.role, "content": each.text.text} for each in example.context]
    return [*earlier, {"role": "user", "content": example.text.text}]


def _answer(text: MaskedText | None) -> list[Row]:
    return [{"role": "assistant", "content": "" if text is None else text.text}]


_FORMATS: Final[dict[Format, tuple[str | None, Callable[[types.ExampleCurated], Row]]]] = {
    "trl-sft": ("sft", _sft),
    "trl-kto": ("kto", _kto),
    "trl-dpo": ("dpo", _dpo),
    "jsonl": (None, _all),
}
