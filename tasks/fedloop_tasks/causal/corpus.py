"""Files of conversations, in the formats that TRL's trainers read, strictly: a bad row costs that row alone.

| columns | what a row is |
| --- | --- |
| `messages` | a conversation that ends with the right answer |
| `prompt`, `completion` | a prompt and the right answer |
| `prompt`, `completion`, `label` | a prompt and an answer that a user found good (true) or not |
| `prompt`, `chosen`, `rejected` | a prompt, a better answer and a worse one |
| `chosen`, `rejected` | the same, each with the prompt at its beginning |

A prompt is a text or a list of turns `{"role", "content"}`, an answer a text or a list of one turn. Source: TRL's documentation
of dataset formats. JSON Lines, a JSON array, CSV and Parquet serve, where the cells are texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import msgspec
from fedloop_events.errors import UsageError

from fedloop_tasks.rows.reading import rows_of
from fedloop_tasks.task import BadRow, Message, Messages
from fedloop_tasks.turns import Turn
from fedloop_tasks.words import normalised

MAX_TEXT_CHARS: Final = 10_000
MAX_ROWS: Final = 5_000_000
COLUMNS: Final = ("messages", "prompt", "completion", "chosen", "rejected", "label")
_FORMATS: Final = (("messages",), ("prompt", "completion"), ("chosen", "rejected"))
"""What a file must have at least, one of them."""
_SPOKEN: Final = re.compile(r"\s*\b(Human|Assistant): ?")
"""How conversations are written in one text (Bai et al. 2022, arXiv 2204.05862)."""
_ROLES: Final = {"Human": "user", "Assistant": "assistant"}


class _UnusableError(Exception):
    """Why a row cannot be used, without a word of it."""


def read(path: Path, columns: Mapping[str, str | None] = {}) -> Messages:
    """The file of rows at `path`; `columns` say what those of `COLUMNS` are called in it.

    Rows without a prompt or an answer, with a text longer than `MAX_TEXT_CHARS`, or that are of no format are left out and listed
    with their places. Raises `UsageError` for anything else, and if no row is left.
    """
    rows = rows_of(path)
    names = _columns(path, rows.heads, columns)
    found = Messages(path, [], [], [], rows.unit)
    for count, row in enumerate(rows.cells([at for _, at in names]), 1):
        if count > MAX_ROWS:
            raise UsageError(f"{path} has more than {MAX_ROWS:,} rows", hint="divide it")
        cells = dict(zip([name for name, _ in names], row.cells, strict=False))
        try:
            if row.wrong:
                raise _UnusableError(row.wrong)
            message = _message({name: cell for name, cell in cells.items() if cell not in (None, "")})
        except _UnusableError as error:
            found.bad.append(BadRow(row.at, str(error)))
        else:
            found.rows.append(message)
            found.lines.append(row.at)
    if not found.rows:
        cause = ", ".join(f"{count} skipped: {reason}" for reason, count in found.skipped.items())
        raise UsageError(f"{path} holds no row that can be used", cause=cause)
    return found


def written(messages: Iterable[Message]) -> str:
    """The text of such a file, in JSON Lines."""
    return "".join(msgspec.json.encode(_row(each)).decode() + "\n" for each in messages)


def _columns(path: Path, heads: Sequence[str], columns: Mapping[str, str | None]) -> list[tuple[str, int]]:
    """The columns that are there, by what they mean. Raises `UsageError` if they make no format."""
    found = []
    for name in COLUMNS:
        wanted = columns.get(f"{name}-column")
        at = [at for at, head in enumerate(heads) if normalised(head).casefold() == normalised(wanted or name).casefold()]
        if wanted is not None and not at:
            raise UsageError(f"{path} has no column {wanted!r}", cause=_said(heads))
        if len(at) > 1:
            raise UsageError(f"{path} has the column {wanted or name!r} twice")
        found += [(name, at[0])] if at else []
    if not any(set(needed) <= {name for name, _ in found} for needed in _FORMATS):
        raise UsageError(
            f"{path} holds no conversations",
            cause=_said(heads),
            hint="its columns must be messages; prompt and completion, also with label; or chosen and rejected, also with prompt",
        )
    return found


def _said(heads: Sequence[str]) -> str:
    return f"its columns are {', '.join(filter(None, heads))}"[:300]


def _message(cells: Mapping[str, object]) -> Message:
    """What a row says. Raises `_UnusableError`."""
    if "messages" in cells:
        turns = _turns(cells["messages"], "messages")
        return _of(turns[:-1], _answer(turns[-1:], "messages"))
    if "chosen" in cells and "rejected" in cells:
        if "prompt" in cells:
            prompt = _turns(cells["prompt"], "prompt")
            return _of(prompt, _answer(cells["chosen"], "chosen"), rejected=_answer(cells["rejected"], "rejected"))
        return _pair(cells["chosen"], cells["rejected"])
    if "prompt" not in cells or "completion" not in cells:
        raise _UnusableError("no prompt" if "prompt" not in cells else "no completion")
    good = _judged(cells["label"]) if "label" in cells else None
    return _of(_turns(cells["prompt"], "prompt"), _answer(cells["completion"], "completion"), good=good)


def _of(turns: Sequence[Turn], answer: str, rejected: str | None = None, good: bool | None = None) -> Message:
    if not turns or turns[-1].role != "user":
        raise _UnusableError("the prompt does not end with what a user says")
    for text in (answer, rejected or "", *(turn.content for turn in turns)):
        if len(text) > MAX_TEXT_CHARS:
            raise _UnusableError(f"text longer than {MAX_TEXT_CHARS:,} characters")
    if not normalised(turns[-1].content):
        raise _UnusableError("empty prompt")
    if not normalised(answer) or (rejected is not None and not normalised(rejected)):
        raise _UnusableError("empty answer")
    if answer == rejected:
        raise _UnusableError("the chosen answer is the rejected one")
    return Message(turns[-1].content, answer, tuple(turns[:-1]), rejected, good)


def _pair(chosen: object, rejected: object) -> Message:
    """Two conversations that differ in their ends."""
    if isinstance(chosen, str) and isinstance(rejected, str) and not chosen.lstrip().startswith("["):
        spoken = [_spoken(text) for text in (chosen, rejected)]
        if all(spoken):
            chosen, rejected = ([msgspec.to_builtins(turn) for turn in turns] for turns in spoken)
        else:
            same = len(
                "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))).rstrip()
            )
            return _of([Turn("user", chosen[:same])], chosen[same:].strip(), rejected=rejected[same:].strip())
    better, worse = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    if better[:-1] != worse[:-1]:
        raise _UnusableError("chosen and rejected answer different prompts")
    return _of(better[:-1], _answer(better[-1:], "chosen"), rejected=_answer(worse[-1:], "rejected"))


def _spoken(text: str) -> list[Turn]:
    """The turns of a conversation in one text; none, if it is not written so."""
    start, *parts = _SPOKEN.split(text)
    if start.strip() or not parts:
        return []
    return [Turn(_ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]  # type: ignore[arg-type]


def _turns(cell: object, what: str) -> list[Turn]:
    """A text of a user, or turns. Raises `_UnusableError`."""
    found = _parsed(cell)
    if isinstance(found, str):
        return [Turn("user", _text(found, what))]
    try:
        turns = msgspec.convert(found, list[Turn])
    except msgspec.ValidationError:
        raise _UnusableError(f"{what} is neither text nor turns of system, user and assistant") from None
    return [Turn(turn.role, _text(turn.content, what)) for turn in turns]


def _answer(cell: object, what: str) -> str:
    """A text, or one turn of the assistant. Raises `_UnusableError`."""
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], Turn):
        turns = cell
    elif isinstance(found := _parsed(cell), str):
        return _text(found, what)
    else:
        turns = _turns(found, what)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise _UnusableError(f"{what} does not end with one answer of the assistant")
    answer: str = turns[0].content
    return answer


def _parsed(cell: object) -> object:
    """Turns, also where CSV holds them as JSON."""
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return str(cell) if isinstance(cell, int) and not isinstance(cell, bool) else cell


def _text(text: str, what: str) -> str:
    try:
        return text.encode().decode()
    except UnicodeError:
        raise _UnusableError(f"{what} is no Unicode text") from None


def _judged(cell: object) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    judged = cell if isinstance(cell, bool) else words.get(str(cell).strip().casefold())
    if judged is None:
        raise _UnusableError("the label is neither true nor false")
    return judged


def _row(message: Message) -> dict[str, Any]:
    prompt: Any = message.text
    if message.earlier:
        prompt = [*msgspec.to_builtins(message.earlier), {"role": "user", "content": message.text}]
    if message.rejected is not None:
        return {"prompt": prompt, "chosen": message.answer, "rejected": message.rejected}
    judged = {} if message.good is None else {"label": message.good}
    return {"prompt": prompt, "completion": message.answer, **judged}
