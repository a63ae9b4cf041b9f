"""What an application gives and gets: responses, and what their users did about them; checked before any of it is kept."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec
from fedloop_events import ids
from fedloop_events.errors import UsageError
from fedloop_events.types import IDENTIFIER_RULE, SIGNAL_RULE, Identifier, Signal
from fedloop_tasks.words import find, normalised
from msgspec import Struct
from msgspec.structs import replace

MAX_TEXT_CHARS: Final = 10_000
MAX_CORRECTION_CHARS: Final = 8_000
MAX_COMMENT_CHARS: Final = 2_000
"""With a text and a correction that are as long as they can be, in letters of up to three bytes, it fits into one event."""
_MOST_CHARS: Final = {"correction": MAX_CORRECTION_CHARS, "comment": MAX_COMMENT_CHARS}

Thumb = Literal["up", "down"]


class UnknownResponseError(UsageError):
    """No response with this id is in the device's store."""


class ConflictingFeedbackError(UsageError):
    """The feedback id is taken by feedback with other content."""


class Response(Struct, frozen=True):
    """One answer of the model; `response_id` is the handle for feedback. `confidence` is in [0, 1].

    On a disk that is full the response cannot be kept: then its id is "", no feedback can name it, and `note` says why. One that
    is `remembered` is no answer of the release: a user of this device has named this label for this question, or one that is as
    similar as `confidence` says.
    """

    response_id: str
    label: str
    confidence: float
    release: str
    note: str = ""
    remembered: bool = False

    @property
    def answer(self) -> str:
        """What was answered, whatever the task is."""
        return self.label


class FeedbackInput(Struct, frozen=True, omit_defaults=True):
    """What a user did about one response, as it was given."""

    thumb: Thumb | None = None
    rating: int | None = None
    label: str | None = None
    correction: str | None = None
    comment: str | None = None
    preferred_over: str | None = None
    signal: str | None = None


class Feedback(Struct, frozen=True):
    """Feedback that is on disk. `teaches` is the answer that it makes a training example for, by what the model learns now; of a
    model that answers in its own words the better answer, if there is one, which is learnt once it is masked.

    `note` says what of it was left out or mended; "" if nothing was.
    """

    feedback_id: str
    response_id: str
    teaches: str | None
    note: str = ""


def check_text(name: str, text: str, most_chars: int) -> None:
    """Raise `UsageError` unless `text` is Unicode with a visible character, of at most `most_chars` characters."""
    if not normalised(text):
        raise UsageError(f"{name} is empty")
    if len(text) > most_chars:
        raise UsageError(f"{name} has {len(text):,} characters, more than {most_chars:,}")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError(f"{name} is not Unicode text: it holds half a surrogate pair")


def check_input(given: FeedbackInput, words: Sequence[str]) -> FeedbackInput:
    """What is given, its label as the model writes it.

    Raises `UsageError` unless a user can have meant this of a model that answers with these words.
    """
    if given == FeedbackInput():
        raise UsageError(
            "the feedback is empty", hint="give a thumb, rating, label, correction, comment, preferred_over or signal"
        )
    if given.thumb not in (None, "up", "down"):
        raise UsageError("thumb must be 'up' or 'down'")
    if given.rating is not None and (type(given.rating) is not int or not 1 <= given.rating <= 5):
        raise UsageError("rating must be a whole number from 1 to 5")
    if given.label is not None:
        given = replace(given, label=check_word("label", given.label, words))
    if given.signal is not None:
        try:
            msgspec.convert(given.signal, Signal)
        except msgspec.ValidationError:
            raise UsageError(f"signal must be {SIGNAL_RULE}") from None
    for name, text in remarks(given):
        check_text(name, text, _MOST_CHARS[name])
    return given


def mended(given: FeedbackInput) -> tuple[FeedbackInput, str]:
    """What of it can be kept, and a note of what cannot: a remark that cannot be one takes nothing else with it.

    Half a surrogate pair becomes U+FFFD. A correction or comment that is empty or too long is left out, unless nothing else is
    given: `check_input` refuses that.
    """
    kept, notes = given, []
    for name, text in remarks(given):
        whole = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
        if whole != text:
            notes.append(f"the {name} held half a character, which U+FFFD stands for now")
            kept = replace(kept, **{name: whole})
        try:
            check_text(name, whole, _MOST_CHARS[name])
        except UsageError as error:
            without = replace(kept, **{name: None})
            if without != FeedbackInput():
                notes.append(f"the {name} is left out: {error.message}")
                kept = without
    return kept, "; ".join(notes)


def with_text(given: FeedbackInput, read: str, note: str) -> tuple[FeedbackInput, str]:
    """The same with the text that was `read` of what its user said or showed, below the comment, as far as there is room; and a
    note of what is missing, after the one there is. Raises `UsageError` if there was nothing to read and nothing else is given.
    """
    found = normalised_lines(read)
    if not found:
        if given == FeedbackInput():
            raise UsageError("nothing is said or written in what was given", hint="give a thumb or a comment beside it")
        return given, "; ".join(filter(None, (note, "nothing is said or written in what was given")))
    comment = f"{given.comment}\n{found}" if given.comment is not None else found
    if len(comment) > MAX_COMMENT_CHARS:
        comment = comment[:MAX_COMMENT_CHARS].rstrip()
        note = "; ".join(filter(None, (note, f"the comment is cut at {MAX_COMMENT_CHARS:,} characters")))
    return replace(given, comment=comment), note


def normalised_lines(text: str) -> str:
    """The lines that show something, each as words a space apart."""
    return "\n".join(filter(None, map(normalised, text.splitlines())))


def remarks(given: FeedbackInput) -> Iterator[tuple[Literal["correction", "comment"], str]]:
    """What is in the user's own words."""
    if given.correction is not None:
        yield "correction", given.correction
    if given.comment is not None:
        yield "comment", given.comment


def check_word(name: str, word: str, words: Sequence[str]) -> str:
    """The one of the words that the model answers with that `word` is, once both are normalised. Raises `UsageError`."""
    # Such words are published as they are: one that is not the model's could be the user's.
    if not words:
        raise UsageError("this device has not seen a model yet", hint="connect this device to the log once: `fedloop agent run`")
    found = find(word, words)
    if found is None:
        near = difflib.get_close_matches(word[:100], words, n=1, cutoff=0.0)
        raise UsageError(
            f"{name} is not one of the model's {len(words)} labels", hint=f"did you mean {near[0]!r}?" if near else ""
        )
    return found


def identifier(name: str, given: str | None) -> str:
    """The id `given`, or a new one. Raises `UsageError` for one that is malformed."""
    try:
        return ids.new_id() if given is None else msgspec.convert(given, Identifier)
    except msgspec.ValidationError:
        raise UsageError(f"{name} must be {IDENTIFIER_RULE}") from None
