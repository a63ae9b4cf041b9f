"""Publishing feedback: first its texts are masked in the store, then events are made of what is masked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from fedloop_events import types
from fedloop_events.errors import InvalidEventError
from fedloop_events.masked import MaskedText
from fedloop_privacy.masking import MaskingError

from fedloop_clients.device import Device
from fedloop_clients.interactions import Unpublished

_BATCH: Final = 50
_MADE_HERE: Final = re.compile(r"[0-9a-f]{32}")


class Publisher:
    """Takes captured feedback to the outbox. `mask` raises `MaskingError`; what it cannot mask stays on the device."""

    def __init__(self, device: Device, mask: Callable[[str], MaskedText]) -> None:
        self._device, self._mask = device, mask

    def publish(self) -> bool:
        """Mask what is captured, put a batch of it and all due retractions into the outbox; whether there was any."""
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
        return bool(due or taken_back)

    def _mask_captured(self) -> None:
        while due := self._device.interactions.unmasked(_BATCH):
            masked: dict[tuple[str, str], MaskedText] = {}
            failures: dict[str, str] = {}
            for each in due:
                if (each.owner, each.kind) not in masked:
                    try:
                        masked[each.owner, each.kind] = self._mask(each.raw)
                    except MaskingError as error:
                        failures[each.feedback_id] = error.cause or error.message
            with self._device.store.transaction():  # not while the masker works: another process may want to record feedback
                for each in due:
                    if (found := masked.get((each.owner, each.kind))) is not None:
                        self._device.interactions.mask(each.owner, each.kind, found)
                for feedback_id, failure in failures.items():
                    self._device.interactions.failed(feedback_id, failure)

    def _published_id(self, response_id: str) -> str:
        """Of a response whose id a caller chose, before such ids were derived: the digest of its feedback holds that id."""
        made_here = _MADE_HERE.fullmatch(response_id)
        return response_id if made_here else self._device.identity.derived_id("response", response_id)

    def _publish(self, each: Unpublished) -> None:
        """One piece of feedback and the counts of what was masked in it, as two events that are due together."""
        counts: dict[str, int] = {}
        for text in (each.prompt, each.correction, each.comment):
            for kind, count in text.counts.items() if text else ():
                counts[kind] = counts.get(kind, 0) + count
        me = self._device.identity
        with self._device.store.transaction():
            if not self._device.interactions.published(each.feedback_id):
                return  # it was retracted meanwhile
            if not each.logged:
                self._device.outbox.add(
                    lambda seq: types.FeedbackRecorded(
                        origin=me.origin,
                        client_id=me.client_id,
                        seq=seq,
                        feedback_id=each.feedback_id,
                        response_id=self._published_id(each.response_id),
                        release=each.release,
                        use_case=self._device.settings.model,
                        text=each.prompt,
                        predicted=each.predicted,
                        thumb=each.thumb,
                        rating=each.rating,
                        label=each.label,
                        correction=each.correction,
                        comment=each.comment,
                    )
                )
                self._device.outbox.add(
                    lambda seq: types.TextMasked(
                        origin=me.origin, client_id=me.client_id, seq=seq, feedback_id=each.feedback_id, counts=counts
                    )
                )

    def _retract(self, feedback_id: str) -> None:
        """Its sequence number is above the feedback's own, so that no reader sees it first."""
        me = self._device.identity
        with self._device.store.transaction():
            self._device.outbox.add(
                lambda seq: types.FeedbackRetracted(origin=me.origin, client_id=me.client_id, seq=seq, feedback_id=feedback_id)
            )
            self._device.retractions.announced(feedback_id)
