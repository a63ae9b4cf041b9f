"""Text that has passed the masker: the only text that an event can hold."""

from __future__ import annotations

from typing import Annotated, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct

MAX_MASKED_CHARS = 12_000


class _MintedOnly(msgspec.StructMeta):
    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("MaskedText is made by the masker alone (fedloop_privacy.masking), or decoded from the log")


class MaskedText(Struct, frozen=True, forbid_unknown_fields=True, gc=False, metaclass=_MintedOnly):
    """A text in which personal values are replaced by typed placeholders, such as `<PERSON_1>`.

    It cannot be constructed: the masker mints it, and decoding an event restores one that was minted elsewhere. `counts` is the
    number of masked spans by type.
    """

    text: Annotated[str, Meta(max_length=MAX_MASKED_CHARS)]
    counts: dict[Annotated[str, Meta(max_length=40)], Annotated[int, Meta(ge=1)]] = {}

    @classmethod
    def _from_masker(cls, text: str, counts: dict[str, int]) -> MaskedText:
        return msgspec.convert({"text": text, "counts": counts}, cls)


class MaskedTurn(Struct, frozen=True, forbid_unknown_fields=True):
    """What one side of a conversation has written."""

    role: Literal["system", "user", "assistant"]
    text: MaskedText
