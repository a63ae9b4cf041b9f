"""The texts of interactions in the device's store: each as it was written or masked, never both."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_tasks.turns import Turn
from msgspec import Struct

Kind = Literal["system", "user", "assistant", "prompt", "response", "correction", "comment"]
"""The first three are of the turns before the prompt."""


class RawText(Struct, frozen=True):
    """A text that is to be masked before the feedback can be published; `number` tells the turns of one conversation apart."""

    feedback_id: str
    owner: str
    kind: Kind
    number: int
    raw: str

    @property
    def place(self) -> tuple[str, Kind, int]:
        """Where it stands in the store."""
        return self.owner, self.kind, self.number


OF_FEEDBACK: Final = "kind IN ('correction', 'comment')"
"""Owned by feedback; all others are owned by responses. An id of the one may be one of the other."""
_OWN: Final = f"""
    (texts.owner = feedback.feedback_id AND texts.{OF_FEEDBACK}
     OR texts.owner IN (feedback.response_id, feedback.preferred_over) AND NOT texts.{OF_FEEDBACK})
"""
"""The texts that feedback is about."""
ANY_RAW: Final = f"EXISTS (SELECT 1 FROM texts WHERE {_OWN} AND raw IS NOT NULL)"
"""Whether one of them is still to be masked."""
UNMASKED: Final = f"""
SELECT feedback_id, owner, kind, texts.number, raw
FROM (SELECT * FROM feedback WHERE state = 'captured' AND {ANY_RAW} ORDER BY number LIMIT ?) AS feedback JOIN texts ON {_OWN}
WHERE raw IS NOT NULL
ORDER BY feedback.number, owner IS preferred_over,
    CASE kind WHEN 'prompt' THEN 1 WHEN 'response' THEN 2 WHEN 'correction' THEN 3 WHEN 'comment' THEN 4 ELSE 0 END, texts.number
"""
"""Of that many pieces of feedback, each one's as they follow in the conversation."""
_TURN: Final = "owner = responses.response_id AND kind IN ('system', 'user', 'assistant')"
TURNS_MASKED: Final = f"(turns = 0 OR NOT EXISTS (SELECT 1 FROM texts WHERE {_TURN} AND raw IS NOT NULL))"
CONTEXT: Final = f"""
    CASE WHEN turns THEN (
        SELECT group_concat('{{"role":"' || kind || '","text":' || CAST(masked AS TEXT) || '}}')
        FROM (SELECT kind, masked FROM texts WHERE {_TURN} ORDER BY number)
    ) END
"""
"""The turns before a response's prompt, all of which are masked: what `context` takes."""

OF_MODEL: Final = "(remembered IS NULL OR predicted IS NULL)"
"""Whether a thumb or rating is about what the response says, not about a label that was remembered in place of `predicted`."""

of = msgspec.json.Decoder(MaskedText).decode
"""The text of a column `masked` that holds one."""
_decode_turns = msgspec.json.Decoder(list[MaskedTurn]).decode


def masked(data: bytes | None) -> MaskedText | None:
    """The text of a column `masked`, if it holds one."""
    return None if data is None else of(data)


def context(data: str | None) -> list[MaskedTurn]:
    """What `CONTEXT` gives."""
    return _decode_turns(f"[{data}]") if data else []


def asked(turns: Sequence[Turn]) -> bytes:
    """The digest by which the same question is known again: of the prompt and all turns before it, as they were written."""
    return hashlib.sha256(msgspec.json.encode(turns)).digest()


def write(db: Any, owner: str, kind: Kind, raw: str | None, found: MaskedText | None = None, number: int = 0) -> None:
    """Keep a text as it was written, or masked if it is masked already; nothing, if there is neither."""
    if raw is not None or found is not None:
        kept = None if found else raw, found and msgspec.json.encode(found)
        db.execute("INSERT INTO texts VALUES (?, ?, ?, ?, ?)", (owner, kind, number, *kept))


def mask(db: Any, place: tuple[str, Kind, int], found: MaskedText) -> None:
    """Keep the masked text in place of what was written."""
    db.execute(
        "UPDATE texts SET masked = ?, raw = NULL WHERE owner = ? AND kind = ? AND number = ?",
        (msgspec.json.encode(found), *place),
    )


def newest(turns: Sequence[Any], sizes: Sequence[int], room: int) -> Sequence[Any]:
    """As many of the newest turns as have room, and begin where a conversation can: with the system or a user."""
    start = len(turns)
    while start and (room := room - sizes[start - 1]) >= 0:
        start -= 1
    while start < len(turns) and turns[start].role == "assistant":
        start += 1
    return turns[start:]
