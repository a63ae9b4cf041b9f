"""Publishing feedback: first its texts are masked in the store, then events are made of what is masked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Final

from fedloop_events import types
from fedloop_events.envelope import MAX_EVENT_BYTES, size_bytes
from fedloop_events.errors import InvalidEventError
from fedloop_events.masked import MaskedText
from fedloop_privacy.masking import MaskingError
from msgspec.structs import replace

from fedloop_clients.device import Device
from fedloop_clients.texts import Kind, RawText, newest
from fedloop_clients.unpublished import Unpublished

_BATCH: Final = 50
_MADE_HERE: Final = re.compile(r"[0-9a-f]{32}")
_LAST_SEQ: Final = 2**53 - 1


class Publisher:
    """Takes captured feedback to the outbox. `mask` takes texts that belong together, and raises `MaskingError`; what it cannot
    mask stays on the device."""

    def __init__(self, device: Device, mask: Callable[[Sequence[str]], list[MaskedText]]) -> None:
        self._device, self._mask = device, mask

    def publish(self) -> bool:
        """Mask what is captured, put a batch of it, all due retractions and summaries into the outbox; whether there was any."""
        self._mask_captured()
        due = self._device.interactions.unpublished(_BATCH)
        for each in due:
            try:
                self._publish(each)
            except InvalidEventError:
                self._device.interactions.failed(each.feedback_id, "too large for one event")
        taken_back = self._device.retractions.due()
        for feedback_id in taken_back:
            self._retract(feedback_id)
        summarised = self._device.usage.summarise(self._device.outbox, self._device.identity)
        return bool(due or taken_back or summarised)

    def _mask_captured(self) -> None:
        while due := self._device.interactions.unmasked(_BATCH):
            masked: dict[tuple[str, Kind, int], MaskedText] = {}
            failures: dict[str, str] = {}
            for feedback_id, texts in groupby(due, lambda each: each.feedback_id):
                failure = self._mask_together([each for each in texts if each.place not in masked], masked)
                if failure:
                    failures[feedback_id] = failure
            with self._device.store.transaction():  # not while the masker works: another process may want to record feedback
                for (owner, kind, number), found in masked.items():
                    self._device.interactions.mask(owner, kind, found, number)
                    self._device.usage.masked(owner, found.counts)
                for feedback_id, failure in failures.items():
                    self._device.interactions.failed(feedback_id, failure)

    def _mask_together(self, texts: Sequence[RawText], masked: dict[tuple[str, Kind, int], MaskedText]) -> str:
        """Add to `masked` what can be masked, and give why the rest cannot."""
        try:
            masked |= zip((each.place for each in texts), self._mask([each.raw for each in texts]), strict=True)
            return ""
        except MaskingError as error:
            if len(texts) == 1:
                return error.cause or error.message
        return next(filter(None, [self._mask_together([each], masked) for each in texts]), "")

    def _published_id(self, response_id: str) -> str:
        """Of a response whose id a caller chose, before such ids were derived: the digest of its feedback holds that id."""
        made_here = _MADE_HERE.fullmatch(response_id)
        return response_id if made_here else self._device.identity.derived_id("response", response_id)

    def _publish(self, each: Unpublished) -> None:
        """One piece of feedback and the counts of what was masked in it, as two events that are due together."""
        me, recorded = self._device.identity, fitting(self._recorded(each))
        with self._device.store.transaction():
            if not self._device.interactions.published(each.feedback_id):
                return  # it was retracted meanwhile
            if not (each.logged or each.of_device):
                if recorded.signal is not None:
                    self._device.usage.signalled(each.release, recorded.signal)
                self._device.outbox.add(lambda seq: replace(recorded, seq=seq))
                self._device.outbox.add(
                    lambda seq: types.TextMasked(
                        origin=me.origin, client_id=me.client_id, seq=seq, feedback_id=each.feedback_id, counts=_counts(recorded)
                    )
                )

    def _recorded(self, each: Unpublished) -> types.FeedbackRecorded:
        me = self._device.identity
        return types.FeedbackRecorded(
            origin=me.origin,
            client_id=me.client_id,
            seq=_LAST_SEQ,
            feedback_id=each.feedback_id,
            response_id=self._published_id(each.response_id),
            release=each.release,
            use_case=self._device.settings.use_case,
            text=each.prompt,
            context=each.context,
            turns_left_out=each.left_out,
            predicted=each.predicted,
            response=each.response if each.predicted is None else None,
            thumb=each.thumb,
            rating=each.rating,
            label=each.label,
            correction=each.correction,
            comment=each.comment,
            preferred_over=each.preferred_over and self._published_id(each.preferred_over),
            signal=self._harmless(each.signal),
        )

    def _harmless(self, signal: str | None) -> str | None:
        """A signal in which the masker finds nothing; another one stays here."""
        try:
            return signal if signal is not None and self._mask([signal])[0].text == signal else None
        except MaskingError:
            return None

    def _retract(self, feedback_id: str) -> None:
        """Its sequence number is above the feedback's own, so that no reader sees it first."""
        me = self._device.identity
        with self._device.store.transaction():
            self._device.outbox.add(
                lambda seq: types.FeedbackRetracted(origin=me.origin, client_id=me.client_id, seq=seq, feedback_id=feedback_id)
            )
            self._device.retractions.announced(feedback_id)


def fitting(recorded: types.FeedbackRecorded) -> types.FeedbackRecorded:
    """The event without what it has no room for: the oldest turns of the context first, then the answer.

    One that is too large all the same is given as it is then.
    """
    if (over := size_bytes(recorded) - MAX_EVENT_BYTES) <= 0:
        return recorded
    sizes = [size_bytes(turn) + 1 for turn in recorded.context]  # with its comma
    more = len(str(_LAST_SEQ)) + len(',"turns_left_out":')
    kept = newest(recorded.context, sizes, sum(sizes) - over - more)
    left_out = recorded.turns_left_out + len(recorded.context) - len(kept)
    shorter = replace(recorded, context=list(kept), turns_left_out=left_out)
    return shorter if size_bytes(shorter) <= MAX_EVENT_BYTES else replace(shorter, response=None)


def _counts(recorded: types.FeedbackRecorded) -> dict[str, int]:
    """What was masked in the texts of the event, by type."""
    texts: Iterable[MaskedText | None] = (
        *(turn.text for turn in recorded.context),
        recorded.text,
        recorded.response,
        recorded.correction,
        recorded.comment,
    )
    counts: dict[str, int] = {}
    for text in texts:
        for kind, count in text.counts.items() if text else ():
            counts[kind] = counts.get(kind, 0) + count
    return counts
