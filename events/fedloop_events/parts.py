"""Decisions that are too large for one event: their lists stand in events of their own, the parts, before the event that decides.

The event that decides names its parts by the SHA-256 of their data, and comes last: order holds within a run, so whoever reads
it has read them. Without it, parts are nothing: a server that is killed in between has decided nothing yet. An event that lists
everything itself is the common case, and has no parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from fedloop_events.envelope import Record
from fedloop_events.types import (
    MAX_PARTS,
    ClassificationSpec,
    CohortListed,
    EpochStarted,
    Exclusion,
    LabelsListed,
    ModelRegistered,
    Payload,
    RepliesListed,
    RoundOpened,
    StepCollected,
)

PART_BYTES: Final = 40 * 1024
"""Of the lists in one event; with the terms of a round, or a name of 80 letters, it still fits into 60 KiB."""
MAX_PENDING: Final = 2 * MAX_PARTS
"""Parts that wait for the event that names them; the oldest give way."""

T = TypeVar("T")


def split(payload: Payload) -> list[Payload]:
    """The events that make up `payload`, in the order in which they are to be appended: parts, then what names them."""
    found: Iterator[Payload]
    rest: RoundOpened | StepCollected | ModelRegistered
    match payload:
        case RoundOpened():
            listed: Sequence[object] = [*payload.cohort, *payload.excluded]
            found, rest = _of_round(payload), replace(payload, cohort=[], excluded=[])
        case StepCollected():
            listed = [*payload.accepted, *payload.excluded]
            found, rest = _of_step(payload), replace(payload, accepted=[], excluded=[])
        case ModelRegistered(spec=ClassificationSpec() as spec):
            listed = spec.labels
            found, rest = _of_model(payload, spec.labels), replace(payload, spec=replace(spec, labels=[]))
        case _:
            return [payload]
    if sum(map(_size, listed)) <= PART_BYTES:
        return [payload]
    parts = list(found)
    names = [hashlib.sha256(msgspec.json.encode(each)).hexdigest() for each in parts]
    return [*parts, replace(rest, parts=names)]


class Parts(Struct):
    """The parts that were read, by the hash of their data, and wait for the event that names them."""

    cohorts: dict[str, CohortListed] = {}
    replies: dict[str, RepliesListed] = {}
    labels: dict[str, LabelsListed] = {}

    def join(self, record: Record, payload: Payload, *, partly: bool) -> Payload | None:
        """An event with what its parts hold: None for a part by itself, and for an event that names a part which was not read.

        With `partly`, such an event of a run holds what its other parts do. An epoch's parts are of no use to the next one.
        """
        match payload:
            case CohortListed():
                _keep(self.cohorts, record, payload)
                return None
            case RepliesListed():
                _keep(self.replies, record, payload)
                return None
            case RoundOpened(parts=[_, *_]):
                listed = [each for name in payload.parts if (each := self.cohorts.pop(name, None)) is not None]
                if len(listed) < len(payload.parts) and not partly:
                    return None
                cohort = [*payload.cohort, *(name for each in listed for name in each.cohort)]
                return replace(payload, cohort=cohort, excluded=_excluded(payload, listed), parts=[])
            case StepCollected(parts=[_, *_]):
                found = [part for name in payload.parts if (part := self.replies.pop(name, None)) is not None]
                if len(found) < len(payload.parts) and not partly:
                    return None
                accepted = [*payload.accepted, *(update for each in found for update in each.accepted)]
                return replace(payload, accepted=accepted, excluded=_excluded(payload, found), parts=[])
            case LabelsListed():
                _keep(self.labels, record, payload)
                return None
            case ModelRegistered(parts=[_, *_]):
                spec = payload.spec
                if not (isinstance(spec, ClassificationSpec) and all(name in self.labels for name in payload.parts)):
                    return None
                labels = [*spec.labels, *(label for name in payload.parts for label in self.labels.pop(name).labels)]
                return replace(payload, spec=replace(spec, labels=labels), parts=[])
            case EpochStarted():
                self.cohorts = {name: each for name, each in self.cohorts.items() if each.run_id != payload.run_id}
                self.replies = {name: each for name, each in self.replies.items() if each.run_id != payload.run_id}
            case _:
                pass
        return payload


def _of_round(opened: RoundOpened) -> Iterator[Payload]:
    """Those who were not chosen stand apart: a part is seen by the cohort that it lists."""
    for names in _pieces(opened.cohort):
        yield CohortListed(opened.origin, opened.epoch, opened.run_id, opened.round_id, cohort=names)
    for excluded in _pieces(opened.excluded):
        yield CohortListed(opened.origin, opened.epoch, opened.run_id, opened.round_id, excluded=excluded)


def _of_step(collected: StepCollected) -> Iterator[Payload]:
    common = (collected.origin, collected.epoch, collected.run_id, collected.step)
    for accepted in _pieces(collected.accepted):
        yield RepliesListed(*common, accepted=accepted, round_id=collected.round_id)
    for excluded in _pieces(collected.excluded):
        yield RepliesListed(*common, excluded=excluded, round_id=collected.round_id)


def _of_model(registered: ModelRegistered, every: Sequence[str]) -> Iterator[Payload]:
    for labels in _pieces(every):
        yield LabelsListed(registered.origin, registered.model, labels)


def _pieces(items: Sequence[T]) -> Iterator[list[T]]:
    """`items`, in order, in lists of at most `PART_BYTES`."""
    piece: list[T] = []
    left = PART_BYTES
    for each in items:
        size = _size(each)
        if piece and size > left:
            yield piece
            piece, left = [], PART_BYTES
        piece.append(each)
        left -= size
    if piece:
        yield piece


def _size(item: object) -> int:
    return len(msgspec.json.encode(item)) + 1


def _keep(pending: dict[str, T], record: Record, part: T) -> None:
    pending[hashlib.sha256(record.data).hexdigest()] = part
    if len(pending) > MAX_PENDING:
        del pending[next(iter(pending))]


def _excluded(payload: RoundOpened | StepCollected, parts: Sequence[CohortListed | RepliesListed]) -> list[Exclusion]:
    return [*payload.excluded, *(exclusion for each in parts for exclusion in each.excluded)]
