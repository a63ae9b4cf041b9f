"""What the second gate held back: which devices it comes from, and what an operator decides about it.

A decision holds once: of several about one event the first in the log counts.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal, NamedTuple

from fedloop_events import ids, topics
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import InvalidEventError, PolicyError, UsageError
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.types import (
    EventQuarantined,
    FeedbackRecorded,
    FeedbackRetracted,
    Payload,
    QuarantineDecided,
    ScoreWithdrawn,
    newest,
)
from fedloop_events.writer import EventWriter
from msgspec import Struct

from fedloop_server.feedback.operator import event_of
from fedloop_server.feedback.operators import gate
from fedloop_server.feedback.operators.scoring import LOOKS_PERSONAL, Scoring
from fedloop_server.operations import commands

OVER_HOURS: Final = 7 * 24
_HOUR_MS: Final = 3_600_000
OFTEN: Final = 0.05
OFTEN_AT_LEAST: Final = 3
"""A device's masker misses often if that many pieces of its feedback looked personal within `OVER_HOURS` of the latest, and that
share of them."""
Decision = Literal["release", "drop"]
_STATUS: Final = {"release": "released", "drop": "dropped"}
_LIST: Final = "`fedloop feedback quarantine list` shows what is held back"


class Held(Struct, frozen=True):
    """An event that was held back. Times are in ms since 1970; `given_ms` is the device's own, 0 if it is not known."""

    event_id: str
    status: str
    """"held", "released" or "dropped"."""
    why: str
    """Of the decision; "" before."""
    decided_ms: int
    reason: str
    detail: str
    found: dict[str, int]
    source_topic: str
    client_id: str | None
    use_case: str | None
    release: str | None
    given_ms: int
    recorded_ms: int


class Misses(Struct, frozen=True):
    """How much of a client's feedback looked personal lately."""

    client_id: str
    held: int
    feedback: int

    @property
    def share(self) -> float:
        return self.held / max(self.held, self.feedback)

    @property
    def often(self) -> bool:
        return self.held >= OFTEN_AT_LEAST and self.share >= OFTEN


class Listed(Struct, frozen=True):
    """All that the log still has of the quarantine, the latest last. `found` counts values by type, `reasons` events."""

    events: list[Held]
    found: dict[str, int]
    reasons: dict[str, int]
    clients: list[Misses]
    """Those of whom something looked personal lately, the worst first."""


class Shown(Struct, frozen=True):
    """Where an event stands, if the log still holds it, and its texts, if they were asked for."""

    held: Held
    stream: str | None
    offset: int | None
    texts: list[str] | None


class _Source(NamedTuple):
    """A piece of feedback as its author signed it, and whether its user has taken it back."""

    given: tuple[Record, FeedbackRecorded]
    retracted: bool


def listed(log: EventLog) -> Listed:
    found = _read(log).listed()
    end, feedback = _feedback_by_client(log)
    lately = [each for each in found if each.reason == LOOKS_PERSONAL and each.recorded_ms // _HOUR_MS > end - OVER_HOURS]
    held = Counter(each.client_id for each in lately if each.client_id is not None)
    clients = [Misses(client_id, count, feedback[client_id]) for client_id, count in held.items()]
    values: Counter[str] = Counter()
    for each in found:
        values.update(each.found)
    return Listed(
        found,
        dict(sorted(values.items())),
        dict(sorted(Counter(each.reason for each in found).items())),
        sorted(clients, key=lambda each: (not each.often, -each.share, each.client_id)),
    )


def show(log: EventLog, event_id: str, *, text: bool = False) -> Shown:
    """Raises `UsageError` if it was not held back; with `text` `PolicyError` unless its texts can and may still be read."""
    held = _read(log).one(event_id)
    source = _authentic(log, held) if text else _source(log, held)
    if source is None:
        return Shown(held, None, None, None)
    record, feedback = source.given
    if text and source.retracted:
        raise _taken_back(held)
    return Shown(held, record.stream, record.offset, list(gate.texts(feedback)) if text else None)


def release(writer: EventWriter, event_id: str, reason: str) -> Held:
    """Let the pipeline take in feedback that was held back, as it is: it is scored once, however often this is called or killed.

    Raises `UsageError` if it was not held back; `PolicyError` if it was dropped, was never authentic, is no longer in the log,
    was taken back by its user, or does not fit into an event with its scores.
    """
    reason, log, scoring = commands.check_reason(reason), writer.log, Scoring()
    held = _read(log).one(event_id)
    source = _authentic(log, held)
    if not source.retracted:
        if scoring.released(*source.given, source.given[0].appended_ms) is None:
            raise PolicyError(f"event {event_id} does not fit into an event with its scores, and stays held back")
        held = _decide(writer, held, "release", reason)
        made = scoring.released(*source.given, held.decided_ms)
        assert made is not None, "the time of the decision is as long as that of the event"
        log.append([event_of(writer, scoring, made, source.given[0], 0)])
        source = _authentic(log, held)
    if source.retracted:
        if held.status == "released":
            # The pipeline may have withdrawn it before it was scored.
            log.append([_withdrawal(writer, held, source.given[1])])
        raise _taken_back(held)
    return held


def drop(writer: EventWriter, event_id: str, reason: str) -> Held:
    """Never take it in. Raises `UsageError` if it was not held back, `PolicyError` if it was released."""
    return _decide(writer, _read(writer.log).one(event_id), "drop", commands.check_reason(reason))


def _decide(writer: EventWriter, held: Held, decision: Decision, reason: str) -> Held:
    """What holds then, which is this decision. Raises `PolicyError` if it is another one."""
    if held.status == "held":
        origin = commands.identities(writer).origin
        decided = QuarantineDecided(origin, held.source_topic, held.event_id, decision, reason)
        # One id for whatever is decided: of two operators at once, the first in the log counts.
        writer.log.append([writer.event(decided, id=ids.derived_id(origin, "decide", held.source_topic, held.event_id))])
        held = _read(writer.log).one(held.event_id)
    if held.status != _STATUS[decision]:
        raise PolicyError(
            f"event {held.event_id} has been {held.status} already", cause=held.why, hint="what was decided holds for ever"
        )
    return held


class _Quarantine:
    """The fold over topic `quarantine`."""

    topics: Final = (topics.QUARANTINE,)

    def __init__(self) -> None:
        self._held: dict[str, EventQuarantined] = {}
        self._decided: dict[str, tuple[QuarantineDecided, int]] = {}

    def apply(self, record: Record, payload: Payload) -> None:
        match payload:
            case EventQuarantined():
                self._held.setdefault(payload.event_id, payload)
            case QuarantineDecided():
                self._decided.setdefault(payload.event_id, (payload, record.appended_ms))
            case _:
                pass

    def listed(self) -> list[Held]:
        return [self._one(each) for each in self._held.values()]

    def one(self, event_id: str) -> Held:
        if event_id not in self._held:
            raise UsageError(f"no event {event_id!r} is held back", hint=_LIST)
        return self._one(self._held[event_id])

    def _one(self, of: EventQuarantined) -> Held:
        decided, decided_ms = self._decided.get(of.event_id, (None, 0))
        return Held(
            of.event_id,
            "held" if decided is None else _STATUS[decided.decision],
            "" if decided is None else decided.reason,
            decided_ms,
            of.reason,
            of.detail,
            of.found,
            of.source_topic,
            of.client_id,
            of.use_case,
            of.release,
            of.given_ms,
            of.recorded_ms,
        )


def _read(log: EventLog) -> _Quarantine:
    reader = Reader(log, _Quarantine(), identities=Identities())
    reader.catch_up()
    return reader.fold


def _feedback_by_client(log: EventLog) -> tuple[int, Counter[str]]:
    """The hour of the latest feedback by the log's clock, and how many pieces each client gave in `OVER_HOURS` up to it."""
    by_hour: Counter[tuple[str, int]] = Counter()
    for record in read_all(log, (topics.FEEDBACK,)):
        if newest(record.type) is FeedbackRecorded:
            by_hour[record.key, record.appended_ms // _HOUR_MS] += 1
    end = max((hour for _, hour in by_hour), default=0)
    counts: Counter[str] = Counter()
    for (client_id, hour), count in by_hour.items():
        counts[client_id] += count if hour > end - OVER_HOURS else 0
    return end, counts


def _authentic(log: EventLog, held: Held) -> _Source:
    """Raises `PolicyError` unless it is feedback that an enrolled client signed, and that the log still holds."""
    if held.source_topic != topics.FEEDBACK or held.client_id is None:
        raise PolicyError(f"event {held.event_id} is {held.reason}: nothing of it is ever read", hint="drop it")
    source = _source(log, held)
    if source is None:
        raise PolicyError(f"the log no longer holds event {held.event_id}, or not as its author signed it", hint="drop it")
    return source


def _taken_back(held: Held) -> PolicyError:
    return PolicyError(f"the user has taken back the feedback of event {held.event_id}: nothing of it is read", hint="drop it")


def _withdrawal(writer: EventWriter, held: Held, feedback: FeedbackRecorded) -> Event:
    withdrawn = ScoreWithdrawn(feedback.origin, feedback.use_case, feedback.client_id, feedback.feedback_id)
    identity = ids.derived_id(feedback.origin, "withdraw", held.event_id)
    return writer.event(withdrawn, id=identity, time_s=held.decided_ms // 1000)


def _source(log: EventLog, held: Held) -> _Source | None:
    people = Reader(log, Identities())
    people.catch_up()
    admit = Admit(people.fold)
    given: tuple[Record, FeedbackRecorded] | None = None
    retracted: set[str] = set()
    for record in read_all(log, (topics.FEEDBACK,)):
        if record.id != held.event_id and (record.key != held.client_id or newest(record.type) is not FeedbackRetracted):
            continue
        try:
            payload = admit(record)
        except InvalidEventError:
            continue
        if isinstance(payload, FeedbackRetracted) and payload.client_id == held.client_id:
            retracted.add(payload.feedback_id)
        elif isinstance(payload, FeedbackRecorded) and record.id == held.event_id:
            given = given or (record, payload)
    return None if given is None else _Source(given, given[1].feedback_id in retracted)
