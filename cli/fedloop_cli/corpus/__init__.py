"""The demo's corpus: invented messages to a bank's support desk, each with its intent and the personal values planted in it."""

from __future__ import annotations

import csv
import io
import json
import re
from importlib import resources
from typing import Literal, NamedTuple

from fedloop_cli.corpus.answers import ANSWERS, PUBLIC


class CorpusMessage(NamedTuple):
    """`planted` names each personal value of the text and its type, exactly as it stands there."""

    text: str
    answer: str
    planted: tuple[tuple[str, str], ...] = ()


def load(part: Literal["train", "test"], *, spoken: bool = False) -> list[CorpusMessage]:
    """2,400 messages to give feedback on, or 360 held-out ones, a third of them worded as none of the others is.

    The answer is what a message is about, or, if it is `spoken`, what the bank says to that.
    """
    text = resources.files(__name__).joinpath(f"{part}.csv").read_text("utf-8")
    return [
        CorpusMessage(
            row["text"],
            ANSWERS[row["intent"]] if spoken else row["intent"],
            tuple((kind, value) for kind, value in json.loads(row["planted"])),
        )
        for row in csv.DictReader(io.StringIO(text, newline=""))
    ]


def public() -> list[CorpusMessage]:
    """Questions that the bank itself publishes, with what it says to them."""
    return [CorpusMessage(question, ANSWERS[intent]) for intent, question in PUBLIC.items()]


def ordinary_words() -> set[str]:
    """The words of the templates, in lower case: a name that is also one of them proves nothing."""
    from fedloop_cli.corpus import templates

    texts = [*templates.OPENINGS, *templates.CLOSINGS, *templates.SHOPS, *templates.WEEKDAYS, *templates.DAYS]
    texts += [text for known in templates.INTENTS.values() for text in known]
    texts += [text for each in public() for text in each[:2]]
    return {word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text)}
